# SPDX-License-Identifier: Apache-2.0
"""Looking at a manager, proving its invariants, and its snapshots."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from block_manager_helpers import add_computed, assert_unchanged, compute_all
from hypothesis import given, settings
from hypothesis import strategies as st
from pagedattn import BlockManager, OutOfBlocks
from pagedattn._errors import InvalidArgumentError, PagedAttnError

# --- looking ----------------------------------------------------------------------------------------------------------


def test_the_parameters_can_be_read_back() -> None:
    m = BlockManager(8, 4, num_host_blocks=3, prefix_caching=False, watermark=0.25, window=7)
    assert (m.num_blocks, m.block_size, m.num_host_blocks, m.num_free_host_blocks) == (8, 4, 3, 3)
    assert (m.prefix_caching, m.watermark, m.window) == (False, 0.25, 7)
    assert BlockManager(8, 4).window is None
    assert repr(m) == "BlockManager(num_blocks=8, block_size=4, sequences=0, held=0, cached=0, free=8)"


def test_the_counters_count() -> None:
    m = BlockManager(4, 4)
    a = add_computed(m, range(9))
    b = m.fork(a)[0]
    m.append([a, b], [1, 2])
    m.step([a, b], 1)
    m.free([a, b])
    add_computed(m, range(50, 63))
    assert m.stats() == {
        "allocated": 8,
        "freed": 4,
        "evicted": 2,
        "published": 5,
        "merged_duplicates": 0,
        "prefix_queried_tokens": 22,
        "prefix_hit_tokens": 0,
        "partial_hit_tokens": 0,
        "cow_copies": 1,
        "window_released": 0,
        "preemptions": 0,
        "swapped_out_blocks": 0,
        "swapped_in_blocks": 0,
        "dropped_events": 0,
        "peak_blocks": 4,
        "held_blocks": 4,
        "cached_blocks": 3,
        "sequences": 1,
    }


def test_layout_holds_what_the_picture_needs() -> None:
    m = BlockManager(8, 4)
    a = add_computed(m, range(6))
    b = m.add(range(10))
    m.free(add_computed(m, range(50, 54)))
    layout = m.layout()
    assert layout["seq_ids"].tolist() == [a, b]
    assert layout["num_tokens"].tolist() == [6, 10]
    assert layout["num_computed_tokens"].tolist() == [6, 4]
    assert layout["table_offsets"].tolist() == [0, 2, 3]
    assert layout["tables"].tolist() == [0, 1, 0]
    assert layout["ref_counts"].tolist() == [2, 1, 0, 0, 0, 0, 0, 0]
    assert layout["is_cached"].tolist() == [True, False, True, False, False, False, False, False]
    assert layout["is_swapped"].tolist() == [False, False]


# --- snapshots and check ----------------------------------------------------------------------------------------------


def played_manager(rng: np.random.Generator, **options: object) -> BlockManager:
    m = BlockManager(24, 2, num_host_blocks=16, **options)
    for i in range(20):
        seq = m.add(rng.integers(0, 2, rng.integers(1, 12)), extra_key=b"k" * (i % 3), priority=i % 2)
        try:
            compute_all(m, seq)
        except OutOfBlocks:
            m.free(m.seqs()[:4])
        if i % 7 == 3:
            m.fork(m.seqs()[0], 2)
    m.swap_out(m.seqs()[:1])
    return m


@pytest.mark.parametrize("options", [{}, {"prefix_caching": False}, {"window": 3}, {"watermark": 0.1}])
def test_a_restored_manager_goes_on_exactly_like_the_original(options: dict[str, object]) -> None:
    rng = np.random.default_rng()
    m = played_manager(rng, **options)
    twin = BlockManager.restore(m.snapshot())
    twin.check()
    assert_unchanged(twin, m.snapshot())
    for _ in range(30):
        prompt = rng.integers(0, 2, rng.integers(1, 12))
        seqs = [m.add(prompt), twin.add(prompt)]
        assert seqs[0] == seqs[1]
        while True:
            try:
                tables = [compute_all(x, seqs[0]).block_tables.tolist() for x in (m, twin)]
                break
            except OutOfBlocks:
                victim = m.seqs()[0]
                m.free(victim)
                twin.free(victim)
                if victim == seqs[0]:
                    tables = [[], []]
                    break
        assert tables[0] == tables[1]
    assert_unchanged(twin, m.snapshot())


def test_a_snapshot_survives_a_file(tmp_path: object) -> None:
    m = played_manager(np.random.default_rng())
    path = f"{tmp_path}/state.npz"
    np.savez(path, **m.snapshot())
    with np.load(path) as stored:
        assert_unchanged(BlockManager.restore(stored), m.snapshot())


def test_a_snapshot_of_another_version_is_refused() -> None:
    snapshot = BlockManager(4, 4).snapshot()
    snapshot["header"][0] = 99
    with pytest.raises(InvalidArgumentError, match="must have version 3; got 99"):
        BlockManager.restore(snapshot)


def test_an_incomplete_snapshot_is_refused() -> None:
    snapshot = BlockManager(4, 4).snapshot()
    with pytest.raises(InvalidArgumentError, match="must hold 'free_blocks'"):
        BlockManager.restore({k: v for k, v in snapshot.items() if k != "free_blocks"})
    with pytest.raises(InvalidArgumentError, match=r"\['header'\]` must be int64"):
        BlockManager.restore({**snapshot, "header": snapshot["header"].astype(np.int32)})


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_snapshot_is_refused_or_consistent(data: st.DataObject) -> None:
    m = played_manager(np.random.default_rng(5), seed=1)
    snapshot = m.snapshot()
    name = data.draw(st.sampled_from([k for k, v in snapshot.items() if v.size]))
    field = snapshot[name]
    at = data.draw(st.integers(0, field.size - 1))
    if data.draw(st.booleans()):
        if name == "header" and at < 4:
            return  # another pool, possibly enormous
        value = data.draw(st.integers(-3, 40)) if field.dtype.kind in "if" else data.draw(st.integers(0, 40))
        field[at] = value
    else:
        snapshot[name] = np.delete(field, at)
    try:
        restored = BlockManager.restore(snapshot)
    except (InvalidArgumentError, MemoryError):
        return
    restored.check()
    restored.free(restored.seqs())
    restored.check()


@pytest.mark.parametrize("number", [3, 2**24 - 1, 2**31 - 1, 2**40, -1])
def test_a_damaged_snapshot_asks_for_no_namespaces_that_it_does_not_hold(number: int) -> None:
    # A namespace's number was taken for the length of a table: 2^24 of them would have taken a gigabyte.
    m = BlockManager(8, 2)
    for key in (b"b", b"", b"a"):
        compute_all(m, m.add(range(3), extra_key=key))
    snapshot = m.snapshot()
    assert snapshot["namespace_lengths"].tolist() == [0, 1, 1]
    assert bytes(snapshot["namespace_keys"]) == b"ab"
    sequences = snapshot["sequences"].copy()
    sequences[7], sequences[9] = -1 - number, number
    with pytest.raises(InvalidArgumentError, match="is in no namespace"):
        BlockManager.restore({**snapshot, "sequences": sequences})
    if 0 <= number < 2**31:
        parents = snapshot["cached_parents"].copy()
        parents[0] = -1 - number
        with pytest.raises(InvalidArgumentError, match="has no parent"):
            BlockManager.restore({**snapshot, "cached_parents": parents})


def test_a_snapshot_does_not_depend_on_the_order_in_which_namespaces_came_and_went() -> None:
    managers = [BlockManager(8, 2, seed=1) for _ in range(2)]
    for m, first in zip(managers, (b"z", b"a"), strict=True):
        gone = m.add([1], extra_key=first)
        kept = m.add([1], extra_key=b"k")
        m.free(gone)
        m.free(m.add([1], extra_key=b"m"))
        compute_all(m, kept)
    assert_unchanged(managers[0], managers[1].snapshot())
    assert_unchanged(BlockManager.restore(managers[0].snapshot()), managers[1].snapshot())


@pytest.mark.parametrize("block", [-(2**31) - 1, -1000, -1 - 2**20, 8, 2**32])
def test_a_snapshot_whose_sequence_continues_no_block_is_refused(block: int) -> None:
    # The published end has been released by the window, so that nothing else proves where the sequence goes on.
    m = BlockManager(8, 2, window=1)
    add_computed(m, range(4))
    snapshot = m.snapshot()
    snapshot["sequences"][7] = block
    with pytest.raises(InvalidArgumentError, match="continues a block that there is not"):
        BlockManager.restore(snapshot)


@pytest.mark.parametrize("window", [None, 3])
def test_a_snapshot_whose_window_released_a_block_that_is_still_written_to_is_refused(window: int | None) -> None:
    m = BlockManager(8, 2, window=window, prefix_caching=False)
    add_computed(m, range(3))
    snapshot = m.snapshot()
    table = snapshot["sequence_tables"]
    snapshot["free_blocks"] = np.append(snapshot["free_blocks"], table[table >= 0]).astype(
        snapshot["free_blocks"].dtype
    )
    snapshot["sequences"][6] = len(table)
    table[:] = -1
    with pytest.raises(InvalidArgumentError, match="released blocks that lie before it"):
        BlockManager.restore(snapshot)


@pytest.mark.parametrize(
    ("field", "damage", "message"),
    [
        ("free_blocks", lambda a: a[1:], "has leaked"),
        ("free_blocks", lambda a: np.append(a, a[0]), "is in the free lists twice"),
        ("evictable_blocks", lambda a: a[1:], "has leaked"),
        ("sequence_tables", lambda a: np.append(a[1:], a[-1]), "contradicts itself"),
        ("cached_tokens", lambda a: a + 1, "holds other tokens"),
        ("cached_parents", lambda a: np.full_like(a, -1), "'cached_parents'.* has no parent"),
    ],
)
def test_check_names_what_is_broken(field: str, damage: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    m = BlockManager(8, 2)
    a = add_computed(m, range(7))
    m.fork(a)
    m.free(add_computed(m, [8, 8]))
    m.free(add_computed(m, [9, 9, 9]))
    snapshot = m.snapshot()
    snapshot[field] = damage(snapshot[field])
    with pytest.raises(InvalidArgumentError, match=message):
        BlockManager.restore(snapshot)


def hidden_prefix() -> BlockManager:
    """Nobody holds what is cached, so that no sequence's tokens give damage away."""
    m = BlockManager(16, 4, seed=1)
    m.free(add_computed(m, range(14), priority=1))
    m.free(add_computed(m, range(50, 59), extra_key=b"k"))
    return m


@pytest.mark.parametrize(
    "field", ["cached_tokens", "cached_hashes", "hash_key", "cached_parents", "namespace_keys", "cached_blocks"]
)
def test_a_cached_block_whose_hash_is_not_that_of_its_tokens_is_refused(field: str) -> None:
    good = hidden_prefix().snapshot()
    for at in range(good[field].size):
        snapshot = {name: values.copy() for name, values in good.items()}
        snapshot[field][at] ^= 1
        with pytest.raises(InvalidArgumentError, match=r"'cached_|'generations'|nobody uses a namespace"):
            BlockManager.restore(snapshot)
    BlockManager.restore(good)


def test_a_child_that_is_given_to_the_block_in_its_parent_s_place_is_refused() -> None:
    # The parent has been evicted and its place taken: only the generation says that the child is not the new one's.
    m = BlockManager(4, 2, window=2, seed=1)
    a = m.add([1, 1, 5, 5, 6])
    m.step(a, 4)
    for start in range(10, 30):
        m.free(add_computed(m, [start, start, 0]))
    snapshot = m.snapshot()
    parents, generations = snapshot["cached_parents"], snapshot["cached_parent_generations"]
    orphan = int(np.flatnonzero((parents >= 0) & (generations != snapshot["generations"][parents]))[0])
    BlockManager.restore(snapshot)
    generations[orphan] = snapshot["generations"][parents[orphan]]
    with pytest.raises(InvalidArgumentError, match="'cached_"):
        BlockManager.restore(snapshot)


def test_a_sequence_that_would_publish_under_another_prefix_is_refused() -> None:
    # The window has released all of its published blocks: only their tokens tell where it goes on.
    m = BlockManager(16, 2, window=1, seed=1)
    a = add_computed(m, range(4))
    m.free(add_computed(m, range(50, 54)))
    assert m.block_table(a).tolist() == [-1, -1]
    snapshot = m.snapshot()
    other = int(snapshot["cached_blocks"][-1])
    snapshot["sequences"][7:9] = other, snapshot["generations"][other]
    with pytest.raises(InvalidArgumentError, match="'sequence_tokens'"):
        BlockManager.restore(snapshot)


@pytest.mark.parametrize(
    ("field", "at", "value"),
    [
        ("header", 4, 2**63 - 1),
        ("header", 5, 2**63 - 1),
        ("header", 6, 2**63 - 1),
        ("header", 6, -1),
        ("counters", 0, 2**63 - 1),
        ("counters", 4, 0),
        ("counters", 5, -1),
        ("watermark", 0, float("nan")),
        ("sequences", 10, 128),
        ("sequences", 11, 128),
        ("sequences", 8, 2**40 + 1),
        ("sequence_tokens", 5, -1),
        ("cached_parent_generations", 0, 2),
        ("newest_children", 0, 15),
    ],
)
def test_a_number_that_no_manager_has_is_refused_by_the_name_of_its_field(field: str, at: int, value: float) -> None:
    m = BlockManager(16, 4)
    add_computed(m, range(6))
    snapshot = m.snapshot()
    snapshot[field][at] = value
    name = "cached_parents" if field == "cached_parent_generations" else field
    with pytest.raises(InvalidArgumentError, match=rf"BlockManager\.restore: `snapshot\['{name}'\]` must"):
        BlockManager.restore(snapshot)


@pytest.mark.parametrize("field", ["sequence_tokens", "sequence_tables", "namespace_keys"])
def test_a_snapshot_with_more_than_its_sequences_have_is_refused(field: str) -> None:
    m = BlockManager(16, 4)
    add_computed(m, range(6))
    snapshot = m.snapshot()
    snapshot[field] = np.append(snapshot[field], snapshot[field].dtype.type(1))
    with pytest.raises(InvalidArgumentError, match=r"sequence_tokens|sequence_tables|namespace_keys"):
        BlockManager.restore(snapshot)


def test_cached_blocks_that_would_wait_in_another_order_are_refused() -> None:
    snapshot = hidden_prefix().snapshot()
    snapshot["cached_priorities"][:] = -snapshot["cached_priorities"]
    with pytest.raises(InvalidArgumentError, match=r"'evictable_blocks'.* priority"):
        BlockManager.restore(snapshot)


def test_ids_go_on_after_the_largest_that_a_snapshot_may_hold() -> None:
    snapshot = BlockManager(8, 4).snapshot()
    snapshot["header"][6] = 2**62
    m = BlockManager.restore(snapshot)
    assert m.fork(m.add([1]), 3) == [2**62 + 1, 2**62 + 2, 2**62 + 3]


def test_check_passes_on_a_new_manager() -> None:
    BlockManager(8, 4).check()
    assert issubclass(InvalidArgumentError, PagedAttnError)
