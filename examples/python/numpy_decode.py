"""Decode on the CPU: two prompts enter a paged cache, then grow by one token a step.

SPDX-License-Identifier: Apache-2.0

The "model" here draws random vectors; what it shows is the loop around the kernels.  At the end the last step is
computed once more from contiguous keys and values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pagedattn

NUM_BLOCKS, BLOCK_SIZE, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 16, 8, 2, 64
FloatArray = npt.NDArray[np.float32]


def dense_attention(q: FloatArray, k: FloatArray, v: FloatArray) -> npt.NDArray[np.float64]:
    """Return the attention of one query token [Hq, D] over contiguous keys and values [L, Hkv, D]."""
    group = NUM_Q_HEADS // NUM_KV_HEADS
    keys, values = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("hd,lhd->hl", q, keys) / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    out: npt.NDArray[np.float64] = np.einsum("hl,lhd->hd", weights, values)
    return out


def main() -> None:
    """Run the loop and check its last step."""
    rng = np.random.default_rng()
    k_cache = np.zeros((NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), np.float32)
    v_cache = np.zeros_like(k_cache)
    manager = pagedattn.BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    prompts = [rng.integers(0, 32_000, length) for length in (40, 9)]
    seqs = [manager.add(prompt) for prompt in prompts]

    num_new = [len(prompt) for prompt in prompts]
    for _step in range(12):
        # The first step is the prefill of both prompts, each further one a decode of one token a sequence.
        batch = manager.step(seqs, num_new)
        num_tokens = sum(num_new)
        key, value = rng.standard_normal((2, num_tokens, NUM_KV_HEADS, HEAD_DIM), np.float32)
        q = rng.standard_normal((num_tokens, NUM_Q_HEADS, HEAD_DIM), np.float32)
        pagedattn.copy_blocks([k_cache, v_cache], batch.copies)  # shared blocks that this step writes to
        pagedattn.reshape_and_cache(key, value, k_cache, v_cache, batch.slot_mapping)
        out = pagedattn.paged_attention(
            q, k_cache, v_cache, batch.block_tables, batch.seq_lens, query_start_loc=batch.query_start_loc
        )
        manager.append(seqs, rng.integers(0, 32_000, len(seqs)))  # what was sampled
        num_new = [1] * len(seqs)

    keys, values = pagedattn.gather_kv(k_cache, v_cache, batch.block_tables, batch.seq_lens)
    starts = np.concatenate([[0], np.cumsum(batch.seq_lens)])
    for i in range(len(seqs)):
        rows = slice(starts[i], starts[i + 1])
        np.testing.assert_allclose(out[i], dense_attention(q[i], keys[rows], values[rows]), rtol=1e-4, atol=1e-5)
    print(f"lengths {batch.seq_lens.tolist()}, {manager.num_free_blocks} of {NUM_BLOCKS} blocks free: correct")


if __name__ == "__main__":
    main()
