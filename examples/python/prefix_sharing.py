"""Prefix sharing: requests with the same system prompt share its blocks, and a fork copies only what it changes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pagedattn

NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM = 64, 16, 2, 64


def key_of(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return keys that depend on the tokens alone, so that equal prefixes have equal keys."""
    phases = np.arange(NUM_KV_HEADS * HEAD_DIM).reshape(NUM_KV_HEADS, HEAD_DIM)
    keys: npt.NDArray[np.float32] = np.sin(tokens[:, None, None] * 0.1 + phases).astype(np.float32)
    return keys


def main() -> None:
    """Prefill two requests that share a prompt, then fork one of them."""
    k_cache = np.zeros((NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), np.float32)
    v_cache = np.zeros_like(k_cache)
    manager = pagedattn.BlockManager(NUM_BLOCKS, BLOCK_SIZE)
    rng = np.random.default_rng()
    system_prompt = rng.integers(0, 32_000, 64)

    seqs = []
    for question_length in (10, 21):
        tokens = np.concatenate([system_prompt, rng.integers(0, 32_000, question_length)])
        seq = manager.add(tokens)
        num_cached = manager.num_cached_tokens(seq)
        batch = manager.step([seq], [len(tokens) - num_cached])
        key = key_of(tokens[num_cached:])
        pagedattn.copy_blocks([k_cache, v_cache], batch.copies)
        pagedattn.reshape_and_cache(key, -key, k_cache, v_cache, batch.slot_mapping)
        print(f"a prompt of {len(tokens)} tokens: {num_cached} found cached, {len(tokens) - num_cached} computed")

        # The cache holds what a computation of the whole prompt would have written.
        keys, values = pagedattn.gather_kv(k_cache, v_cache, batch.block_tables, batch.seq_lens)
        np.testing.assert_array_equal(keys, key_of(tokens))
        np.testing.assert_array_equal(values, -key_of(tokens))
        seqs.append(seq)

    free_before = manager.num_free_blocks
    samples = [seqs[1], *manager.fork(seqs[1], 2)]
    print(f"two forks took {free_before - manager.num_free_blocks} blocks")

    # Each sample goes its own way: the first write to the shared last block copies it.
    manager.append(samples, np.array([1, 2, 3]))
    batch = manager.step(samples, [1, 1, 1])
    pagedattn.copy_blocks([k_cache, v_cache], batch.copies)
    new_keys = key_of(np.array([1, 2, 3]))
    pagedattn.reshape_and_cache(new_keys, -new_keys, k_cache, v_cache, batch.slot_mapping)
    keys, _ = pagedattn.gather_kv(k_cache, v_cache, batch.block_tables, batch.seq_lens)
    length = int(batch.seq_lens[0])
    for i in range(3):
        expected = key_of(np.concatenate([tokens, [i + 1]]))
        np.testing.assert_array_equal(keys[i * length : (i + 1) * length], expected)
    print(f"one token each copied {len(batch.copies)} blocks: correct")
    manager.free(samples)
    manager.free(seqs[:1])


if __name__ == "__main__":
    main()
