# SPDX-License-Identifier: Apache-2.0
"""Bugs that other managers of paged caches have had, each from end to end.

The rules that forbid them are tested one by one elsewhere; here each bug is tried as it was met.  Offsets beyond 32
bits have `test_large_cache` for themselves.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pagedattn
import pytest
import reference
from backends import NumpyBackend
from block_manager_helpers import add_computed, assert_unchanged
from pagedattn import BlockManager, InvalidArgumentError, OutOfBlocks, StepBatch

# --- blocks lost, doubled and mixed up -------------------------------------------------------------------------------


def test_a_sequence_named_twice_in_one_free_does_not_free_its_blocks_twice() -> None:
    m = BlockManager(8, 2)
    a, b = add_computed(m, range(4)), add_computed(m, range(50, 54))
    before = m.snapshot()
    for seqs in ([a, a], [b, a, b], [a, a + 100]):
        with pytest.raises(InvalidArgumentError):
            m.free(seqs)
        assert_unchanged(m, before)
    m.free([a, b])
    with pytest.raises(InvalidArgumentError, match="has been freed"):
        m.free(a)
    blocks = [int(block) for i in range(4) for block in m.block_table(add_computed(m, [90 + i] * 4))]
    assert sorted(blocks) == list(range(8)), "a block was handed out twice"


def test_what_a_fork_frees_behind_its_window_its_sibling_still_reads() -> None:
    m = BlockManager(12, 2, window=4, prefix_caching=False)
    a = add_computed(m, range(8))
    b = m.fork(a)[0]
    for token in range(6):
        m.step(a, 1, token_ids=[token])
        m.check()
    visible = [int(block) for block in m.block_table(b) if block >= 0]
    taken = [int(block) for block in m.block_table(add_computed(m, range(60, 66))) if block >= 0]
    assert not set(visible) & set(taken)
    m.free([a, b])
    m.check()


def test_free_blocks_are_never_too_scattered_to_be_used(rng: np.random.Generator) -> None:
    m = BlockManager(64, 4, prefix_caching=False)
    seqs = [add_computed(m, [i]) for i in range(64)]
    m.free([seqs[i] for i in rng.permutation(64)[:40]])
    assert len(m.block_table(add_computed(m, np.arange(160)))) == 40
    assert m.num_free_blocks == 0


# --- keys that meet --------------------------------------------------------------------------------------------------


def test_prompts_whose_hashes_all_collide_get_their_own_blocks() -> None:
    m = BlockManager(64, 2)
    m._weaken_hash(0)
    prompts = [[a, b, c, d, 9] for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)]
    for prompt in prompts:
        add_computed(m, prompt)
    heads = {tuple(p[:2]): int(m.block_table(seq)[0]) for p, seq in zip(prompts, m.seqs(), strict=True)}
    assert len(set(heads.values())) == 4
    m.check()


def test_hashes_differ_from_process_to_process_and_not_with_a_seed() -> None:
    def names(arguments: str) -> set[str]:
        code = f"import pagedattn as p; print(p.BlockManager(1, 4, {arguments}).block_hashes(range(8)).tolist())"
        run = [subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True) for _ in "ab"]
        return {done.stdout for done in run}

    assert len(names("")) == 2
    assert len(names("seed=7")) == 1


def test_an_adapter_and_a_salt_of_one_name_are_two_namespaces() -> None:
    m = BlockManager(16, 2)
    add_computed(m, range(6), extra_key=b"adapter:x")
    for key in (b"salt:x", b"x", b"", b"adapter:x\0"):
        assert m.match(range(6), extra_key=key) == 0
    assert m.match(range(6), extra_key=b"adapter:x") == 5


def test_a_tenant_cannot_see_by_hits_what_another_has_asked() -> None:
    m = BlockManager(16, 2)
    m.free(add_computed(m, range(6), extra_key=b"one tenant"))
    probe = m.add(range(6), extra_key=b"another")
    assert m.num_cached_tokens(probe) == 0
    assert m.match(range(6), extra_key=b"another") == 0


# --- waiting and overrunning -----------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit_does_not_wait_for_ever() -> None:
    m = BlockManager(4, 2)
    before = m.snapshot()
    with pytest.raises(InvalidArgumentError, match="9 tokens need 5 blocks of 2 tokens and there are 4"):
        m.add(range(9))
    assert_unchanged(m, before)
    seq = add_computed(m, range(8))
    with pytest.raises(InvalidArgumentError, match="9 tokens need 5 blocks"):
        m.step(seq, 1, token_ids=[1])


def test_an_exhausted_pool_says_so_and_stays_as_it_was() -> None:
    m = BlockManager(4, 2)
    add_computed(m, range(5))
    waiting = m.add(range(90, 94))
    before = m.snapshot()
    with pytest.raises(OutOfBlocks, match="2 blocks are needed and 1 are free") as caught:
        m.step(waiting, 4)
    assert (caught.value.needed, caught.value.free) == (2, 1)
    assert_unchanged(m, before)


def test_a_table_row_is_never_written_past_its_end() -> None:
    memory = np.full((3, 4), 77, np.int32)
    batch = StepBatch.from_arrays(memory[1:2], *(np.zeros(n, t) for n, t in ((1, "i4"), (2, "i4"), (32, "i8"))))
    m = BlockManager(16, 2)
    seq = m.add(range(9))
    m.step(seq, 8, batch)
    with pytest.raises(InvalidArgumentError, match="hold 5 blocks a sequence"):
        m.step(seq, 1, batch)
    assert (memory[[0, 2]] == 77).all()


# --- what the kernels are told ---------------------------------------------------------------------------------------


def test_nothing_reads_slots_that_were_never_written(backend: NumpyBackend, rng: np.random.Generator) -> None:
    caches = [np.full((8, 4, 2, 8), np.nan, np.float32) for _ in "kv"]
    m = BlockManager(8, 4)
    add_computed(m, range(50, 56))
    seqs = [m.add(range(6)), m.add(range(90, 99))]
    batch = m.step(seqs, [6, 9])
    q, k, v = (rng.standard_normal((15, 2, 8)).astype(np.float32) for _ in "qkv")
    k_cache, v_cache = (backend.array(cache) for cache in caches)
    tables, lens, starts, slots = backend.arrays(
        batch.block_tables, batch.seq_lens, batch.query_start_loc, batch.slot_mapping
    )
    pagedattn.reshape_and_cache(*backend.arrays(k, v), k_cache, v_cache, slots)
    out = pagedattn.paged_attention(backend.array(q), k_cache, v_cache, tables, lens, query_start_loc=starts)
    keys, values = backend.host(k_cache), backend.host(v_cache)
    expected, _ = reference.paged_attention(
        q, keys, values, batch.block_tables, batch.seq_lens, query_start_loc=batch.query_start_loc
    )
    assert np.isfinite(backend.host(out)).all()
    np.testing.assert_allclose(backend.host(out), expected, rtol=1e-4, atol=1e-5)


def test_more_copies_than_a_launch_has_thread_blocks(backend: NumpyBackend, rng: np.random.Generator) -> None:
    pairs = 70_000
    cache = rng.integers(0, 256, (2 * pairs, 1, 1, 8), np.uint8)
    mapping = np.stack([rng.permutation(pairs), pairs + rng.permutation(pairs)], axis=1)
    moved = backend.array(cache)
    pagedattn.copy_blocks([moved], backend.array(mapping))
    cache[mapping[:, 1]] = cache[mapping[:, 0]]
    np.testing.assert_array_equal(backend.host(moved), cache)


def test_every_head_of_many_is_written(backend: NumpyBackend, rng: np.random.Generator) -> None:
    # 128 heads of 256: far more elements a token than a thread block has threads.
    key, value = (rng.standard_normal((3, 128, 256)).astype(np.float16) for _ in "kv")
    k_cache, v_cache = (backend.array(np.zeros((2, 2, 128, 256), np.float16)) for _ in "kv")
    pagedattn.reshape_and_cache(*backend.arrays(key, value), k_cache, v_cache, backend.array(np.array([3, 0, 2])))
    for cache, written in ((k_cache, key), (v_cache, value)):
        np.testing.assert_array_equal(backend.host(cache).reshape(4, 128, 256)[[3, 0, 2]], written)


def test_the_scales_of_a_float8_cache_are_used_on_both_ways(backend: NumpyBackend, rng: np.random.Generator) -> None:
    key, value = (rng.standard_normal((4, 2, 8)).astype(np.float16) for _ in "kv")
    options = {"k_scale": 0.5, "v_scale": 0.03}
    storage = np.zeros((1, 4, 2, 8), np.uint8)
    k_cache, v_cache = (backend.array(storage) for _ in "kv")
    arrays = backend.arrays(key, value, np.arange(4), np.zeros((1, 1), np.int32), np.array([4], np.int32))
    options["kv_dtype"] = "float8_e4m3"
    pagedattn.reshape_and_cache(arrays[0], arrays[1], k_cache, v_cache, arrays[2], **options)
    q = np.zeros((1, 2, 8), np.float16)
    out = pagedattn.paged_attention(backend.array(q), k_cache, v_cache, arrays[3], arrays[4], **options)
    # A zero query attends to all keys alike.
    np.testing.assert_allclose(backend.host(out)[0], value.astype(np.float64).mean(axis=0), rtol=0.1, atol=0.05)
