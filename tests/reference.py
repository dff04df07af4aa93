"""What every operation means: float64 NumPy, one sequence after the other, nothing clever.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST_FINITE = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def per_head(value: Any, num_heads: int) -> np.ndarray:
    """Return a scale as float64 [num_heads]; None is 1, and one number serves all heads."""
    scale = np.asarray(1.0 if value is None else value, np.float64)
    return np.broadcast_to(scale, (num_heads,))


def gather_sequence(cache: np.ndarray, block_table: np.ndarray, start: int, stop: int, scale: Any = None) -> np.ndarray:
    """Return tokens start … stop-1 of one sequence as float64 [stop - start, Hkv, D], looking at no other slot."""
    positions = np.arange(start, stop)
    blocks = block_table[positions // cache.shape[1]]
    assert (blocks >= 0).all(), "the test's own block table names no block for a visible key"
    tokens = cache[blocks, positions % cache.shape[1]].astype(np.float64)
    return tokens * per_head(scale, cache.shape[2])[None, :, None]


def visible_keys(position: int, seq_len: int, causal: bool, window: int | None) -> tuple[int, int]:
    """Return the keys [first, last + 1) that the query token at `position` sees."""
    stop = position + 1 if causal else seq_len
    start = 0 if window is None else max(0, stop - window)
    return start, max(start, stop)


def paged_attention(
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    *,
    query_start_loc: np.ndarray | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs [T, Hq, D] and the log-sum-exps [T, Hq], both float64."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    group = num_q_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    starts = np.arange(len(seq_lens) + 1) if query_start_loc is None else query_start_loc
    out = np.zeros((num_tokens, num_q_heads, head_dim))
    lse = np.full((num_tokens, num_q_heads), -np.inf)

    for b, seq_len in enumerate(map(int, seq_lens)):
        rows = range(int(starts[b]), int(starts[b + 1]))
        visible = [visible_keys(seq_len - len(rows) + r, seq_len, causal, window) for r in range(len(rows))]
        first = min((start for start, stop in visible if start < stop), default=0)
        last = max((stop for start, stop in visible if start < stop), default=0)
        k = gather_sequence(k_cache, block_tables[b], first, last, k_scale).transpose(1, 0, 2)  # [Hkv, tokens, D]
        v = gather_sequence(v_cache, block_tables[b], first, last, v_scale).transpose(1, 0, 2)
        for r, row in enumerate(rows):
            start, stop = visible[r]
            if start == stop:
                if sinks is not None:
                    lse[row] = sinks  # the denominator is exp(sink) alone
                continue
            keys, values = k[:, start - first : stop - first], v[:, start - first : stop - first]
            queries = q[row].astype(np.float64).reshape(num_kv_heads, group, head_dim)
            queries = queries * per_head(q_scale, num_kv_heads)[:, None, None]
            scores = scale * np.einsum("hgd,hjd->hgj", queries, keys).reshape(num_q_heads, -1)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            if alibi_slopes is not None:
                distance = np.arange(start, stop) - (seq_len - len(rows) + r)
                scores = scores + alibi_slopes.astype(np.float64)[:, None] * distance
            highest = scores.max(axis=1)
            if sinks is not None:
                highest = np.maximum(highest, sinks)
            weights = np.exp(scores - highest[:, None])
            denominator = weights.sum(axis=1)
            if sinks is not None:
                denominator = denominator + np.exp(sinks.astype(np.float64) - highest)
            weighted = np.einsum("hgj,hjd->hgd", weights.reshape(num_kv_heads, group, -1), values)
            out[row] = weighted.reshape(num_q_heads, head_dim) / denominator[:, None]
            lse[row] = highest + np.log(denominator)
    return out, lse


def merge_states(outs: list[np.ndarray], lses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the attention over the union of the parts' keys: outputs weighted by exp(lse), and the joint lse."""
    lse = np.full(lses[0].shape, -np.inf)
    for part in lses:
        lse = np.logaddexp(lse, part.astype(np.float64))
    out = np.zeros(outs[0].shape)
    for part_out, part_lse in zip(outs, lses, strict=True):
        seen = np.isfinite(part_lse)
        weight = np.where(
            seen, np.exp(np.where(seen, part_lse.astype(np.float64) - np.where(seen, lse, 0.0), 0.0)), 0.0
        )
        out += np.where(seen[..., None], weight[..., None] * part_out.astype(np.float64), 0.0)
    return out, lse


def quantise(values: np.ndarray, scale: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """Return values [T, Hkv, D] divided by the scale, saturated and rounded to a float8 type; NaN stays NaN."""
    scaled = values.astype(np.float64) / per_head(scale, values.shape[1])[None, :, None]
    largest = LARGEST_FINITE[dtype.name]
    with np.errstate(invalid="ignore"):
        # Through float32: ml_dtypes rounds float64 to float8 in two steps of its own otherwise.
        return np.clip(scaled, -largest, largest).astype(np.float32).astype(dtype)


def reshape_and_cache(
    key: np.ndarray,
    value: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    slot_mapping: np.ndarray,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    """Write each token with slot >= 0 into block slot // S at offset slot % S, in place."""
    block_size = k_cache.shape[1]
    for new, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        stored = new if cache.dtype == new.dtype else quantise(new, scale, cache.dtype)
        for token, slot in enumerate(map(int, slot_mapping)):
            if slot >= 0:
                cache[slot // block_size, slot % block_size] = stored[token]


def rotate(x: np.ndarray, positions: np.ndarray, cos_sin: np.ndarray, *, interleaved: bool = False) -> np.ndarray:
    """Return [T, H, D] in float64, the first R dimensions of each head rotated by its token's position."""
    rotated = x.astype(np.float64)
    half = cos_sin.shape[1] // 2
    for token, position in enumerate(map(int, positions)):
        cosine, sine = cos_sin[position, :half].astype(np.float64), cos_sin[position, half:].astype(np.float64)
        if interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            first, second = slice(0, half), slice(half, 2 * half)
        a, b = x[token, :, first].astype(np.float64), x[token, :, second].astype(np.float64)
        rotated[token, :, first] = a * cosine - b * sine
        rotated[token, :, second] = b * cosine + a * sine
    return rotated


def copy_blocks(src: np.ndarray, dst: np.ndarray, block_mapping: np.ndarray) -> None:
    """Copy src[s] to dst[d] for every pair (s, d), in place."""
    for source, destination in block_mapping:
        dst[destination] = src[source]


def gather_kv(
    cache: np.ndarray,
    block_tables: np.ndarray,
    seq_lens: np.ndarray,
    out: np.ndarray,
    *,
    seq_starts: np.ndarray | None = None,
    out_start_loc: np.ndarray | None = None,
    scale: Any = None,
) -> None:
    """Write tokens seq_starts[b] … seq_lens[b]-1 of each sequence to consecutive rows of `out`, in place."""
    block_size = cache.shape[1]
    row = 0
    for b, seq_len in enumerate(map(int, seq_lens)):
        start = 0 if seq_starts is None else int(seq_starts[b])
        if out_start_loc is not None:
            row = int(out_start_loc[b])
        for position in range(start, seq_len):
            token = cache[int(block_tables[b, position // block_size]), position % block_size]
            if out.dtype != cache.dtype:
                token = (token.astype(np.float64) * per_head(scale, cache.shape[2])[:, None]).astype(np.float32)
            out[row] = token.astype(out.dtype)
            row += 1
