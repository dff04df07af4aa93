"""What does the block manager cost a step, a prompt and a fork?

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pagedattn


class DecodeSteps:
    """64 steps of one token for every sequence of a batch."""

    params: ClassVar = [16, 256]
    param_names: ClassVar = ["sequences"]

    def setup(self, num_seqs: int) -> None:
        rng = np.random.default_rng(0)
        self.manager = pagedattn.BlockManager(num_seqs * 64, 16)
        self.seqs = [self.manager.add(rng.integers(0, 32_000, 512)) for _ in range(num_seqs)]
        self.manager.step(self.seqs, [512] * num_seqs)
        self.tokens = rng.integers(0, 32_000, num_seqs)
        self.ones = [1] * num_seqs

    def time_64_steps(self, num_seqs: int) -> None:
        for _ in range(64):
            self.manager.append(self.seqs, self.tokens)
            self.manager.step(self.seqs, self.ones)

    time_64_steps.number = 1
    time_64_steps.warmup_time = 0


class Prompts:
    """A prompt of 4096 tokens, with and without its prefix in the cache."""

    def setup(self) -> None:
        rng = np.random.default_rng(0)
        self.rng = rng
        self.manager = pagedattn.BlockManager(1024, 16)
        self.cached_prompt = rng.integers(0, 32_000, 4096)
        self.run(self.cached_prompt)
        self.fresh_prompt = rng.integers(0, 32_000, 4096)

    def run(self, prompt: np.ndarray) -> None:
        seq = self.manager.add(prompt)
        self.manager.step([seq], [len(prompt) - self.manager.num_cached_tokens(seq)])
        self.manager.free([seq])

    def time_hit(self) -> None:
        self.run(self.cached_prompt)

    def time_miss(self) -> None:
        self.fresh_prompt[0] += 1
        self.run(self.fresh_prompt)

    def time_look_up(self) -> None:
        self.manager.match(self.cached_prompt)


class Fork:
    """Eight samples of a sequence of 4096 tokens, and their end."""

    def setup(self) -> None:
        self.manager = pagedattn.BlockManager(1024, 16)
        self.seq = self.manager.add(np.arange(4096))
        self.manager.step([self.seq], [4096])

    def time_fork_and_free(self) -> None:
        self.manager.free(self.manager.fork(self.seq, 8))
