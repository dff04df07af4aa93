# SPDX-License-Identifier: Apache-2.0
"""The rules of the block manager, one by one: blocks on demand, forks, truncation, windows, admission."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from block_manager_helpers import add_computed, assert_unchanged, compute_all
from pagedattn import BlockManager, OutOfBlocks
from pagedattn._block_manager import StepBatch
from pagedattn._errors import InvalidArgumentError

# --- blocks on demand -------------------------------------------------------------------------------------------------


def test_a_prompt_takes_as_many_blocks_as_it_fills() -> None:
    m = BlockManager(8, 4)
    seq = m.add(range(9))
    assert m.num_free_blocks == 8
    batch = m.step([seq], [9])
    assert len(m.block_table(seq)) == 3
    assert m.num_free_blocks == 5
    assert m.usage == 3 / 8
    np.testing.assert_array_equal(batch.block_tables, m.block_table(seq)[None])
    assert batch.seq_lens.tolist() == [9]
    assert batch.query_start_loc.tolist() == [0, 9]
    assert batch.positions.tolist() == list(range(9))
    table = m.block_table(seq)
    assert batch.slot_mapping.tolist() == [table[i // 4] * 4 + i % 4 for i in range(9)]
    assert batch.copies.shape == (0, 2)


def test_a_batch_has_the_dtypes_and_shapes_that_the_kernels_take() -> None:
    m = BlockManager(16, 4)
    seqs = [m.add(range(n)) for n in (3, 9, 1)]
    batch = m.step(seqs, [3, 5, 1])
    assert batch.block_tables.dtype == batch.seq_lens.dtype == batch.query_start_loc.dtype == np.int32
    assert batch.slot_mapping.dtype == batch.positions.dtype == batch.copies.dtype == np.int64
    assert batch.block_tables.shape == (3, 2)
    assert batch.seq_lens.tolist() == [3, 5, 1]
    assert batch.query_start_loc.tolist() == [0, 3, 8, 9]
    assert (batch.num_seqs, batch.num_tokens) == (3, 9)


def test_a_prompt_may_be_computed_in_chunks() -> None:
    m = BlockManager(8, 4)
    seq = m.add(range(10))
    for count, blocks in ((3, 1), (1, 1), (1, 2), (5, 3)):
        start = m.num_computed_tokens(seq)
        batch = m.step([seq], [count])
        assert batch.positions.tolist() == list(range(start, start + count))
        assert len(m.block_table(seq)) == blocks


def test_given_back_blocks_are_used_at_once() -> None:
    m = BlockManager(8, 4, prefix_caching=False)
    first = add_computed(m, range(8))
    blocks = set(m.block_table(first).tolist())
    m.free(first)
    assert set(m.block_table(add_computed(m, range(8))).tolist()) == blocks


def test_slots_do_not_overflow_32_bits() -> None:
    m = BlockManager(4, 2**30, prefix_caching=False)
    seqs = [m.add([1]) for _ in range(3)]
    assert m.step(seqs, 1).slot_mapping.tolist() == [0, 2**30, 2**31]


@pytest.mark.parametrize("kind", [list, tuple, lambda t: range(len(t)), lambda t: np.array(t, np.int32),
                                  lambda t: np.array(t, np.uint8), lambda t: np.array(t, np.uint64),
                                  lambda t: np.array(t)[::1], lambda t: np.repeat(t, 2)[::2],
                                  lambda t: [np.int64(x) for x in t]])  # fmt: skip
def test_tokens_may_be_any_integers(kind: Callable[[list[int]], object]) -> None:
    m = BlockManager(8, 4)
    assert m.token_ids(m.add(kind([0, 1, 2, 3, 4]))).tolist() == [0, 1, 2, 3, 4]


def test_a_step_appends_what_was_sampled() -> None:
    m = BlockManager(16, 4)
    a, b = add_computed(m, range(4)), add_computed(m, range(7))
    batch = m.step([a, b], 1, token_ids=np.array([10, 11], np.int32))
    assert m.token_ids(a).tolist() == [*range(4), 10]
    assert m.token_ids(b).tolist() == [*range(7), 11]
    assert batch.positions.tolist() == [4, 7]
    assert m.match([*range(7), 11, 0]) == 8


def test_a_step_appends_nothing_to_who_sampled_nothing() -> None:
    m = BlockManager(16, 4)
    decoding, prefilling = add_computed(m, range(4)), m.add(range(50, 60))
    batch = m.step([decoding, prefilling], [1, 6], token_ids=[7, -1])
    assert (m.num_tokens(decoding), m.num_tokens(prefilling)) == (5, 10)
    assert batch.query_start_loc.tolist() == [0, 1, 7]


def test_a_step_that_finds_no_blocks_appends_nothing() -> None:
    m = BlockManager(2, 4)
    a, b = add_computed(m, range(4)), add_computed(m, range(50, 53))
    before = m.snapshot()
    with pytest.raises(OutOfBlocks):
        m.step([b, a], 1, token_ids=[1, 2])
    assert_unchanged(m, before)


# --- forks ------------------------------------------------------------------------------------------------------------


def test_a_fork_takes_no_blocks_and_each_writer_but_the_last_gets_a_copy() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, range(6))
    b, c = m.fork(a, 2)
    assert m.num_free_blocks == 14
    shared = m.block_table(a)[1]
    assert m.ref_count(shared) == 3
    m.append([a, b, c], [10, 11, 12])
    batch = m.step([a, b, c], 1)
    last = [int(m.block_table(seq)[1]) for seq in (a, b, c)]
    assert last[2] == shared
    assert len(set(last)) == 3
    assert batch.copies.tolist() == [[shared, last[0]], [shared, last[1]]]
    assert batch.slot_mapping.tolist() == [block * 4 + 2 for block in last]
    assert m.ref_count(m.block_table(a)[0]) == 3
    assert m.stats()["cow_copies"] == 2


def test_a_fork_with_a_full_last_block_needs_no_copy() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, range(8))
    b = m.fork(a)[0]
    m.append([a, b], [1, 2])
    assert m.step([a, b], 1).copies.shape == (0, 2)


def test_copies_are_never_both_source_and_destination() -> None:
    m = BlockManager(8, 4)
    a = add_computed(m, range(5))
    forks = m.fork(a, 4)
    m.append(forks, range(4))
    batch = m.step(forks, 1)
    assert not set(batch.copies[:, 0].tolist()) & set(batch.copies[:, 1].tolist())
    assert m.block_table(a)[1] in batch.copies[:, 0]


def test_a_freed_fork_leaves_the_other_its_blocks() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, range(6))
    b = m.fork(a)[0]
    m.free(a)
    m.append(b, 1)
    assert m.step(b, 1).copies.shape == (0, 2)
    m.free(b)
    assert m.num_free_blocks == 16


def test_fork_and_window_together_release_a_block_once_each() -> None:
    # Use after free: one fork passes the window while the other still looks at the block.
    m = BlockManager(16, 2, window=2)
    a = add_computed(m, range(4))
    b = m.fork(a)[0]
    shared = int(m.block_table(b)[1])
    for token in range(6):
        m.append(a, token)
        m.step(a, 1)
        m.check()
    assert m.ref_count(shared) == 1
    assert m.block_table(b)[1] == shared
    m.free([a, b])
    assert m.num_free_blocks == 16


def test_beams_go_on_as_copies_of_their_parents() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, range(6))
    b, c = m.fork(a, 2)
    m.append([a, b, c], [10, 11, 12])
    m.step([a, b, c], 1)
    before = {seq: m.token_ids(seq).tolist() for seq in (a, b, c)}
    m.reorder([a, b, c], [b, b, a])
    m.check()
    assert [m.token_ids(seq).tolist() for seq in (a, b, c)] == [before[b], before[b], before[a]]
    tables = [m.block_table(seq).tolist() for seq in (a, b, c)]
    assert tables[0] == tables[1] != tables[2]
    batch = m.step([a, b, c], 1, token_ids=[20, 21, 22])
    assert batch.copies[:, 0].tolist() == [tables[0][1]]
    m.free([a, b, c])
    assert m.num_free_blocks == 16


def test_a_beam_that_goes_on_from_itself_and_beams_that_swap() -> None:
    m = BlockManager(16, 4)
    a, b = add_computed(m, range(5)), add_computed(m, range(50, 57))
    tables = [m.block_table(seq).tolist() for seq in (a, b)]
    m.reorder([a, b], [a, b])
    assert [m.block_table(seq).tolist() for seq in (a, b)] == tables
    m.reorder([a, b], [b, a])
    assert [m.block_table(seq).tolist() for seq in (b, a)] == tables
    assert [m.num_tokens(seq) for seq in (a, b)] == [7, 5]
    m.check()
    m.reorder(b, a)
    m.check()
    assert m.num_free_blocks == 14


def test_a_reordered_table_is_written_to_a_reused_batch_anew() -> None:
    m = BlockManager(16, 2)
    out = StepBatch(2, 8, 16)
    a, b = m.add(range(5)), m.add(range(50, 55))
    m.step([a, b], 5, out=out)
    m.reorder([a, b], [b, a])
    m.step([a, b], 1, out=out, token_ids=[1, 2])
    for i, seq in enumerate((a, b)):
        np.testing.assert_array_equal(out.block_tables[i, :3], m.block_table(seq))


# --- truncation -------------------------------------------------------------------------------------------------------


def test_rejected_drafts_give_their_blocks_back() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, range(6))
    m.append(a, range(20, 27))
    m.step(a, 7)
    m.truncate(a, 7)
    assert (m.num_tokens(a), m.num_computed_tokens(a), len(m.block_table(a))) == (7, 7, 2)
    m.append(a, 30)
    batch = m.step(a, 1)
    assert batch.positions.tolist() == [7]
    assert m.token_ids(a).tolist() == [0, 1, 2, 3, 4, 5, 20, 30]
    assert m.match([*m.token_ids(a).tolist(), 0]) == 8
    assert m.match([0, 1, 2, 3, 4, 5, 20, 21, 0]) == 7, "what was rejected is gone"


def test_truncating_tokens_that_are_not_computed_keeps_the_blocks() -> None:
    m = BlockManager(16, 4)
    a = m.add(range(12))
    m.step(a, 5)
    m.truncate(a, 8)
    assert (m.num_tokens(a), m.num_computed_tokens(a)) == (8, 5)


def test_a_rewritten_block_that_others_use_is_copied() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, range(9))
    b = m.add(range(9))
    m.truncate(a, 6)
    m.append(a, [50, 51])
    batch = m.step(a, 2)
    assert batch.copies.tolist() == [[m.block_table(b)[1], m.block_table(a)[1]]]
    assert m.match(range(9)) == 8


def test_a_rewritten_block_that_only_the_cache_knows_leaves_the_cache() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, range(8))
    m.truncate(a, 6)
    assert m.match(range(9)) == 8, "it is intact until it is written"
    m.append(a, [50])
    assert m.step(a, 1).copies.shape == (0, 2)
    assert m.match(range(9)) == 4
    m.check()


def test_a_truncated_and_regrown_table_is_written_to_a_reused_batch_anew() -> None:
    m = BlockManager(16, 2, prefix_caching=False)
    out = StepBatch(2, 8, 16)
    a, b = m.add(range(6)), m.add(range(6))
    m.step([a, b], [6, 6], out=out)
    m.truncate(a, 2)
    m.append(b, range(4))
    m.step(b, 4)  # takes what a gave back
    m.append([a, b], [1, 2, 3, 4, 5], [0, 4, 5])
    m.step([a, b], [4, 1], out=out)
    for i, seq in enumerate((a, b)):
        table = m.block_table(seq)
        np.testing.assert_array_equal(out.block_tables[i, : len(table)], table)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8])
def test_a_window_keeps_exactly_the_blocks_that_the_next_token_sees(window: int) -> None:
    m = BlockManager(16, 4, window=window)
    a = m.add([0])
    for length in range(1, 30):
        m.step(a, 1)
        first = max(0, length - window + 1) // 4
        table = m.block_table(a)
        assert (table == -1).tolist() == [i < first for i in range(len(table))]
        m.append(a, length)


def test_a_window_lets_a_prompt_longer_than_the_pool_through_in_chunks() -> None:
    m = BlockManager(4, 4, window=5)
    a = m.add(range(100))
    while m.num_computed_tokens(a) < 100:
        batch = m.step(a, 4)
        assert (batch.block_tables >= 0).all()
    m.check()
    with pytest.raises(OutOfBlocks):
        m.step(m.add(range(50)), 50)


def test_truncating_behind_the_window_is_refused() -> None:
    m = BlockManager(16, 2, window=2)
    a = add_computed(m, range(10))
    before = m.snapshot()
    for keep in (8, 4, 1):
        with pytest.raises(InvalidArgumentError, match="leave what the window then shows: the first 8 tokens"):
            m.truncate(a, keep)
    assert_unchanged(m, before)
    m.truncate(a, 9)


# --- admission --------------------------------------------------------------------------------------------------------


def test_a_step_is_all_or_nothing() -> None:
    m = BlockManager(4, 4)
    a = add_computed(m, range(6))
    forks = m.fork(a, 2)
    m.append([a, *forks], [1, 2, 3])
    b = m.add(range(50, 55))
    before = m.snapshot()
    with pytest.raises(OutOfBlocks, match=r"4 blocks are needed and 2 are free") as caught:
        m.step([a, *forks, b], [1, 1, 1, 5])
    assert (caught.value.needed, caught.value.free) == (4, 2)
    assert_unchanged(m, before)
    m.step([a, *forks], 1)


def test_the_watermark_holds_for_the_first_step_of_a_sequence_only() -> None:
    m = BlockManager(10, 4, watermark=0.25)
    a = add_computed(m, range(20))
    b = m.add(range(100, 116))
    with pytest.raises(OutOfBlocks, match="watermark") as caught:
        m.step(b, 16)
    assert (caught.value.needed, caught.value.free) == (4, 3)
    m.step(b, 12)
    m.step(b, 4)
    m.append(a, range(4))
    m.step(a, 4)
    assert m.num_free_blocks == 0


def test_the_watermark_holds_for_swapping_in() -> None:
    m = BlockManager(4, 4, num_host_blocks=4, watermark=0.5, prefix_caching=False)
    a = add_computed(m, range(8))
    m.swap_out(a)
    b = add_computed(m, [1])
    with pytest.raises(OutOfBlocks, match="watermark"):
        m.swap_in(a)
    m.free(b)
    m.swap_in(a)


def test_what_needs_no_block_is_not_kept_waiting_by_the_watermark() -> None:
    m = BlockManager(4, 4, num_host_blocks=4, watermark=0.25)
    a = add_computed(m, range(8))
    b = add_computed(m, range(4))
    m.swap_out(b)
    m.append(a, range(8))
    m.step(a, 8)
    assert m.num_free_blocks == 0
    assert m.swap_in(b).shape == (0, 2)


def test_a_sequence_that_is_alone_is_not_kept_waiting_by_the_watermark() -> None:
    # A hang: a request that the watermark keeps out for ever.
    m = BlockManager(4, 4, watermark=0.5)
    assert m.step(m.add(range(16)), 16).seq_lens.tolist() == [16]


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    # A hang: waiting for blocks that the pool does not have.
    m = BlockManager(4, 4)
    before = m.snapshot()
    with pytest.raises(InvalidArgumentError, match="17 tokens need 5 blocks of 4 tokens and there are 4"):
        m.add(range(17))
    assert_unchanged(m, before)
    a = m.add(range(16))
    before = m.snapshot()
    with pytest.raises(InvalidArgumentError, match="append: `token_ids` must fit into the pool"):
        m.append(a, 1)
    assert_unchanged(m, before)


# --- the process ------------------------------------------------------------------------------------------------------


def test_the_garbage_collector_has_nothing_to_walk() -> None:
    before = len(gc.get_objects())
    m = BlockManager(10_000, 4)
    seqs = [m.add(range(i, i + 50)) for i in range(0, 10_000, 50)]
    m.step(seqs, 50)
    assert not gc.is_tracked(m)
    assert len(gc.get_objects()) - before < 50


def test_a_long_step_lets_other_threads_run() -> None:
    m, batch = BlockManager(400_000, 2), StepBatch(1, 400_000, 20_000)
    seq = m.add(np.arange(800_000, dtype=np.int32))
    go, ran = threading.Semaphore(0), threading.Event()

    def wait() -> None:
        go.acquire()
        ran.set()

    thread = threading.Thread(target=wait)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is made to give Python's lock away
    try:
        go.release()
        assert not ran.is_set()
        for _ in range(40):
            m.step(seq, 20_000, batch)
            if ran.is_set():
                break
        else:
            pytest.fail("the other thread has not run")
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_threads_may_share_a_manager() -> None:
    m = BlockManager(400, 4)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(150):
                seq = m.add(rng.integers(0, 2, rng.integers(1, 40)))
                batch = compute_all(m, seq)
                children = [seq, *m.fork(seq)]
                m.append(children, [0, 1])
                m.step(children, 1)
                assert batch.seq_lens[0] == m.num_tokens(seq) - 1
                m.free(children)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        m.check()
    for thread in threads:
        thread.join()
    assert not errors
    m.check()
    assert m.num_free_blocks == 400
