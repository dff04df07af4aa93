"""Decode of batches of every size, with lengths from 0 to a million tokens side by side.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_close, assert_lse_close
from attention_check import check_batch
from backends import DTYPES, NumpyBackend
from batches import GARBAGE, Batch, make_batch, poison, scale_for

HEADS: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2}
TINY = [0, 1, 2, 15, 16, 17, 31, 33]


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("bfloat16", "bfloat16"), ("float16", "float8_e4m3")])
@pytest.mark.parametrize("num_seqs", [1, 2, 31, 33, 287, 289, 1024, 4096])
def test_one_long_sequence_among_tiny_ones_matches_the_reference(
    backend: NumpyBackend, rng: np.random.Generator, num_seqs: int, dtype: str, kv_dtype: str
) -> None:
    seq_lens = [int(n) for n in rng.choice(TINY, num_seqs)]
    seq_lens[int(rng.integers(num_seqs))] = 5003
    types: dict[str, Any] = {"dtype": DTYPES[dtype], "kv_dtype": DTYPES[kv_dtype]}
    check_batch(backend, make_batch(rng, seq_lens, **HEADS, **types, **scale_for(DTYPES[kv_dtype], rng, 2)))


@pytest.mark.parametrize("num_seqs", [33, 1024])
def test_tiny_sequences_of_different_query_lengths_match_the_reference(
    backend: NumpyBackend, rng: np.random.Generator, num_seqs: int
) -> None:
    seq_lens = [int(n) for n in rng.choice(TINY, num_seqs)]
    query_lens = [int(rng.integers(0, min(n, 9) + 1)) if n else int(rng.integers(0, 3)) for n in seq_lens]
    check_batch(backend, make_batch(rng, seq_lens, query_lens, **HEADS, dtype=np.float16))


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("num_seqs", [1, 33, 4096])
def test_a_batch_of_empty_sequences_gives_zeros(
    backend: NumpyBackend, rng: np.random.Generator, num_seqs: int, query_len: int
) -> None:
    batch = make_batch(rng, [0] * num_seqs, [query_len] * num_seqs, **HEADS, dtype=np.float16)
    out, lse = backend.arrays(poison(batch.q.shape, np.float16), poison(batch.q.shape[:2], np.float32))
    args, options = batch.on(backend)
    pagedattn.paged_attention(*args, out=out, lse=lse, **options)
    np.testing.assert_array_equal(backend.host(out), 0)
    np.testing.assert_array_equal(backend.host(lse), -np.inf)


# ---- up to a million tokens ----------------------------------------------------------------------------------------
#
# All sequences share a small cache.  Most of its blocks are common: tables name them again and again, and their keys
# have little weight.  The others are rare: a table names each at most once, wherever it may be, and together they have
# nearly all weight.  So a stretch that is left out, or taken twice, shows, though it is one of thousands.  The exact
# result is a sum over the slots of the cache, each as often as the row sees it.

NUM_COMMON, NUM_RARE, BLOCK_SIZE, HEAD_DIM = 300, 1000, 16, 128
LONG_LENS = [1_048_573, 0, 1, 300_001, 17, 65_536, 4096, 2, 0, 15]


def shared_batch(
    rng: np.random.Generator, seq_lens: list[int], query_len: int, dtype: str, kv_dtype: str, **options: Any
) -> Batch:
    """Return a batch of sequences of `query_len` query tokens over one cache of common and rare blocks."""
    num_q_heads, num_kv_heads = HEADS["num_q_heads"], HEADS["num_kv_heads"]
    to_rare = rng.standard_normal((num_kv_heads, HEAD_DIM))
    to_rare /= np.linalg.norm(to_rare, axis=-1, keepdims=True)
    shape = (NUM_COMMON + NUM_RARE, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
    keys, values = rng.standard_normal((2, *shape), np.float32)
    keys[NUM_COMMON:] += 8 * to_rare  # scores of about 8.5 where the others are about 0
    q = rng.standard_normal((len(seq_lens) * query_len, num_q_heads, HEAD_DIM), np.float32)
    q += 12 * np.repeat(to_rare, num_q_heads // num_kv_heads, axis=0)
    tables = rng.choice(GARBAGE, (len(seq_lens), -(-max(seq_lens) // BLOCK_SIZE) + 2)).astype(np.int32)
    for table, seq_len in zip(tables, seq_lens, strict=True):
        used = -(-seq_len // BLOCK_SIZE)
        table[:used] = rng.integers(0, NUM_COMMON, used)
        rare = NUM_COMMON + rng.permutation(NUM_RARE)[: used // 2]
        table[rng.permutation(used)[: len(rare)]] = rare
    starts = (query_len * np.arange(len(seq_lens) + 1)).astype(np.int32) if query_len > 1 else None
    caches = (array.astype(DTYPES[kv_dtype]) for array in (keys, values))
    return Batch(q.astype(DTYPES[dtype]), *caches, tables, np.array(seq_lens, np.int32), starts, options)


def by_counting_slots(batch: Batch, query_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the float64 outputs and log-sum-exps of causal attention over a shared cache."""
    out = np.zeros(batch.q.shape)
    lse = np.full(batch.q.shape[:2], -np.inf)
    num_kv_heads, group = HEADS["num_kv_heads"], HEADS["num_q_heads"] // HEADS["num_kv_heads"]
    keys, values = (
        (cache.astype(np.float64) * reference.per_head(batch.options.get(scale), num_kv_heads)[:, None])
        .reshape(-1, num_kv_heads, HEAD_DIM)
        .transpose(1, 0, 2)
        for cache, scale in ((batch.k_cache, "k_scale"), (batch.v_cache, "v_scale"))
    )
    q = batch.q.astype(np.float64).reshape(-1, num_kv_heads, group, HEAD_DIM)
    for row in range(len(q)):
        seq = row // query_len
        seen = int(batch.seq_lens[seq]) - query_len + 1 + row % query_len
        if seen <= 0:
            continue
        whole, rest = divmod(seen, BLOCK_SIZE)
        table = batch.block_tables[seq]
        times = np.repeat(np.bincount(table[:whole], minlength=NUM_COMMON + NUM_RARE), BLOCK_SIZE).astype(np.float64)
        if rest:
            first = int(table[whole]) * BLOCK_SIZE
            times[first : first + rest] += 1
        scores = q[row] @ keys.transpose(0, 2, 1) * HEAD_DIM**-0.5  # [Hkv, group, slots]
        highest = scores.max(axis=-1, keepdims=True)
        weights = times * np.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        out[row] = (weights @ values / total).reshape(-1, HEAD_DIM)
        lse[row] = (highest + np.log(total)).reshape(-1)
    return out, lse


@pytest.mark.parametrize("query_len", [1, 3])
def test_counting_slots_gives_what_the_reference_gives(rng: np.random.Generator, query_len: int) -> None:
    scales = {"k_scale": np.array([0.9, 1.1], np.float32), "v_scale": 0.5}
    batch = shared_batch(rng, [3001, 17, 0, 64], query_len, "float16", "float8_e4m3", **scales)
    for counted, expected in zip(by_counting_slots(batch, query_len), batch.reference(), strict=True):
        np.testing.assert_allclose(counted, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float16", "float16"), ("bfloat16", "float8_e4m3")])
def test_lengths_from_0_to_a_million_share_a_batch(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, kv_dtype: str, query_len: int, deterministic: bool
) -> None:
    scales = {"k_scale": np.array([0.9, 1.1], np.float32), "v_scale": 0.5} if kv_dtype == "float8_e4m3" else {}
    seq_lens = [max(n, query_len) if n else 0 for n in LONG_LENS]
    batch = shared_batch(rng, seq_lens, query_len, dtype, kv_dtype, **scales)
    args, options = batch.on(backend)
    out, lse = backend.arrays(poison(batch.q.shape, batch.q.dtype), poison(batch.q.shape[:2], np.float32))
    pagedattn.paged_attention(*args, out=out, lse=lse, deterministic=deterministic, **options)
    expected, expected_lse = by_counting_slots(batch, query_len)
    assert_close(backend.host(out), expected, batch.q.dtype)
    assert_lse_close(backend.host(lse), expected_lse)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("query_len", [1, 3])
def test_sums_over_a_million_keys_keep_the_precision_of_float32(
    rng: np.random.Generator, query_len: int, deterministic: bool
) -> None:
    # On the CPU: with ranges of keys as long as few threads' shares, a lane's sum lost 3e-4 of small weights.
    batch = shared_batch(rng, [1_048_573], query_len, "float32", "float32")
    args, options = batch.on(NumpyBackend())
    out, lse = poison(batch.q.shape, np.float32), poison(batch.q.shape[:2], np.float32)
    pagedattn.paged_attention(*args, out=out, lse=lse, deterministic=deterministic, **options)
    expected, expected_lse = by_counting_slots(batch, query_len)
    assert_close(out, expected, np.float32)
    assert_lse_close(lse, expected_lse, tolerance=5e-6)


@pytest.mark.parametrize("query_len", [1, 3])
def test_a_window_at_the_end_of_a_million_tokens_is_all_that_is_read(
    backend: NumpyBackend, rng: np.random.Generator, query_len: int
) -> None:
    slopes = rng.uniform(0, 0.02, HEADS["num_q_heads"]).astype(np.float32)
    batch = shared_batch(
        rng, [1_048_573, 300_001, 900, 0], query_len, "float16", "float16", window=1000, alibi_slopes=slopes
    )
    for table, seq_len in zip(batch.block_tables, batch.seq_lens, strict=True):
        outside = max(0, int(seq_len) - query_len + 1 - 1000) // BLOCK_SIZE
        table[:outside] = rng.choice(GARBAGE, outside)
    check_batch(backend, batch)
