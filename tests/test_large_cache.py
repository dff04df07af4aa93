"""Caches of more than 2^31 and 2^32 elements: addresses are 64 bits wide everywhere.

The cache is virtual memory: only the few blocks in use are ever written, so on the host it needs address space and
hardly any memory.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_close, assert_same_bytes
from backends import FLOAT8_E4M3, Array, NumpyBackend
from batches import normal

BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM = 16, 8, 128
BLOCK_ELEMENTS = BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM  # of one of K and V


class LargeCache:
    """K and V interleaved in one allocation of `num_blocks` blocks, with the blocks in use mirrored in a small one."""

    def __init__(self, backend: NumpyBackend, num_blocks: int, dtype: Any, used: list[int]) -> None:
        self.backend, self.used = backend, used
        shape = (num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        stored = np.uint8 if backend.is_cuda and dtype == FLOAT8_E4M3 else dtype
        try:
            self.both: Array = backend.cupy.empty(shape, stored) if backend.is_cuda else np.empty(shape, stored)  # type: ignore[attr-defined]
        except Exception as error:  # NumPy's and CuPy's out-of-memory errors have no common base
            if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            pytest.skip(f"no memory for a large cache: {error}")
        self.small = np.zeros((len(used), *shape[1:]), dtype)

    @property
    def k(self) -> Array:
        return self.both[:, 0]

    @property
    def v(self) -> Array:
        return self.both[:, 1]

    def fill(self, rng: np.random.Generator) -> None:
        """Write random keys and values into the blocks in use, here and in the mirror."""
        self.small[...] = normal(rng, self.small.shape, self.small.dtype)
        for block, content in zip(self.used, self.small, strict=True):
            if self.backend.is_cuda:
                self.both[block].set(content.view(self.both.dtype))
            else:
                self.both[block] = content

    def now(self) -> np.ndarray:
        """Return what the blocks in use hold, in the mirror's type."""
        blocks = [self.backend.host(self.both[block]).view(self.small.dtype) for block in self.used]
        return np.stack(blocks)


@pytest.fixture(scope="module", params=["more than 2^31 elements", "more than 2^32 elements"])
def large(request: pytest.FixtureRequest, backend: NumpyBackend) -> LargeCache:
    if request.param == "more than 2^31 elements":
        # Block 65536 of K starts at element 2^31, block 32768 at element 2^30 and so at byte 2^31 of float16.
        return LargeCache(backend, 66_000, np.float16, [0, 1, 463, 464, 32_767, 32_768, 65_535, 65_536, 65_999])
    # One byte an element: block 131072 starts at 2^32.
    return LargeCache(backend, 131_500, FLOAT8_E4M3, [0, 1, 427, 428, 65_535, 65_536, 131_071, 131_072, 131_499])


def test_the_cache_is_as_large_as_it_says(large: LargeCache) -> None:
    assert large.both.size > (2**31 if large.small.dtype == np.float16 else 2**32)


def caches_in(both: Array, layout: str) -> tuple[Array, Array]:
    """Return K and V of interleaved blocks, whose numbers are taken as tokens of heads or as heads of tokens."""
    if layout == "HND":
        both = both.reshape(len(both), 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM).transpose(0, 1, 3, 2, 4)
    return both[:, 0], both[:, 1]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("query_len", [1, 20])
def test_attention_reads_blocks_far_apart(
    large: LargeCache, rng: np.random.Generator, query_len: int, layout: str
) -> None:
    backend = large.backend
    large.fill(rng)
    order = rng.permutation(len(large.used))
    seq_len = len(large.used) * BLOCK_SIZE - 3
    q = normal(rng, (query_len, 2 * NUM_KV_HEADS, HEAD_DIM), np.float16)
    lens, starts = np.array([seq_len], np.int32), np.array([0, query_len], np.int32)
    q_, tables, lens_, starts_ = backend.arrays(q, np.array(large.used, np.int32)[order][None], lens, starts)
    kv_dtype = backend.kv_dtype(large.small.dtype)
    caches = caches_in(large.both, layout)
    out = pagedattn.paged_attention(q_, *caches, tables, lens_, query_start_loc=starts_, kv_dtype=kv_dtype)
    mirrors = caches_in(large.small, layout)
    expected, _ = reference.paged_attention(q, *mirrors, order[None], lens, query_start_loc=starts)
    assert_close(backend.host(out), expected, np.float16)


def test_tokens_are_written_to_blocks_far_apart(large: LargeCache, rng: np.random.Generator) -> None:
    backend = large.backend
    large.fill(rng)
    key, value = normal(rng, (2, 40, NUM_KV_HEADS, HEAD_DIM), np.float16)
    places = rng.permutation(len(large.used) * BLOCK_SIZE)[:40].astype(np.int64)
    slots = np.array(large.used)[places // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + places % BLOCK_SIZE
    key_, value_, slots_ = backend.arrays(key, value, slots)
    kv_dtype = backend.kv_dtype(large.small.dtype)
    pagedattn.reshape_and_cache(key_, value_, large.k, large.v, slots_, kv_dtype=kv_dtype)
    reference.reshape_and_cache(key, value, large.small[:, 0], large.small[:, 1], places)
    assert_same_bytes(large.now(), large.small)


@pytest.mark.parametrize("whole", [True, False], ids=["blocks of K and V", "K and V apart"])
def test_blocks_are_copied_far_away(large: LargeCache, rng: np.random.Generator, whole: bool) -> None:
    large.fill(rng)
    order = rng.permutation(len(large.used))
    pairs = order[:8].reshape(4, 2)
    mapping = large.backend.array(np.array(large.used, np.int64)[pairs])
    pagedattn.copy_blocks(large.both if whole else [large.k, large.v], mapping)
    reference.copy_blocks(large.small, large.small, pairs)
    assert_same_bytes(large.now(), large.small)


@pytest.mark.parametrize("page_locked", [False, True])
def test_blocks_are_swapped_out_and_in_from_far_away(
    large: LargeCache, rng: np.random.Generator, page_locked: bool
) -> None:
    large.fill(rng)
    count = len(large.used)
    if page_locked:
        (host,) = pagedattn.HostCache(large.both, count).caches
    else:
        host = np.zeros((count, *large.both.shape[1:]), large.both.dtype)
    places = np.arange(count)[::-1]  # against the order of the cache: no two blocks make one copy
    pagedattn.swap_blocks(large.both, host, np.stack([np.array(large.used), places], axis=1))
    large.backend.synchronize()
    assert_same_bytes(host[places].view(large.small.dtype), large.small)
    pagedattn.swap_blocks(host, large.both, np.stack([places, np.array(large.used)[::-1]], axis=1))
    large.backend.synchronize()
    assert_same_bytes(large.now(), large.small[::-1])


def test_tokens_are_gathered_from_far_away(large: LargeCache, rng: np.random.Generator) -> None:
    backend = large.backend
    large.fill(rng)
    order = rng.permutation(len(large.used))
    seq_len = len(large.used) * BLOCK_SIZE - 3
    tables, lens = np.array(large.used, np.int32)[order][None], np.array([seq_len], np.int32)
    args = backend.arrays(tables, lens)
    kv_dtype = backend.kv_dtype(large.small.dtype)
    k, v = pagedattn.gather_kv(large.k, large.v, *args, total_tokens=seq_len, kv_dtype=kv_dtype)
    for actual, part in ((k, 0), (v, 1)):
        expected = large.small[order, part].reshape(-1, NUM_KV_HEADS, HEAD_DIM)[:seq_len]
        assert_same_bytes(backend.host(actual), expected)
