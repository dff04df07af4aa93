# SPDX-License-Identifier: Apache-2.0
"""What SGLang's radix tree in Python and its allocator of pages cost, in the units of `block_manager_units`.

An eviction frees whole nodes, prompts of 4096 tokens here: the case that suits it best.  Of a decode step the
allocator's part is timed.
"""

from __future__ import annotations

import torch
from benchmarks.unit_timing import BLOCK_SIZE, PROMPT, PROMPT_BLOCKS, best
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from .sglang_tree import VERSION, keys, units

TITLE = "SGLang, Python"
__all__ = ["TITLE", "UNITS", "VERSION"]


def tree(allocator: PagedTokenToKVPoolAllocator | None = None) -> RadixCache:
    return RadixCache.create_simulated(mock_allocator=allocator, page_size=BLOCK_SIZE)


def insert(cache: RadixCache, key: RadixKey, slots: torch.Tensor) -> None:
    cache.insert(InsertParams(key=key, value=slots))


def match(cache: RadixCache, key: RadixKey) -> int:
    return int(cache.match_prefix(MatchPrefixParams(key=key)).device_prefix_len)


def pages(num_blocks: int) -> PagedTokenToKVPoolAllocator:
    return PagedTokenToKVPoolAllocator(num_blocks * BLOCK_SIZE, BLOCK_SIZE, torch.float16, "cpu", None, need_sort=False)


def allocate() -> float:
    pool = pages(2048)
    held: list[torch.Tensor] = []

    def free() -> None:
        while held:
            pool.free(held.pop())

    return best(lambda _: held.append(pool.alloc(2048 * BLOCK_SIZE)), free, 100) / 2048


def allocate_evicting() -> float:
    pool = pages(16 * PROMPT_BLOCKS)
    cache = tree(pool)
    seed = 0
    held: list[torch.Tensor] = []

    def full_of_cached_blocks() -> None:
        nonlocal seed
        seed += 1
        while held:
            pool.free(held.pop())
        for key in keys(16, PROMPT, seed):
            insert(cache, key, pool.alloc(PROMPT))
        assert pool.available_size() == 0

    def call(_: None) -> None:
        for _ in range(16):
            cache.evict(EvictParams(num_tokens=PROMPT))
            held.append(pool.alloc(PROMPT))

    return best(call, full_of_cached_blocks, 10) / (16 * PROMPT_BLOCKS)


def free() -> float:
    pool = pages(8192)
    return best(pool.free, lambda: pool.alloc(8192 * BLOCK_SIZE), 30) / 8192


def decode() -> float:
    pool = pages(1024 * 64)
    last = pool.alloc(1024 * BLOCK_SIZE * 8).view(1024, -1)[:, -1].clone()
    lengths = torch.full((1024,), 8 * BLOCK_SIZE, dtype=torch.int64)

    def steps(_: None) -> None:
        nonlocal last, lengths
        for _ in range(16):
            lengths = lengths + 1
            last = pool.alloc_decode(lengths, lengths, last)

    return best(steps, lambda: None, 20) / 16 / 1024


UNITS = {
    "allocate, a block": allocate,
    "allocate while evicting, a block": allocate_evicting,
    "free, a block": free,
    "decode, a sequence of 1024": decode,
    **units(tree, insert, match),
}
