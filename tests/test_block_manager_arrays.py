# SPDX-License-Identifier: Apache-2.0
"""The arrays that a step fills, reused and of the caller."""

from __future__ import annotations

import numpy as np
import pytest
from block_manager_helpers import add_computed, assert_unchanged
from pagedattn import BlockManager
from pagedattn._block_manager import StepBatch
from pagedattn._errors import InvalidArgumentError, PagedAttnError

# --- reused arrays ----------------------------------------------------------------------------------------------------


def test_a_reused_batch_equals_a_fresh_one() -> None:
    rng = np.random.default_rng()
    a, b = BlockManager(256, 4, seed=1), BlockManager(256, 4, seed=1)
    out = StepBatch(8, 40, 64)
    live: list[int] = []
    for _ in range(60):
        if len(live) < 8:
            prompt = rng.integers(0, 2, rng.integers(1, 12))
            live.append(a.add(prompt))
            assert b.add(prompt) == live[-1]
        counts = [a.num_tokens(seq) - a.num_computed_tokens(seq) for seq in live]
        fresh, reused = a.step(live, counts), b.step(live, counts, out=out)
        assert reused is out
        for name in ("seq_lens", "query_start_loc", "slot_mapping", "positions", "copies"):
            np.testing.assert_array_equal(getattr(fresh, name), getattr(reused, name), err_msg=name)
        for i, length in enumerate(fresh.seq_lens):
            blocks = -(-int(length) // 4)
            np.testing.assert_array_equal(fresh.block_tables[i, :blocks], reused.block_tables[i, :blocks])
        for m in (a, b):
            m.append(live, np.arange(len(live)) % 2)
        if rng.random() < 0.4:
            gone = live.pop(int(rng.integers(len(live))))
            a.free(gone)
            b.free(gone)
        if live and len(live) < 8 and rng.random() < 0.3:
            live += a.fork(live[0])
            assert b.fork(live[0]) == live[-1:]


def test_only_new_entries_of_table_rows_are_written() -> None:
    m, out = BlockManager(16, 2), StepBatch(3, 4, 16)
    seqs = [m.add(range(first, first + n)) for first, n in ((0, 3), (50, 4), (80, 3))]
    m.step(seqs, [3, 4, 3], out)
    out.block_tables[:] = -7  # what lies there already is not looked at
    m.step(seqs, 1, out, token_ids=[1, 2, 3])
    new = int(m.block_table(seqs[1])[2])
    assert out.block_tables.tolist() == [[-7] * 4, [-7, -7, new, -7], [-7] * 4]
    seqs[2] = m.add(range(90, 93))
    m.step(seqs, [1, 1, 3], out, token_ids=[1, 2, -1])
    table = [int(block) for block in m.block_table(seqs[2])]
    assert out.block_tables[2].tolist() == [*table, -7, -7]


def test_a_batch_may_stand_on_arrays_of_the_caller() -> None:
    tables, lens, starts = np.full((2, 4), -7, np.int32), np.full(2, -7, np.int32), np.full(3, -7, np.int32)
    slots, copies = np.full(9, -7, np.int64), np.full((1, 2), -7, np.int64)
    out = StepBatch.from_arrays(tables, lens, starts, slots, copies=copies)
    m = BlockManager(8, 4)
    m.step(m.add(range(5)), 5, out=out)
    assert tables[0, :2].tolist() == [0, 1]
    assert lens.tolist() == [5, -7]
    assert starts.tolist() == [0, 5, -7]
    assert slots.tolist() == [0, 1, 2, 3, 4, -7, -7, -7, -7]
    assert (tables[1] == -7).all()
    assert np.shares_memory(out.slot_mapping, slots)


def test_a_batch_can_serve_two_managers_in_turn() -> None:
    out = StepBatch(1, 4, 8)
    first, second = BlockManager(8, 4), BlockManager(8, 4)
    second.step(second.add(range(50, 58)), 8)
    a, b = first.add(range(5)), second.add(range(5))
    for m, seq in ((first, a), (second, b)):
        m.step(seq, 5, out=out)
        assert out.block_tables[0, :2].tolist() == m.block_table(seq).tolist()


def test_a_batch_that_is_initialised_again_says_so_and_keeps_its_arrays() -> None:
    # A step in another thread would write on into the arrays that it had.
    m = BlockManager(64, 4)
    batch = StepBatch(1, 8, 8)
    m.step([m.add(range(8))], 8, out=batch)
    arrays = batch.block_tables, batch.slot_mapping
    with pytest.raises(PagedAttnError, match="StepBatch: `__init__` has been called already"):
        batch.__init__(40, 8, 40)  # type: ignore[misc]
    assert (batch.num_seqs, batch.num_tokens) == (1, 8)
    assert batch.block_tables is arrays[0]
    assert batch.slot_mapping is arrays[1]


@pytest.mark.parametrize(("capacity", "array"), [((1, 8, 16), "seq_lens"), ((2, 1, 16), "block_tables"),
                                                 ((2, 8, 5), "slot_mapping")])  # fmt: skip
def test_a_batch_that_is_too_small_is_refused(capacity: tuple[int, int, int], array: str) -> None:
    m = BlockManager(8, 4)
    seqs = [m.add(range(5)), m.add([1])]
    before = m.snapshot()
    with pytest.raises(InvalidArgumentError, match=f"`out` must hold .* in its `{array}`"):
        m.step(seqs, [5, 1], out=StepBatch(*capacity))
    assert_unchanged(m, before)


def test_a_batch_without_room_for_the_copies_is_refused() -> None:
    m = BlockManager(8, 4)
    a = add_computed(m, range(5))
    seqs = [a, *m.fork(a, 2)]
    m.append(seqs, [1, 2, 3])
    out = StepBatch.from_arrays(np.zeros((3, 4), np.int32), np.zeros(3, np.int32), np.zeros(4, np.int32),
                                np.zeros(3, np.int64), copies=np.zeros((1, 2), np.int64))  # fmt: skip
    before = m.snapshot()
    with pytest.raises(InvalidArgumentError, match="hold 2 copies in its `copies`; it has room for 1"):
        m.step(seqs, 1, out=out)
    assert_unchanged(m, before)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("block_tables", np.zeros((2, 4), np.int64)),
        ("block_tables", np.zeros(8, np.int32)),
        ("block_tables", np.zeros((2, 8), np.int32)[:, ::2]),
        ("query_start_loc", np.zeros(2, np.int32)),
        ("slot_mapping", np.zeros(8, np.int32)),
        ("positions", np.zeros(7, np.int64)),
        ("copies", np.zeros((2, 3), np.int64)),
        ("copies", [[0, 0]]),
        ("block_tables", None),
        ("seq_lens", None),
        ("seq_lens", np.int32(2)),
        ("slot_mapping", 8),
        ("slot_mapping", np.array(8)),
        ("copies", 2),
    ],
)
def test_arrays_of_the_wrong_kind_make_no_batch(name: str, array: object) -> None:
    arrays = {
        "block_tables": np.zeros((2, 4), np.int32),
        "seq_lens": np.zeros(2, np.int32),
        "query_start_loc": np.zeros(3, np.int32),
        "slot_mapping": np.zeros(8, np.int64),
    }
    with pytest.raises(InvalidArgumentError, match=f"StepBatch.from_arrays: `{name}` must be"):
        StepBatch.from_arrays(**{**arrays, name: array})


def test_arrays_that_share_memory_make_no_batch() -> None:
    memory = np.zeros(12, np.int64)
    tables, lens, starts = np.zeros((2, 4), np.int32), np.zeros(2, np.int32), np.zeros(3, np.int32)
    with pytest.raises(InvalidArgumentError, match="`positions` must be memory apart from `slot_mapping`"):
        StepBatch.from_arrays(tables, lens, starts, memory[:8], memory[4:])
    with pytest.raises(InvalidArgumentError, match="`block_tables` must be memory apart from `seq_lens`"):
        StepBatch.from_arrays(tables, tables[1, :2], starts, memory[:8])
    StepBatch.from_arrays(tables, lens, starts, memory[:6], memory[6:])


def test_read_only_arrays_make_no_batch() -> None:
    lens = np.zeros(2, np.int32)
    lens.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match="writable"):
        StepBatch.from_arrays(np.zeros((2, 4), np.int32), lens, np.zeros(3, np.int32), np.zeros(8, np.int64))
