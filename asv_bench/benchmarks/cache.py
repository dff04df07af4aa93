"""How fast do tokens and blocks move into, within and out of the cache on the CPU?

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np
import pagedattn

from .paged_batch import PagedBatch


class CacheOperations:
    """2048 tokens in 128 blocks of bfloat16."""

    def setup(self) -> None:
        self.batch = PagedBatch([512] * 4, [512] * 4, "bfloat16")
        half = len(self.batch.k_cache) // 2
        order = np.random.default_rng(0).permutation(2 * half)
        self.mapping = np.stack([order[:half], order[half:]], axis=1)
        self.host = [np.empty_like(self.batch.k_cache), np.empty_like(self.batch.v_cache)]

    def time_reshape_and_cache(self) -> None:
        b = self.batch
        pagedattn.reshape_and_cache(b.key, b.value, b.k_cache, b.v_cache, b.slot_mapping)

    def time_copy_blocks(self) -> None:
        pagedattn.copy_blocks([self.batch.k_cache, self.batch.v_cache], self.mapping)

    def time_swap_blocks(self) -> None:
        pagedattn.swap_blocks([self.batch.k_cache, self.batch.v_cache], self.host, self.mapping)

    def time_gather_kv(self) -> None:
        b = self.batch
        pagedattn.gather_kv(b.k_cache, b.v_cache, b.block_tables, b.seq_lens)


class MergeStates:
    """Two parts of 1024 tokens and 32 heads."""

    def setup(self) -> None:
        rng = np.random.default_rng(0)
        self.outs = rng.standard_normal((2, 1024, 32, 128), np.float32)
        self.lses = rng.standard_normal((2, 1024, 32), np.float32)

    def time_merge_states(self) -> None:
        pagedattn.merge_states(self.outs, self.lses)
