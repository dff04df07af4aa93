# SPDX-License-Identifier: Apache-2.0
"""The rules of the block manager, one by one, and the bugs that others have had."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagedattn import BlockManager, OutOfBlocks
from pagedattn._block_manager import StepBatch
from pagedattn._errors import InvalidArgumentError, PagedAttnError


def compute_all(m: BlockManager, seq: int) -> StepBatch:
    return m.step([seq], [m.num_tokens(seq) - m.num_computed_tokens(seq)])


def add_computed(m: BlockManager, tokens: list[int] | range, **options: object) -> int:
    seq = m.add(tokens, **options)
    compute_all(m, seq)
    return seq


def assert_unchanged(m: BlockManager, before: dict[str, np.ndarray]) -> None:
    m.check()
    after = m.snapshot()
    assert list(before) == list(after)
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)


# --- blocks on demand ------------------------------------------------------------------------------------------------


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


# --- prefix sharing --------------------------------------------------------------------------------------------------


def test_an_equal_prefix_is_shared_in_whole_blocks() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, range(10))
    b = m.add([*range(10), 50, 51])
    assert m.num_cached_tokens(b) == m.num_computed_tokens(b) == 8
    assert m.block_table(b).tolist() == m.block_table(a)[:2].tolist()
    assert [m.ref_count(block) for block in m.block_table(a)] == [2, 2, 1]
    batch = m.step([b], [4])
    assert batch.positions.tolist() == [8, 9, 10, 11]
    assert batch.block_tables[0, :2].tolist() == m.block_table(a)[:2].tolist()


def test_the_last_token_of_a_prompt_is_always_left_to_compute() -> None:
    m = BlockManager(16, 4)
    add_computed(m, range(8))
    assert m.num_cached_tokens(m.add(range(8))) == 4
    assert m.match(range(8)) == 4
    assert m.match(range(9)) == 8
    assert m.match([0]) == m.match([]) == 0


def test_a_block_can_be_shared_only_after_the_step_that_fills_it() -> None:
    m = BlockManager(16, 4)
    a = m.add(range(9))
    m.step([a], [3])
    assert m.match(range(9)) == 0
    m.step([a], [1])
    assert m.match(range(9)) == 4


def test_within_one_step_no_block_is_shared_that_the_step_writes() -> None:
    m = BlockManager(16, 4)
    a, b = m.add(range(8)), m.add(range(8))
    batch = m.step([a, b], [8, 8])
    assert len(set(batch.slot_mapping.tolist())) == 16


def test_generated_tokens_are_shared_too() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, [1, 2, 3])
    for token in (4, 5):
        m.append(a, token)
        m.step(a, 1)
    assert m.match([1, 2, 3, 4, 5]) == 4


def test_another_extra_key_is_another_namespace_from_the_first_block_on() -> None:
    m = BlockManager(16, 4)
    add_computed(m, range(9), extra_key=b"a")
    assert m.match(range(9), extra_key=b"a") == 8
    for key in (b"", b"b", b"a\0", b"aa"):
        assert m.match(range(9), extra_key=key) == 0
        assert m.num_cached_tokens(m.add(range(9), extra_key=key)) == 0


def test_an_extra_key_is_not_mistaken_for_tokens() -> None:
    # Key aliasing: a name that spells the first tokens, a salt that equals a name.
    m = BlockManager(16, 4)
    tokens = [1, 2, 3, 4]
    add_computed(m, [*tokens, *tokens, 9])
    add_computed(m, [*tokens, 9], extra_key=np.array(tokens, np.int32).tobytes())
    assert m.match([*tokens, *tokens, 9]) == 8
    assert m.match([*tokens, 9], extra_key=b"") == 4
    assert m.match([*tokens, *tokens, 9], extra_key=np.array(tokens, np.int32).tobytes()) == 4


def test_without_prefix_caching_nothing_is_shared() -> None:
    m = BlockManager(16, 4, prefix_caching=False)
    a = add_computed(m, range(9))
    assert m.match(range(9)) == m.num_cached_tokens(m.add(range(9))) == m.num_cached_blocks == 0
    m.free(a)
    assert m.num_free_blocks == 16


def test_duplicates_of_one_prefix_are_merged() -> None:
    m = BlockManager(16, 4)
    seqs = [m.add(range(9)) for _ in range(3)]
    m.step(seqs, [9, 9, 9])
    tables = [m.block_table(seq).tolist() for seq in seqs]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    assert m.stats()["merged_duplicates"] == 4
    assert m.num_free_blocks == 16 - 2 - 3
    m.append(seqs, [1, 2, 3])
    batch = m.step(seqs, 1)
    np.testing.assert_array_equal(batch.block_tables, [m.block_table(seq) for seq in seqs])


def test_match_changes_nothing() -> None:
    m = BlockManager(4, 4)
    for start in (0, 100):
        m.free(add_computed(m, range(start, start + 8)))
    before = m.snapshot()
    assert m.match(range(9)) == 8
    assert m.match(range(9), b"unknown") == 0
    assert_unchanged(m, before)


def test_the_hit_rate_counts_each_prompt_once() -> None:
    m = BlockManager(16, 4)
    a = add_computed(m, range(9))
    b = m.add(range(9))
    m.take_prefix(b)
    m.fork(b)
    assert m.stats()["prefix_queried_tokens"] == 18
    assert m.stats()["prefix_hit_tokens"] == 8
    m.preempt(a)
    assert m.take_prefix(a) == 8
    assert m.stats()["prefix_queried_tokens"] == 27
    assert m.stats()["prefix_hit_tokens"] == 16


def test_a_waiting_sequence_can_take_what_has_been_computed_meanwhile() -> None:
    m = BlockManager(16, 4)
    a, b = m.add(range(13)), m.add(range(13))
    m.step(a, 9)
    assert m.take_prefix(b) == 8
    m.step(a, 4)
    assert m.take_prefix(b) == 12
    compute_all(m, b)
    with pytest.raises(InvalidArgumentError, match="not have had a step"):
        m.take_prefix(b)


def test_a_truncated_waiting_sequence_keeps_part_of_a_block() -> None:
    m = BlockManager(16, 4)
    add_computed(m, range(13))
    b = m.add(range(13))
    m.truncate(b, 6)
    assert m.take_prefix(b) == m.num_computed_tokens(b) == 6
    m.append(b, [70, 71, 72])
    batch = m.step(b, 3)
    assert batch.copies.tolist() == [[m.block_table(0)[1], m.block_table(b)[1]]]
    m.check()


def test_reset_prefix_cache_forgets_everything_and_what_is_live_publishes_no_more() -> None:
    m = BlockManager(16, 4)
    m.free(add_computed(m, range(100, 109)))
    a = add_computed(m, range(6))
    m.reset_prefix_cache()
    m.check()
    assert m.num_cached_blocks == 0
    assert m.num_free_blocks == 14
    m.append(a, range(6, 12))
    compute_all(m, a)
    assert m.num_cached_blocks == 0
    m.preempt(a)
    compute_all(m, a)
    assert m.num_cached_blocks == 3


# --- collisions and the hash -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_a_hash_collision_never_serves_another_prompt_s_blocks(bits: int) -> None:
    m = BlockManager(64, 2, seed=1)
    m._weaken_hash(bits)
    prompts = [[a, b, c, d, 9] for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)]
    for i, prompt in enumerate(prompts):
        expected = max([0] + [2 * (p[:2] == prompt[:2]) + 2 * (p[:4] == prompt[:4]) for p in prompts[:i]])
        seq = m.add(prompt)
        assert m.num_cached_tokens(seq) == expected
        compute_all(m, seq)
        m.check()


def test_a_child_is_not_found_through_a_block_that_took_its_parent_s_place() -> None:
    # With every hash equal only parents tell children apart; the window lets a parent go while its child is in use.
    m = BlockManager(4, 2, window=2, seed=1)
    m._weaken_hash(0)
    a = m.add([1, 1, 5, 5, 6])
    m.step(a, 4)
    parent = 0
    assert m.block_table(a).tolist() == [-1, 1]
    assert m.match([1, 1, 5, 5, 6]) == 4
    successors = 0
    for start in range(10, 20):
        seq = m.add([start, start])
        successors += m.step(seq, 2).block_tables[0, 0] == parent
        m.free(seq)
        m.check()
        assert m.match([start, start, 5, 5, 6]) == 2
    assert successors
    assert m.match([1, 1, 5, 5, 6]) == 0


def test_a_sequence_whose_last_published_block_was_evicted_publishes_no_more() -> None:
    m = BlockManager(4, 2, window=1)
    a = add_computed(m, range(4))
    for start in range(50, 58):
        m.free(add_computed(m, [start, start]))
    assert m.match(range(5)) == 0
    published = m.stats()["published"]
    m.append(a, [4, 5])
    m.step(a, 2)
    assert m.stats()["published"] == published, "nobody could ever find it"
    m.check()


def test_a_seed_changes_nothing_that_can_be_seen() -> None:
    def play(**options: int) -> list[list[int]]:
        m = BlockManager(16, 4, **options)
        seqs = [add_computed(m, tokens) for tokens in (range(9), range(11), range(5, 20))]
        return [m.block_table(seq).tolist() for seq in seqs]

    assert play() == play(seed=0) == play(seed=2**64 - 1)


def test_the_hash_is_keyed_per_manager_unless_a_seed_is_given() -> None:
    def key(**options: int) -> list[int]:
        return BlockManager(4, 4, **options).snapshot()["hash_key"].tolist()

    assert key() != key()
    assert key(seed=3) == key(seed=3) != key(seed=4)


# --- eviction --------------------------------------------------------------------------------------------------------


def test_freed_blocks_stay_cached_until_their_place_is_needed() -> None:
    m = BlockManager(4, 4)
    m.free(add_computed(m, range(8)))
    assert (m.num_free_blocks, m.num_cached_blocks, m.usage) == (4, 2, 0)
    assert m.match(range(9)) == 8
    add_computed(m, range(50, 58))
    assert m.match(range(9)) == 8, "a free block was there"
    add_computed(m, range(60, 64))
    assert m.match(range(9)) == 4
    assert m.stats()["evicted"] == 1


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    m = BlockManager(6, 2)
    m.free(add_computed(m, range(12)))
    for cached in (10, 8, 6, 4, 2, 0):
        add_computed(m, [100 + cached])
        assert m.match(range(13)) == cached


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    m = BlockManager(4, 2)
    m.free(add_computed(m, [1, 1, 9]))
    m.free(add_computed(m, [2, 2, 9]))
    m.free(m.add([1, 1, 9]))  # used again
    add_computed(m, range(100, 106))
    assert (m.match([1, 1, 9]), m.match([2, 2, 9])) == (2, 0)


def test_a_lower_priority_is_evicted_first_and_a_block_keeps_its_highest() -> None:
    m = BlockManager(3, 2)
    m.free(add_computed(m, [1, 1], priority=1))
    m.free(add_computed(m, [2, 2], priority=-128))
    m.free(add_computed(m, [3, 3], priority=-128))
    m.free(m.add([2, 2, 9], priority=127))
    evicted = []
    for i in range(3):
        add_computed(m, [10 + i])
        evicted += [p for p in (1, 2, 3) if m.match([p, p, 9]) == 0 and p not in evicted]
    assert evicted == [3, 1, 2]


def test_a_block_in_use_is_never_evicted() -> None:
    m = BlockManager(4, 2)
    a = add_computed(m, [1, 1, 2, 2])
    b = m.add([1, 1, 2, 2, 3])
    m.free(a)
    compute_all(m, b)
    with pytest.raises(OutOfBlocks):
        compute_all(m, m.add([7, 7, 7, 7]))
    assert m.match([1, 1, 2, 2, 3]) == 4


@settings(max_examples=60)
@given(
    st.integers(4, 12),
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=40),
)
def test_hits_are_those_of_an_ideal_lru_cache(num_blocks: int, prompts: list[list[int]]) -> None:
    m = BlockManager(num_blocks, 2)
    cached: OrderedDict[tuple[int, ...], None] = OrderedDict()  # unused prefixes, the next to be evicted first
    for prompt in prompts:
        prefixes = [tuple(prompt[: i + 2]) for i in range(0, len(prompt) - 1, 2)]
        hits = 0
        while hits < (len(prompt) - 1) // 2 and prefixes[hits] in cached:
            hits += 1
        assert m.match(prompt) == 2 * hits
        seq = m.add(prompt)
        assert m.num_cached_tokens(seq) == 2 * hits
        for prefix in prefixes[:hits]:
            del cached[prefix]
        needed = -(-len(prompt) // 2) - hits
        while needed > num_blocks - hits - len(cached):
            cached.popitem(last=False)
        compute_all(m, seq)
        m.free(seq)
        for prefix in reversed(prefixes):
            cached[prefix] = None
            cached.move_to_end(prefix)


# --- forks -----------------------------------------------------------------------------------------------------------


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


# --- truncation ------------------------------------------------------------------------------------------------------


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
    assert m.match([0, 1, 2, 3, 4, 5, 20, 21, 0]) == 4


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


# --- windows ---------------------------------------------------------------------------------------------------------


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


# --- swap and preemption ---------------------------------------------------------------------------------------------


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


# --- admission -------------------------------------------------------------------------------------------------------


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


# --- reused arrays ---------------------------------------------------------------------------------------------------


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


def test_read_only_arrays_make_no_batch() -> None:
    lens = np.zeros(2, np.int32)
    lens.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match="writable"):
        StepBatch.from_arrays(np.zeros((2, 4), np.int32), lens, np.zeros(3, np.int32), np.zeros(8, np.int64))


# --- wrong calls -----------------------------------------------------------------------------------------------------


def busy_manager() -> BlockManager:
    m = BlockManager(8, 4)
    add_computed(m, range(6))  # 0: all computed
    m.add(range(50, 55))  # 1: waiting
    return m


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.add([]), "add: `token_ids` must hold at least one token"),
        (lambda m: m.add([1, -1]), r"add: `token_ids` must lie in 0 \.\.\. 2147483647; got -1"),
        (lambda m: m.add(np.array([1, -1], np.int32)), r"add: `token_ids` must lie in 0 \.\.\. 2147483647; got -1"),
        (lambda m: m.add([2**31]), r"add: `token_ids` must lie in 0 .* got 2147483648"),
        (lambda m: m.add([2**70]), "add: `token_ids` must"),
        (lambda m: m.add(np.array([2**63], np.uint64)), "add: `token_ids` must fit into int64"),
        (lambda m: m.add([1.5]), "add: `token_ids` must be an integer; got 1.5"),
        (lambda m: m.add(np.array([1.5])), "add: `token_ids` must hold integers; got float64"),
        (lambda m: m.add([[1, 2]]), r"add: `token_ids` must be an integer; got \[1, 2\]"),
        (lambda m: m.add(np.zeros((2, 2), int)), r"add: `token_ids` must have one dimension; got shape \(2, 2\)"),
        (lambda m: m.add("text"), "add: `token_ids` must have one dimension"),
        (lambda m: m.add(7), "add: `token_ids` must have one dimension"),
        (lambda m: m.add([1], extra_key="text"), "add: `extra_key` must be bytes; got str"),
        (lambda m: m.add([1], priority=128), r"add: `priority` must lie in -128 \.\.\. 127; got 128"),
        (lambda m: m.match([-1]), "match: `token_ids` must lie in"),
        (lambda m: m.match([1], extra_key=None), "match: `extra_key` must be bytes; got NoneType"),
        (lambda m: m.take_prefix(7), "take_prefix: `seqs` must name live sequences; 7 was never added"),
        (lambda m: m.append(7, 1), "append: `seqs` must name live sequences; 7 was never added or has been freed"),
        (lambda m: m.append([0, 0], [1, 2]), "append: `seqs` must name each sequence once; 0 is repeated"),
        (lambda m: m.append([0, 1], [1]), "append: `token_ids` must hold one token for each of 2 sequences; got 1"),
        (lambda m: m.append([0, 1], [1, 2], [0, 1]), "append: `query_start_loc` must hold 3 offsets from 0 to 2"),
        (lambda m: m.append([0, 1], [1, 2], [0, 3, 2]), "append: `query_start_loc` must not descend"),
        (lambda m: m.append([0, 1], [1, 2], [0, -1, 2]), "append: `query_start_loc` must not descend"),
        (lambda m: m.append([0, 1], [1, 2], [1, 1, 2]), "append: `query_start_loc` must hold 3 offsets"),
        (lambda m: m.append(0, -1), "append: `token_ids` must lie in"),
        (lambda m: m.truncate(0, 0), r"truncate: `num_tokens` must lie in 1 \.\.\. 6"),
        (lambda m: m.truncate(0, 7), r"truncate: `num_tokens` must lie in 1 \.\.\. 6"),
        (lambda m: m.truncate(7, 1), "truncate: `seqs` must name live sequences"),
        (lambda m: m.fork(7), "fork: `seqs` must name live sequences"),
        (lambda m: m.fork(0, 0), r"fork: `n` must lie in 1 \.\.\."),
        (lambda m: m.step(0, 1), "step: `seqs` must have tokens to compute; append to sequence 0 first"),
        (lambda m: m.step(1, 6), r"step: `num_new_tokens` must lie in 1 \.\.\. 5, .* sequence 1 .* got 6"),
        (lambda m: m.step([1], [0]), r"step: `num_new_tokens` must lie in 1 \.\.\. 5"),
        (lambda m: m.step(1, -1), "step: `num_new_tokens` must lie in 1"),
        (lambda m: m.step([1, 1], [1, 1]), "step: `seqs` must name each sequence once; 1 is repeated"),
        (lambda m: m.step([1], [1, 1]), "step: `num_new_tokens` must hold a number for each of 1 sequences; got 2"),
        (lambda m: m.step([1], [1], out={}), "step: `out` must be a StepBatch; got dict"),
        (lambda m: m.step("1", 1), "step: `seqs` must have one dimension"),
        (lambda m: m.free(7), "free: `seqs` must name live sequences; 7 was never added or has been freed"),
        (lambda m: m.free([1, 0, 1]), "free: `seqs` must name each sequence once; 1 is repeated"),
        (lambda m: m.free(-1), "free: `seqs` must name live sequences; -1"),
        (lambda m: m.preempt([0, 9]), "preempt: `seqs` must name live sequences; 9"),
        (lambda m: m.swap_out(0), None),
        (lambda m: m.swap_in(0), "swap_in: `seqs` must be swapped out; 0 is on the device"),
        (lambda m: m.block_table(9), "block_table: `seqs` must name live sequences; 9"),
        (lambda m: m.num_tokens("a"), "num_tokens: `seq` must be an integer; got 'a'"),
        (lambda m: m.ref_count(8), r"ref_count: `block` must lie in 0 \.\.\. 7; got 8"),
        (lambda m: m.ref_count(-1), r"ref_count: `block` must lie in 0 \.\.\. 7; got -1"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_changes_nothing(
    call: Callable[[BlockManager], object], message: str | None
) -> None:
    m = busy_manager()
    before = m.snapshot()
    if message is None:  # there is no host pool to swap to
        with pytest.raises(OutOfBlocks, match="swap_out: 2 host blocks are needed and 0 are free"):
            call(m)
    else:
        with pytest.raises(InvalidArgumentError, match=f"BlockManager.{message}"):
            call(m)
    assert_unchanged(m, before)


def test_a_sequence_cannot_be_freed_twice() -> None:
    # Double free: the same block handed to two sequences afterwards.
    m = busy_manager()
    m.free(0)
    before = m.snapshot()
    with pytest.raises(InvalidArgumentError, match="0 was never added or has been freed"):
        m.free([1, 0])
    assert_unchanged(m, before)


def test_ids_are_never_reused() -> None:
    m = BlockManager(8, 4)
    ids = []
    for _ in range(100):
        ids.append(m.add([1]))
        m.free(ids[-1])
    assert ids == list(range(100))
    assert m.seqs() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "`num_blocks` must lie in 1"),
        ({"num_blocks": 2**31}, "`num_blocks` must lie in 1"),
        ({"num_blocks": 4.0}, "`num_blocks` must be an integer; got 4.0"),
        ({"block_size": 0}, "`block_size` must lie in 1"),
        ({"num_host_blocks": -1}, "`num_host_blocks` must lie in 0"),
        ({"watermark": 1.0}, r"`watermark` must lie in \[0, 1\)"),
        ({"watermark": -0.1}, r"`watermark` must lie in \[0, 1\)"),
        ({"watermark": float("nan")}, r"`watermark` must lie in \[0, 1\)"),
        ({"watermark": "a"}, "`watermark` must be a number"),
        ({"window": 0}, "`window` must lie in 1"),
        ({"seed": -1}, "`seed` must lie in 0"),
        ({"seed": 2**64}, "`seed` must lie in 0"),
        ({"seed": "a"}, "`seed` must be an integer or None"),
    ],
)
def test_a_wrong_parameter_makes_no_manager(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"BlockManager: {message}"):
        BlockManager(**{"num_blocks": 8, "block_size": 4, **arguments})


def test_a_pool_that_cannot_be_held_in_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        BlockManager(2**31 - 1, 2**31 - 1)


# --- looking ---------------------------------------------------------------------------------------------------------


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
        "cow_copies": 1,
        "window_released": 0,
        "preemptions": 0,
        "swapped_out_blocks": 0,
        "swapped_in_blocks": 0,
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


# --- snapshots and check ---------------------------------------------------------------------------------------------


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
    with pytest.raises(InvalidArgumentError, match="must have version 1; got 99"):
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
    name = data.draw(st.sampled_from([k for k, v in snapshot.items() if v.size and k != "namespaces"]))
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


@pytest.mark.parametrize(
    ("field", "damage", "message"),
    [
        ("free_blocks", lambda a: a[1:], "has leaked"),
        ("free_blocks", lambda a: np.append(a, a[0]), "is in the free lists twice"),
        ("evictable_blocks", lambda a: a[1:], "has leaked"),
        ("sequence_tables", lambda a: np.append(a[1:], a[-1]), "contradicts itself"),
        ("cached_tokens", lambda a: a + 1, "holds other tokens"),
        ("cached_parents", lambda a: np.full_like(a, -1), "contradicts itself"),
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


def test_check_passes_on_a_new_manager() -> None:
    BlockManager(8, 4).check()
    assert issubclass(InvalidArgumentError, PagedAttnError)


# --- the process -----------------------------------------------------------------------------------------------------


def test_the_garbage_collector_has_nothing_to_walk() -> None:
    before = len(gc.get_objects())
    m = BlockManager(10_000, 4)
    seqs = [m.add(range(i, i + 50)) for i in range(0, 10_000, 50)]
    m.step(seqs, 50)
    assert not gc.is_tracked(m)
    assert len(gc.get_objects()) - before < 50


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
