# SPDX-License-Identifier: Apache-2.0
"""What does the block manager cost: a batch of prompts, a prompt, a step, a fork?

Every timed call meets a manager that was made for it, and leaves one whose invariants hold.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pagedattn

BLOCK_SIZE = 16
PROMPT = 4096  # tokens
PROMPT_BLOCKS = PROMPT // BLOCK_SIZE


def prompts(count: int, tokens: int = PROMPT, seed: int = 0) -> np.ndarray:
    """Token ids ``[count, tokens]``; no two rows begin alike."""
    ids = np.random.default_rng(seed).integers(0, 32_000, (count, tokens), np.int32)
    ids[:, 0] = seed * count + np.arange(count)
    return ids


class OneCall:
    """A call changes the manager: one call a sample, each after a setup of its own, and no other before it."""

    number = 1
    repeat = 12
    warmup_time = 0.0
    manager: pagedattn.BlockManager

    def teardown(self, *params: object) -> None:
        self.manager.check()


class Allocate(OneCall):
    """64 prompts of 1024 tokens get their 4096 blocks in one step."""

    def setup(self) -> None:
        self.manager = pagedattn.BlockManager(4096, BLOCK_SIZE)
        self.seqs = [self.manager.add(row) for row in prompts(64, 1024)]

    def time_step(self) -> None:
        self.manager.step(self.seqs, [1024] * 64)


class Free(OneCall):
    """128 sequences of 1024 tokens give 8192 blocks back, to the cache of prefixes or not."""

    params: ClassVar = [[True, False]]
    param_names: ClassVar = ["prefix_caching"]

    def setup(self, prefix_caching: bool) -> None:
        self.manager = pagedattn.BlockManager(8192, BLOCK_SIZE, prefix_caching=prefix_caching)
        self.seqs = [self.manager.add(row) for row in prompts(128, 1024)]
        self.manager.step(self.seqs, [1024] * 128)

    def time_free(self, prefix_caching: bool) -> None:
        self.manager.free(self.seqs)


class Admit(OneCall):
    """16 prompts of 4096 tokens, one by one: all of each is new, or all is cached but its last token or block."""

    params: ClassVar = [["miss", "hit"]]
    param_names: ClassVar = ["prefix"]

    def setup(self, prefix: str) -> None:
        self.manager = pagedattn.BlockManager(2 * 16 * PROMPT_BLOCKS, BLOCK_SIZE)
        cached = prompts(16)
        seqs = [self.manager.add(row) for row in cached]
        self.manager.step(seqs, [PROMPT] * 16)
        self.manager.free(seqs)
        self.prompts = cached if prefix == "hit" else prompts(16, seed=1)
        self.least = PROMPT - BLOCK_SIZE if prefix == "hit" else 0

    def time_add_and_step(self, prefix: str) -> None:
        found = []
        for prompt in self.prompts:
            seq = self.manager.add(prompt)
            found.append(self.manager.num_cached_tokens(seq))
            self.manager.step([seq], [PROMPT - found[-1]])
        assert min(found) >= self.least


class Match:
    """How much of a prompt of 4096 tokens is cached: all of it."""

    def setup(self) -> None:
        self.manager = pagedattn.BlockManager(PROMPT_BLOCKS, BLOCK_SIZE)
        (self.prompt,) = prompts(1)
        seq = self.manager.add(self.prompt)
        self.manager.step([seq], [PROMPT])
        self.manager.check()
        assert self.manager.match(self.prompt) >= PROMPT - BLOCK_SIZE

    def time_16_matches(self) -> None:
        for _ in range(16):
            self.manager.match(self.prompt)


class DecodeSteps(OneCall):
    """16 steps of one token for every sequence of a batch."""

    params: ClassVar = [[256, 1024]]
    param_names: ClassVar = ["sequences"]

    def setup(self, num_seqs: int) -> None:
        self.manager = pagedattn.BlockManager(num_seqs * 9, BLOCK_SIZE)
        self.seqs = [self.manager.add(row) for row in prompts(num_seqs, 120)]
        self.manager.step(self.seqs, [120] * num_seqs)
        self.tokens = np.arange(num_seqs, dtype=np.int32)
        self.ones = [1] * num_seqs

    def time_16_steps(self, num_seqs: int) -> None:
        for _ in range(16):
            self.manager.append(self.seqs, self.tokens)
            self.manager.step(self.seqs, self.ones)


class Fork(OneCall):
    """Eight samples of each of 16 sequences, the copies that their first tokens ask for, and their end."""

    def setup(self) -> None:
        self.manager = pagedattn.BlockManager(16 * 128, BLOCK_SIZE)
        self.seqs = [self.manager.add(row) for row in prompts(16, 1000)]  # the last block is half full, thus copied
        self.manager.step(self.seqs, [1000] * 16)

    def time_fork_step_free(self) -> None:
        forks = [fork for seq in self.seqs for fork in self.manager.fork(seq, 8)]
        self.manager.append(forks, [7] * len(forks))
        self.manager.step(forks, [1] * len(forks))
        self.manager.free(forks)


class Evict(OneCall):
    """A new prompt takes 256 blocks from a full cache, 16 times."""

    def setup(self) -> None:
        self.manager = pagedattn.BlockManager(16 * PROMPT_BLOCKS, BLOCK_SIZE)
        seqs = [self.manager.add(row) for row in prompts(16)]
        self.manager.step(seqs, [PROMPT] * 16)
        self.manager.free(seqs)
        assert self.manager.num_cached_blocks == 16 * PROMPT_BLOCKS
        self.new = [self.manager.add(row) for row in prompts(16, seed=1)]

    def time_step(self) -> None:
        self.manager.step(self.new, [PROMPT] * 16)
