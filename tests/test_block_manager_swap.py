# SPDX-License-Identifier: Apache-2.0
"""Preemption: sequences go to the host and come back, or are computed again."""

from __future__ import annotations

import numpy as np
import pagedattn
import pytest
from backends import NumpyBackend
from block_manager_helpers import add_computed, assert_unchanged
from pagedattn import BlockManager, OutOfBlocks
from pagedattn._errors import InvalidArgumentError

# --- swap and preemption ----------------------------------------------------------------------------------------------


def test_swapping_moves_each_shared_block_once_and_brings_it_back_shared() -> None:
    m = BlockManager(8, 4, num_host_blocks=4, prefix_caching=False)
    a = add_computed(m, range(6))
    b = m.fork(a)[0]
    device = m.block_table(a).tolist()
    out = m.swap_out([a, b])
    assert out.dtype == np.int64
    assert out[:, 0].tolist() == device
    assert m.block_table(a).tolist() == m.block_table(b).tolist() == out[:, 1].tolist()
    assert (m.num_free_blocks, m.num_free_host_blocks, m.is_swapped(a)) == (8, 2, True)
    back = m.swap_in([a, b])
    assert back[:, 0].tolist() == out[:, 1].tolist()
    assert m.block_table(a).tolist() == m.block_table(b).tolist() == back[:, 1].tolist()
    assert [m.ref_count(block) for block in m.block_table(a)] == [2, 2]
    assert (m.num_free_host_blocks, m.is_swapped(a)) == (4, False)


def test_a_block_that_somebody_keeps_stays_while_its_copy_goes_to_the_host() -> None:
    m = BlockManager(8, 4, num_host_blocks=4, prefix_caching=False)
    a = add_computed(m, range(6))
    b = m.fork(a)[0]
    m.swap_out(a)
    assert [m.ref_count(block) for block in m.block_table(b)] == [1, 1]


def test_swap_in_takes_from_the_cache_what_is_still_there() -> None:
    m = BlockManager(4, 4, num_host_blocks=4)
    a = add_computed(m, range(10))
    blocks = m.block_table(a).tolist()
    m.swap_out(a)
    assert m.swap_in(a)[:, 0].tolist() == [2], "only the partly filled block has to come back"
    assert m.block_table(a)[:2].tolist() == blocks[:2]


def test_what_comes_back_from_the_host_is_published_again() -> None:
    m = BlockManager(4, 4, num_host_blocks=4)
    a = add_computed(m, range(10))
    m.swap_out(a)
    m.free(add_computed(m, range(50, 66)))
    assert m.match(range(10)) == 0
    assert len(m.swap_in(a)) == 3
    assert m.match(range(10)) == 8


def test_swapping_without_room_changes_nothing() -> None:
    m = BlockManager(4, 4, num_host_blocks=2)
    a = add_computed(m, range(10))
    before = m.snapshot()
    with pytest.raises(OutOfBlocks) as caught:
        m.swap_out(a)
    assert (caught.value.needed, caught.value.free) == (3, 2)
    assert_unchanged(m, before)
    m.truncate(a, 8)
    m.swap_out(a)
    b = add_computed(m, range(50, 66))
    before = m.snapshot()
    with pytest.raises(OutOfBlocks) as caught:
        m.swap_in(a)
    assert (caught.value.needed, caught.value.free) == (2, 0)
    assert_unchanged(m, before)
    m.free(b)
    m.swap_in(a)


def test_a_swapped_sequence_can_grow_shrink_fork_and_go_but_not_step() -> None:
    m = BlockManager(8, 4, num_host_blocks=4)
    a = add_computed(m, range(6))
    m.swap_out(a)
    m.append(a, [1, 2])
    for call in (lambda: m.step(a, 1), lambda: m.swap_out(a), lambda: m.take_prefix(a)):
        with pytest.raises(InvalidArgumentError, match="swapped out"):
            call()
    b = m.fork(a)[0]
    m.truncate(b, 3)
    assert len(m.block_table(b)) == 1
    m.free(b)
    m.check()
    m.swap_in(a)
    assert m.step(a, 2).positions.tolist() == [6, 7]
    with pytest.raises(InvalidArgumentError, match="on the device"):
        m.swap_in(a)


def test_preemption_gives_all_blocks_back_and_keeps_the_tokens() -> None:
    m = BlockManager(8, 4, num_host_blocks=4)
    a = add_computed(m, range(10))
    b = add_computed(m, range(100, 106))
    m.swap_out(b)
    m.preempt([a, b])
    assert (m.num_free_blocks, m.num_free_host_blocks) == (8, 4)
    assert (m.num_tokens(a), m.num_computed_tokens(a), m.num_cached_tokens(a)) == (10, 0, 0)
    assert not m.is_swapped(b)
    assert m.take_prefix(a) == 8
    assert m.step([a, b], [2, 6]).seq_lens.tolist() == [10, 6]


def test_the_mappings_go_straight_into_swap_blocks(backend: NumpyBackend, rng: np.random.Generator) -> None:
    m = BlockManager(6, 4, num_host_blocks=6, prefix_caching=False)
    device = [backend.array(np.zeros((6, 4, 2, 8), np.float16)) for _ in "kv"]
    host = [np.zeros((6, 4, 2, 8), np.float16) for _ in "kv"]

    def compute(seq: int, count: int) -> list[np.ndarray]:
        batch = m.step(seq, count)
        new = [rng.standard_normal((count, 2, 8)).astype(np.float16) for _ in "kv"]
        pagedattn.copy_blocks(device, backend.array(batch.copies))
        pagedattn.reshape_and_cache(*backend.arrays(*new), *device, backend.array(batch.slot_mapping))
        return new

    def move(sources: list[object], destinations: list[object], mapping: np.ndarray) -> None:
        for source, destination in zip(sources, destinations, strict=True):
            pagedattn.swap_blocks(source, destination, mapping)
        backend.synchronize()

    seq = m.add(range(10))
    written = compute(seq, 10)
    fork = m.fork(seq)[0]
    move(device, host, m.swap_out([seq, fork]))
    other = m.add(range(50, 74))
    compute(other, 24)  # all six blocks are overwritten
    m.free(other)
    move(host, device, m.swap_in([fork, seq]))
    m.append(fork, 7)
    grown = compute(fork, 1)
    for cache, old, new in zip(device, written, grown, strict=True):
        slots = backend.host(cache).reshape(24, 2, 8)
        for sequence, expected in ((seq, old), (fork, np.concatenate([old, new]))):
            table = np.repeat(m.block_table(sequence) * 4, 4) + np.tile(np.arange(4), len(m.block_table(sequence)))
            np.testing.assert_array_equal(slots[table[: len(expected)]], expected)
