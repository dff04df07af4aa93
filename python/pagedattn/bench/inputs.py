# SPDX-License-Identifier: Apache-2.0
"""The arrays of a case: random data in shuffled blocks, poison wherever nothing may be read.

A cache is filled from a pool of random blocks, since making gigabytes of normal numbers would take longer than all
measurements.  The same case and seed give the same arrays on every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pagedattn
from pagedattn._device import ELEMENT, FP8_DTYPES, ITEM_SIZE, STORAGE, Device, show_bytes

from .cases import Case, CaseError

_POOL_BYTES = 64 << 20  # of normal numbers, in the cache's type
_FILL_BYTES = 256 << 20  # written to a cache at a time


class Inputs:
    """What one case is called with.

    Attributes
    ----------
    q : array [T, Hq, D]
    k_cache, v_cache : array [N, S, Hkv, D]
        On CUDA, an 8-bit cache is uint8 with `kv_dtype` beside it, and so are 8-bit queries: CuPy has no such type.
    block_tables : array [B, max_blocks] int32
        Entries past a sequence's last block are -1.
    seq_lens : array [B] int32
    query_start_loc : array [B + 1] int32, or None
        None where every sequence has one query token.
    out : array [T, Hq, D]
        Filled with NaN.
    host_block_tables : ndarray [B, max_blocks] int32
        The block tables in host memory.
    """

    def __init__(self, case: Case, device: Device, seed: int = 0) -> None:
        self.case = case
        self.device = device
        check_memory(case, device)
        rng = np.random.default_rng(seed)
        xp = device.xp
        self.k_cache, self.v_cache = _empty_caches(case, device)
        for cache in (self.k_cache, self.v_cache):
            _fill(cache, case, device, rng)
        self.host_block_tables = _block_tables(case, rng)
        _poison_unused_slots(case, self.host_block_tables, (self.k_cache, self.v_cache))
        q = rng.standard_normal((sum(case.q_lens), case.heads, case.head_dim), np.float32).astype(ELEMENT[case.dtype])
        self.q = device.put(q.view(STORAGE[case.dtype]))
        if not (case.dtype in FP8_DTYPES and device.backend == "cuda"):
            self.q = self.q.view(ELEMENT[case.dtype])
        self.block_tables = device.put(self.host_block_tables)
        self.seq_lens = device.put(np.array(case.kv_lens, np.int32))
        starts = np.concatenate([[0], np.cumsum(case.q_lens)]).astype(np.int32)
        self.query_starts = device.put(starts)
        self.query_start_loc = None if max(case.q_lens) == 1 else self.query_starts
        if not (case.kv_dtype in FP8_DTYPES and device.backend == "cuda"):
            self.k_cache, self.v_cache = (c.view(ELEMENT[case.kv_dtype]) for c in (self.k_cache, self.v_cache))
        self.out = xp.empty(q.shape, STORAGE[case.out_dtype]).view(ELEMENT[case.out_dtype])
        self.poison_out()

    def poison_out(self) -> None:
        """Fill `out` with NaN, so that an element that is not written shows."""
        poison(self.out)

    def attend(self, *, seq_lens: Any = None) -> Callable[[], None]:
        """The call of pagedattn, ready to be timed: with `out` and `workspace` given, it allocates nothing.

        Parameters
        ----------
        seq_lens : array [B] int32, optional
            Other lengths than the case's: of zeros, only the cost of calling is left.
        """
        lens = self.seq_lens if seq_lens is None else seq_lens
        q, k_cache, v_cache, block_tables, out = self.q, self.k_cache, self.v_cache, self.block_tables, self.out
        starts, max_query_len, case = self.query_start_loc, max(self.case.q_lens), self.case
        causal, window, kv_dtype = case.causal, case.window, case.kv_dtype if case.kv_dtype in FP8_DTYPES else None
        size = pagedattn.paged_attention_workspace_size(
            q,
            k_cache,
            v_cache,
            block_tables,
            lens,
            query_start_loc=starts,
            max_query_len=max_query_len,
            kv_dtype=kv_dtype,
        )
        workspace = self.device.xp.zeros(size, np.uint8) if size else None

        def call() -> None:  # as users write it: unpacking arguments would count as the call's
            pagedattn.paged_attention(
                q,
                k_cache,
                v_cache,
                block_tables,
                lens,
                query_start_loc=starts,
                max_query_len=max_query_len,
                causal=causal,
                window=window,
                kv_dtype=kv_dtype,
                out=out,
                workspace=workspace,
            )

        return call

    def sequence(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Keys and values ``[L, Hkv, D]`` of one sequence, in host memory, dequantised."""
        case = self.case
        length = case.kv_lens[index]
        blocks = self.device.put(self.host_block_tables[index, : -(-length // case.block_size)])
        shape = (-1, case.kv_heads, case.head_dim)
        keys, values = (
            to_host(self.device, cache.view(STORAGE[case.kv_dtype])[blocks], case.kv_dtype).reshape(shape)[:length]
            for cache in (self.k_cache, self.v_cache)
        )
        return keys, values


def poison(array: Any) -> None:
    """Set every bit of a contiguous array: NaN in each floating-point type."""
    array.view(np.uint8)[...] = 0xFF


def to_host(device: Device, array: Any, dtype: str) -> NDArray[np.float32]:
    """A device array of `dtype`, or of its bits, as float32 in host memory."""
    host = device.get(array.view(STORAGE[dtype]))
    result: NDArray[np.float32] = host.view(ELEMENT[dtype]).astype(np.float32)
    return result


def check_memory(case: Case, device: Device) -> None:
    """Refuse a case that does not fit, before anything is allocated: CaseError."""
    free = device.free_memory()
    # The cache and what filling it takes; q as float32 and in its type, out, and the rows that are compared.
    rows = sum(case.q_lens) * case.heads * case.head_dim
    tables = 4 * len(case.kv_lens) * -(-max(case.kv_lens) // case.block_size)
    needed = (
        case.cache_bytes
        + 2 * _FILL_BYTES
        + rows * (2 * 4 + ITEM_SIZE[case.dtype] + ITEM_SIZE[case.out_dtype])
        + 2 * tables
    )
    if free is not None and needed > free:
        raise CaseError(
            f"{case.name}: the call's arrays take {show_bytes(needed)}, while {show_bytes(free)} are "
            "free: take fewer or shorter sequences, or fewer heads"
        )


def _empty_caches(case: Case, device: Device) -> tuple[Any, Any]:
    """Memory of K and V, as arrays [N, S, Hkv, D] with the strides of the case's layout."""
    n, s, h, d = case.num_blocks, case.block_size, case.kv_heads, case.head_dim
    storage = STORAGE[case.kv_dtype]
    if case.layout == "HND":
        return tuple(device.xp.empty((n, h, s, d), storage).transpose(0, 2, 1, 3) for _ in "kv")
    if device.backend == "cpu":
        caches = pagedattn.KVCache(n, s, h, d, case.kv_dtype)
        return caches.k_caches[0].view(storage), caches.v_caches[0].view(storage)
    return tuple(device.xp.empty((n, s, h, d), storage) for _ in "kv")


def _fill(cache: Any, case: Case, device: Device, rng: np.random.Generator) -> None:
    storage = STORAGE[case.kv_dtype]
    block = (case.block_size, case.kv_heads, case.head_dim)
    block_bytes = int(np.prod(block)) * storage.itemsize
    pool_size = min(case.num_blocks, max(2, _POOL_BYTES // block_bytes))
    normal = rng.standard_normal((pool_size, *block), np.float32)
    pool = device.put(normal.astype(ELEMENT[case.kv_dtype]).view(storage))
    step = max(1, _FILL_BYTES // block_bytes)
    for start in range(0, case.num_blocks, step):
        stop = min(start + step, case.num_blocks)
        cache[start:stop] = pool[device.put(rng.integers(0, pool_size, stop - start))]


def _block_tables(case: Case, rng: np.random.Generator) -> NDArray[np.int32]:
    counts = [-(-length // case.block_size) for length in case.kv_lens]
    tables = np.full((len(counts), max(counts)), -1, np.int32)
    order = rng.permutation(case.num_blocks).astype(np.int32)
    for row, blocks in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        tables[row, : len(blocks)] = blocks
    return tables


def _poison_unused_slots(case: Case, tables: NDArray[np.int32], caches: tuple[Any, Any]) -> None:
    for row, length in enumerate(case.kv_lens):
        used = length % case.block_size
        if used:
            last = int(tables[row, length // case.block_size])
            for cache in caches:
                cache[last, used:] = np.iinfo(cache.dtype).max  # all bits set, as poison does
