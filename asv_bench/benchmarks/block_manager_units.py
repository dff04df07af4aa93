# SPDX-License-Identifier: Apache-2.0
"""What does the block manager cost a block, a sequence, a prompt?  These are the figures that it promises.

Each is the best of many repetitions of a call that does the work of many blocks or sequences, in the steady state: all
memory has been touched before.  `python asv_bench/compare_managers.py` prints them beside their aims and peers.
"""

from __future__ import annotations

import gc
from typing import ClassVar

import numpy as np
from pagedattn import BlockManager, StepBatch

from .unit_timing import BLOCK_SIZE, PROMPT, PROMPT_BLOCKS, best, prompts


def computed(manager: BlockManager, ids: np.ndarray) -> list[int]:
    """Sequences with these prompts, all computed."""
    seqs = [manager.add(row) for row in ids]
    manager.step(seqs, [manager.num_tokens(seq) - manager.num_computed_tokens(seq) for seq in seqs])
    return seqs


def allocate() -> float:
    """A block handed out, its table entry, 16 slots and 16 positions written."""
    manager = BlockManager(2048, BLOCK_SIZE, prefix_caching=False)
    seqs = np.array([manager.add(row) for row in prompts(16, 2048)])
    batch = StepBatch(16, 128, 16 * 2048)
    counts = np.full(16, 2048)
    return best(lambda _: manager.step(seqs, counts, batch), lambda: manager.preempt(seqs), 200) / 2048


def allocate_evicting() -> float:
    """The same where the block has to be taken from the prefix cache."""
    manager = BlockManager(16 * PROMPT_BLOCKS, BLOCK_SIZE)
    batch = StepBatch(16, PROMPT_BLOCKS, 16 * PROMPT)
    seed = 0

    def full_of_cached_blocks() -> np.ndarray:
        nonlocal seed
        seed += 1
        manager.free(manager.seqs())
        # What began before the cache was reset publishes nothing: its steps only take blocks.
        seqs = np.array([manager.add(row) for row in prompts(15, PROMPT, seed)])
        manager.step(seqs, 1)
        manager.reset_prefix_cache()
        for row in prompts(16, PROMPT - BLOCK_SIZE, seed):
            manager.free(computed(manager, row[None]))
        assert manager.num_cached_blocks == 16 * (PROMPT_BLOCKS - 1)
        return seqs

    def step(seqs: np.ndarray) -> None:
        manager.step(seqs, PROMPT - 1, batch)

    return best(step, full_of_cached_blocks) / (15 * (PROMPT_BLOCKS - 1))


def free() -> float:
    """A published block given back to the prefix cache."""
    manager = BlockManager(8192, BLOCK_SIZE)
    ids = prompts(128, 1024)
    return best(manager.free, lambda: computed(manager, ids)) / 8192


def hash_block() -> float:
    """A block of 16 tokens, chained."""
    manager = BlockManager(1, BLOCK_SIZE)
    (prompt,) = prompts(1, PROMPT)
    return best(lambda _: manager.block_hashes(prompt), lambda: None, 200) / PROMPT_BLOCKS


def look_up() -> float:
    """A cached prompt of 4096 tokens, its blocks side by side."""
    manager = BlockManager(2 * PROMPT_BLOCKS, BLOCK_SIZE)
    (prompt,) = prompts(1, PROMPT + 1)
    computed(manager, prompt[None])
    assert manager.match(prompt) == PROMPT
    return best(lambda _: manager.match(prompt), lambda: None, 500)


def look_up_fragmented() -> float:
    """The same, its blocks scattered over a pool, each computed in a step of its own beside those of others."""
    manager = BlockManager(64 * (PROMPT_BLOCKS + 1), BLOCK_SIZE)
    ids = prompts(64, PROMPT + 1)
    seqs = [manager.add(row) for row in ids]
    for _ in range(PROMPT_BLOCKS):
        manager.step(seqs, BLOCK_SIZE)
    assert np.diff(manager.block_table(seqs[0])).min() > 60
    assert manager.match(ids[0]) == PROMPT
    return best(lambda _: manager.match(ids[0]), lambda: None, 500)


def admit_miss() -> float:
    """A new prompt of 4096 tokens: added, its blocks allocated, hashed and published, all arrays written."""
    manager = BlockManager(16 * PROMPT_BLOCKS, BLOCK_SIZE)
    batch = StepBatch(1, PROMPT_BLOCKS, PROMPT)
    ids = prompts(16, PROMPT)

    def forget() -> None:
        manager.free(manager.seqs())
        manager.reset_prefix_cache()

    def admit(_: None) -> None:
        for row in ids:
            manager.step(manager.add(row), PROMPT, batch)

    return best(admit, forget) / len(ids)


def decode() -> float:
    """A sequence's part of a step of 1024: its token appended, its arrays written, a block hashed every 16 steps."""
    manager = BlockManager(1024 * 64, BLOCK_SIZE)
    seqs = np.array(computed(manager, prompts(1024, 120)))
    batch = StepBatch(1024, 64, 1024)
    sampled = np.arange(1024, dtype=np.int32)

    def steps(_: None) -> None:
        for _ in range(16):
            manager.step(seqs, 1, batch, token_ids=sampled)

    return best(steps, lambda: None) / 16 / 1024


def fork() -> float:
    """A copy of a sequence of 257 blocks."""
    manager = BlockManager(257, BLOCK_SIZE)
    (seq,) = computed(manager, prompts(1, 257 * BLOCK_SIZE))
    fork = manager.fork(seq)

    def free() -> None:
        nonlocal fork
        manager.free(fork)

    def call(_: None) -> None:
        nonlocal fork
        fork = manager.fork(seq)

    return best(call, free, 500)


def garbage_collection() -> float:
    """What 100 000 blocks in use add to a full collection."""
    before = best(lambda _: gc.collect(), lambda: None, 40)
    manager = BlockManager(100_000, BLOCK_SIZE)
    computed(manager, prompts(400, 250 * BLOCK_SIZE))
    assert manager.usage == 1
    return max(0.0, best(lambda _: gc.collect(), lambda: None, 40) - before)


UNITS = {
    "allocate, a block": (allocate, 10e-9),
    "allocate while evicting, a block": (allocate_evicting, 30e-9),
    "free, a block": (free, 10e-9),
    "hash, a block": (hash_block, 30e-9),
    "look up 4096 cached tokens": (look_up, 8e-6),
    "look them up, fragmented": (look_up_fragmented, 8e-6),
    "admit 4096 new tokens": (admit_miss, 12e-6),
    "decode, a sequence of 1024": (decode, 40e-9),
    "fork 257 blocks": (fork, 1e-6),
    "full collection at 100 000 blocks": (garbage_collection, 1e-3),
}


class Unit:
    """The best of many repetitions, divided by what they did."""

    params: ClassVar = [list(UNITS)]
    param_names: ClassVar = ["unit"]
    timeout = 120

    def track_seconds(self, unit: str) -> float:
        return UNITS[unit][0]()

    track_seconds.unit = "seconds"  # type: ignore[attr-defined]
