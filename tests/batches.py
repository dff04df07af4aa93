"""Builds what the operations take: paged caches in shuffled blocks, ragged batches, poisoned memory.

Everything an operation must not read is poison: cache slots that no visible key lives in hold NaN, block-table entries
that no visible key needs hold garbage.  Everything it must write holds NaN before, and the gaps of strided outputs hold
bytes that must survive.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes  # noqa: F401  (registers the types with NumPy)
import numpy as np
import reference
from backends import BFLOAT16, Array, NumpyBackend, allocation, is_float8, offset_in

# Types of queries and cache that the tensor cores serve: of 16-bit queries, and of all.
SIXTEEN_BIT_KINDS = (
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("float16", "float8_e4m3"),
    ("bfloat16", "float8_e4m3"),
    ("float16", "float8_e5m2"),
    ("bfloat16", "float8_e5m2"),
)
TENSOR_CORE_KINDS = (*SIXTEEN_BIT_KINDS, ("float8_e4m3", "float8_e4m3"), ("float8_e5m2", "float8_e5m2"))
LAYOUTS = ("NHD", "HND", "interleaved NHD", "interleaved HND", "packed heads", "padded", "K NHD, V HND")
# Slices of larger arrays: rows that vector loads and tensor maps can take, and rows that they cannot.
SLICES = ("one layer of many", "8 bytes off", "odd rows", "K whole, V in odd rows")
GARBAGE = np.array([-1, -(2**31), 2**31 - 1, 10**6, -7], np.int32)
POISON_BYTE = 0xFF  # NaN in every element type here


def cache_views(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: Any, layout: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return poisoned k and v caches [N, S, Hkv, D] with the strides that `layout` names."""

    def poisoned(*shape: int) -> np.ndarray:
        return poison(shape, dtype)

    n, s, h, d = num_blocks, block_size, num_kv_heads, head_dim
    match layout:
        case "NHD":
            return poisoned(n, s, h, d), poisoned(n, s, h, d)
        case "HND":
            return poisoned(n, h, s, d).transpose(0, 2, 1, 3), poisoned(n, h, s, d).transpose(0, 2, 1, 3)
        case "interleaved NHD":
            both = poisoned(n, 2, s, h, d)
            return both[:, 0], both[:, 1]
        case "interleaved HND":
            both = poisoned(n, 2, h, s, d).transpose(0, 1, 3, 2, 4)
            return both[:, 0], both[:, 1]
        case "packed heads":
            both = poisoned(n, s, h, 2 * d)
            return both[..., :d], both[..., d:]
        case "padded":
            return poisoned(n, s + 1, h + 1, d + 16)[:, :s, :h, :d], poisoned(n, s, h + 2, d + 32)[:, :, :h, :d]
        case "K NHD, V HND":
            return poisoned(n, s, h, d), poisoned(n, h, s, d).transpose(0, 2, 1, 3)
        case "one layer of many":
            layers = poisoned(n, 3, 2, s, h, d)
            return layers[:, 1, 0], layers[:, 1, 1]
        case "8 bytes off":
            margin = 8 // np.dtype(dtype).itemsize
            return tuple(poisoned(n, s, h, d + 2 * margin)[..., margin : margin + d] for _ in range(2))
        case "odd rows":
            return poisoned(n, s, h, d + 1)[..., :d], poisoned(n, s, h, d + 3)[..., 1 : d + 1]
        case "K whole, V in odd rows":
            return poisoned(n, s, h, d), poisoned(n, s, h, d + 1)[..., 1:]
    raise ValueError(layout)


def poison(shape: tuple[int, ...] | list[int], dtype: Any) -> np.ndarray:
    """Return a new array whose every byte is 0xFF: NaN in each floating-point type."""
    array = np.empty(shape, dtype)
    allocation(array)[:] = POISON_BYTE
    return array


def is_poison(array: np.ndarray) -> np.ndarray:
    """Return which elements still hold the poison's bits."""
    raw = np.ascontiguousarray(array)[..., None].view(np.uint8)
    return np.asarray((raw == POISON_BYTE).all(axis=-1))


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, spread: float = 1.0) -> np.ndarray:
    return (spread * rng.standard_normal(shape, np.float32)).astype(dtype)


@dataclass
class Output:
    """An output array with poison in it and, where it is strided, in the gaps around it."""

    view: np.ndarray

    def gaps_untouched(self, after: np.ndarray) -> bool:
        """Whether, in the allocation's bytes `after` the call, all bytes outside the view are still poison."""
        owner = allocation(self.view)
        covered = np.zeros(owner.size, bool)
        offset = offset_in(self.view, owner)
        itemsize = self.view.itemsize
        shape, strides = (*self.view.shape, itemsize), (*self.view.strides, 1)
        np.ndarray(shape, bool, buffer=covered, offset=offset, strides=strides)[...] = True
        return bool((after[: owner.size][~covered] == POISON_BYTE).all())


def output(shape: tuple[int, int, int], dtype: Any, *, strided: bool = False) -> Output:
    """Return a poisoned [T, H, D] output, contiguous or with gaps between tokens, heads and rows."""
    if not strided:
        return Output(poison(shape, dtype))
    tokens, heads, dim = shape
    return Output(poison((tokens, heads + 1, dim + 16), dtype)[:, :heads, 8 : 8 + dim])


@dataclass
class Batch:
    """One ragged batch over a paged cache, in host memory, with what `paged_attention` is to be told."""

    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    block_tables: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return int(self.q.shape[0])

    @property
    def out_dtype(self) -> np.dtype[Any]:
        """The type of the result where none is given."""
        return BFLOAT16 if is_float8(self.q.dtype) else self.q.dtype

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the float64 outputs and log-sum-exps."""
        return reference.paged_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.seq_lens,
            query_start_loc=self.query_start_loc,
            **self.options,
        )

    def on(self, backend: NumpyBackend) -> tuple[list[Array], dict[str, Array]]:
        """Return the positional and keyword arguments of `paged_attention` on a backend."""
        positional = list(backend.arrays(self.q, self.k_cache, self.v_cache, self.block_tables, self.seq_lens))
        keywords: dict[str, Array] = dict(self.options)
        for name, value in keywords.items():
            if isinstance(value, np.ndarray):
                keywords[name] = backend.array(value)
        if self.query_start_loc is not None:
            keywords["query_start_loc"] = backend.array(self.query_start_loc)
        if backend.kv_dtype(self.k_cache.dtype) is not None:
            keywords["kv_dtype"] = backend.kv_dtype(self.k_cache.dtype)
        return positional, keywords


def lens(sequences: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Return the lengths, and the query lengths, of sequences of which each is told as a pair of them."""
    seq_lens, query_lens = zip(*sequences, strict=True)
    return list(seq_lens), list(query_lens)


def make_batch(
    rng: np.random.Generator,
    seq_lens: list[int],
    query_lens: list[int] | None = None,
    *,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: Any = np.float32,
    kv_dtype: Any = None,
    layout: str = "NHD",
    packed_q: bool = False,
    shared_prefix: int = 0,
    spread: float = 1.0,
    **options: Any,
) -> Batch:
    """Return a batch of the given lengths in shuffled blocks; `query_lens` None means one query token a sequence.

    `options` go to `paged_attention` as they are.  The first `shared_prefix` whole blocks of all sequences are the same
    physical blocks.  Slots and table entries that no query token can see are poison.
    """
    kv_dtype = np.dtype(dtype if kv_dtype is None else kv_dtype)
    lens = [1] * len(seq_lens) if query_lens is None else query_lens
    blocks_needed = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(blocks_needed) + 3
    free = list(rng.permutation(num_blocks))
    tables = rng.choice(GARBAGE, (len(seq_lens), max([0, *blocks_needed]) + 2)).astype(np.int32)
    prefix = [free.pop() for _ in range(shared_prefix)]
    k_cache, v_cache = cache_views(num_blocks, block_size, num_kv_heads, head_dim, kv_dtype, layout)
    for b, (seq_len, query_len) in enumerate(zip(seq_lens, lens, strict=True)):
        first, last = needed_keys(seq_len, query_len, options.get("causal", True), options.get("window"))
        for i in range(first // block_size, -(-last // block_size)):
            tables[b, i] = prefix[i] if i < len(prefix) else free.pop()
        positions = np.arange(first, last)
        slots = tables[b, positions // block_size], positions % block_size
        for cache in (k_cache, v_cache):
            cache[slots] = normal(rng, (last - first, num_kv_heads, head_dim), kv_dtype, spread)

    num_tokens = sum(lens)
    q = normal(rng, (num_tokens, num_q_heads + 2 * num_kv_heads, head_dim), dtype, spread)
    q = q[:, :num_q_heads] if packed_q else q[:, :num_q_heads].copy()
    starts = None if query_lens is None else np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    return Batch(q, k_cache, v_cache, tables, np.array(seq_lens, np.int32), starts, options)


def needed_keys(seq_len: int, query_len: int, causal: bool, window: int | None) -> tuple[int, int]:
    """Return the keys [first, last + 1) that at least one query token of a sequence sees."""
    ranges = [reference.visible_keys(seq_len - query_len + r, seq_len, causal, window) for r in range(query_len)]
    ranges = [(start, stop) for start, stop in ranges if start < stop]
    return min((r[0] for r in ranges), default=0), max((r[1] for r in ranges), default=0)


def scale_for(
    kv_dtype: Any, rng: np.random.Generator, num_kv_heads: int, dtype: Any = np.float16
) -> dict[str, np.ndarray]:
    """Return per-head k_scale and v_scale for a float8 cache, q_scale for float8 queries, and nothing for others."""
    names = ("k_scale", "v_scale") if is_float8(kv_dtype) else ()
    names += ("q_scale",) if is_float8(dtype) else ()
    return {name: rng.uniform(0.3, 2.0, num_kv_heads).astype(np.float32) for name in names}


def naming_poisoned_blocks(rng: np.random.Generator, batch: Batch) -> Batch:
    """Return the batch with half of the table entries that name no block naming one that holds nothing but NaN."""
    poisoned = np.flatnonzero(is_poison(batch.k_cache).all(axis=(1, 2, 3)))
    tables = batch.block_tables
    free = ((tables < 0) | (tables >= len(batch.k_cache))) & (rng.random(tables.shape) < 0.5)
    assert free.any()
    return replace(batch, block_tables=np.where(free, rng.choice(poisoned, tables.shape), tables).astype(np.int32))
