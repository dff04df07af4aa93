# SPDX-License-Identifier: Apache-2.0
"""What SGLang's prefix trees do, for `sglang_python` and `sglang_rust`: prompts are looked up and inserted."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from benchmarks.unit_timing import BLOCK_SIZE, PROMPT, PROMPT_BLOCKS, best, prompts
from sglang.srt.mem_cache.radix_cache import RadixKey

VERSION = f"SGLang {version('sglang')}"

Tree = Any
Insert = Callable[[Tree, RadixKey, torch.Tensor], object]
Match = Callable[[Tree, RadixKey], int]


def keys(count: int, tokens: int, seed: int = 0) -> list[RadixKey]:
    return [RadixKey(array("q", row.tolist())) for row in prompts(count, tokens, seed)]


def units(tree: Callable[[], Tree], insert: Insert, match: Match) -> dict[str, Callable[[], float]]:
    """What the tree does.  Its slots are made beforehand."""
    slots = torch.arange(PROMPT, dtype=torch.int64)

    def look_up() -> float:
        cache = tree()
        (key,) = keys(1, PROMPT)
        insert(cache, key, slots)
        assert match(cache, key) == PROMPT
        return best(lambda _: match(cache, key), lambda: None, 100)

    def look_up_fragmented() -> float:
        """Every block is a node of its own, since another prompt goes another way behind each."""
        cache = tree()
        (key,) = keys(1, PROMPT)
        ids = key.token_ids
        for block in range(PROMPT_BLOCKS):
            other = array("q", [31_999 - token for token in ids[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]])
            branch = ids[: block * BLOCK_SIZE] + other
            insert(cache, RadixKey(branch), slots[: len(branch)])
        insert(cache, key, slots)
        assert match(cache, key) == PROMPT
        return best(lambda _: match(cache, key), lambda: None, 50)

    def admit_miss() -> float:
        """The insertion alone."""
        new = keys(16, PROMPT)

        def admit(cache: Tree) -> None:
            for key in new:
                insert(cache, key, slots)

        return best(admit, tree, 20) / len(new)

    def garbage_collection() -> float:
        before = best(lambda _: gc.collect(), lambda: None, 20)
        cache = tree()
        pool = torch.arange(400 * 250 * BLOCK_SIZE, dtype=torch.int64).view(400, -1)
        for key, row in zip(keys(400, 250 * BLOCK_SIZE), pool, strict=True):
            insert(cache, key, row)
        return max(0.0, best(lambda _: gc.collect(), lambda: None, 20) - before)

    return {
        "look up 4096 cached tokens": look_up,
        "look them up, fragmented": look_up_fragmented,
        "admit 4096 new tokens": admit_miss,
        "full collection at 100 000 blocks": garbage_collection,
    }
