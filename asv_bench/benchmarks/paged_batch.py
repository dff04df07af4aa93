"""A ragged batch over a paged cache with shuffled blocks, the input of the attention and cache benchmarks.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pagedattn

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class PagedBatch:
    """Arrays of one call: `seq_lens` tokens a sequence, the last `num_new` of them being query tokens."""

    def __init__(
        self,
        seq_lens: list[int],
        num_new: list[int],
        dtype: str = "float32",
        *,
        num_q_heads: int = 32,
        num_kv_heads: int = 8,
        head_dim: int = 128,
        block_size: int = 16,
    ) -> None:
        rng = np.random.default_rng(0)
        blocks_of = [-(-length // block_size) for length in seq_lens]
        num_blocks, num_tokens = sum(blocks_of), sum(num_new)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])

        self.k_cache = normal(num_blocks, block_size, num_kv_heads, head_dim)
        self.v_cache = normal(num_blocks, block_size, num_kv_heads, head_dim)
        self.q = normal(num_tokens, num_q_heads, head_dim)
        self.key = normal(num_tokens, num_kv_heads, head_dim)
        self.value = normal(num_tokens, num_kv_heads, head_dim)
        self.out = np.empty_like(self.q)
        self.seq_lens = np.array(seq_lens, np.int32)
        self.query_start_loc = np.concatenate([[0], np.cumsum(num_new)]).astype(np.int32)
        self.block_tables = np.full((len(seq_lens), max(blocks_of)), -1, np.int32)
        self.slot_mapping = np.empty(num_tokens, np.int64)
        ids = np.split(rng.permutation(num_blocks).astype(np.int32), np.cumsum(blocks_of)[:-1])
        for i, blocks in enumerate(ids):
            self.block_tables[i, : len(blocks)] = blocks
            positions = np.arange(seq_lens[i] - num_new[i], seq_lens[i])
            slots = blocks[positions // block_size].astype(np.int64) * block_size + positions % block_size
            self.slot_mapping[self.query_start_loc[i] : self.query_start_loc[i + 1]] = slots

    def attend(self) -> None:
        """Run the attention of the batch."""
        pagedattn.paged_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.block_tables,
            self.seq_lens,
            query_start_loc=self.query_start_loc,
            out=self.out,
        )
