# SPDX-License-Identifier: Apache-2.0
"""The rules of the prefix cache, one by one."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from itertools import takewhile
from random import Random

import numpy as np
import pytest
from block_manager_helpers import add_computed, assert_unchanged, compute_all
from hypothesis import given, settings
from hypothesis import strategies as st
from pagedattn import BlockManager, OutOfBlocks
from pagedattn._errors import InvalidArgumentError

# --- prefix sharing ---------------------------------------------------------------------------------------------------


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
    assert m.match(range(8)) == 7
    assert m.num_cached_tokens(m.add(range(8))) == 7
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


def test_a_part_of_a_block_counts_as_a_hit_once_though_a_better_one_comes() -> None:
    m = BlockManager(16, 8)
    add_computed(m, [0, 1, 2, 3, 9, 9, 9, 9, 9])
    waiting = m.add(range(9))
    assert (m.num_cached_tokens(waiting), m.stats()["partial_hit_tokens"]) == (4, 4)
    before = m.stats()["prefix_hit_tokens"]
    add_computed(m, [0, 1, 2, 3, 4, 5, 9, 9, 9], extra_key=b"another")
    add_computed(m, [*range(8), 7])
    others = m.stats()["partial_hit_tokens"] - 4, m.stats()["prefix_hit_tokens"] - before
    assert m.take_prefix(waiting) == 8
    stats = m.stats()
    assert stats["partial_hit_tokens"] == others[0]  # the whole block instead
    assert stats["prefix_hit_tokens"] == before + others[1] + 4
    m.check()


def test_what_copies_of_a_prompt_find_is_no_hit_of_another_prompt() -> None:
    m = BlockManager(16, 8)
    add_computed(m, [0, 1, 2, 3, 9, 9, 9, 9, 9])
    waiting = m.add(range(9))
    forks = m.fork(waiting, 3)
    reordered = m.fork(waiting)
    m.reorder(reordered, [waiting])
    add_computed(m, [*range(8), 7])
    counted = ("prefix_queried_tokens", "prefix_hit_tokens", "partial_hit_tokens")
    assert m.take_prefix(waiting) == 8
    before = [m.stats()[name] for name in counted]
    assert [m.take_prefix(seq) for seq in (*forks, *reordered)] == [8, 8, 8, 8]
    assert [m.stats()[name] for name in counted] == before
    restored = BlockManager.restore(m.snapshot())
    m.preempt(forks[0])
    assert m.take_prefix(forks[0]) == 8  # which asks anew
    assert [m.stats()[name] for name in counted] == [before[0] + 9, before[1] + 8, before[2]]
    restored.free(restored.seqs())
    assert [restored.stats()[name] for name in counted] == before


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


# --- collisions and the hash ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_a_hash_collision_never_serves_another_prompt_s_blocks(bits: int) -> None:
    m = BlockManager(64, 2, seed=1)
    m._weaken_hash(bits)
    first: dict[tuple[int, ...], int] = {}  # the block that was published for each prefix
    prompts = [[a, b, c, d, 9] for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)]
    for i, prompt in enumerate(prompts):
        whole = max([0] + [2 * (p[:2] == prompt[:2]) + 2 * (p[:4] == prompt[:4]) for p in prompts[:i]])
        shared = max([0] + [next((k for k in range(4) if p[k] != prompt[k]), 4) for p in prompts[:i]])
        seq = m.add(prompt)
        # Of the block that differs, the half that it has in common with the newest of its siblings may be shared.
        assert m.num_cached_tokens(seq) in (whole, max(whole, shared))
        assert m.block_table(seq).tolist()[: whole // 2] == [
            first[tuple(prompt[: 2 * k])] for k in range(1, 1 + whole // 2)
        ]
        compute_all(m, seq)
        for k in (1, 2):
            first.setdefault(tuple(prompt[: 2 * k]), int(m.block_table(seq)[k - 1]))
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


# --- eviction ---------------------------------------------------------------------------------------------------------


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


@settings(max_examples=100)
@given(
    st.integers(4, 12),
    st.lists(st.lists(st.integers(0, 1), max_size=3), min_size=1, max_size=40),
)
def test_hits_are_those_of_an_ideal_lru_cache(num_blocks: int, prompts: list[list[int]]) -> None:
    m = BlockManager(num_blocks, 2)
    cached: OrderedDict[tuple[int, ...], None] = OrderedDict()  # unused prefixes, the next to be evicted first
    for symbols in prompts:
        # A block for each symbol, no two of which begin alike, and a last token that is in no whole block.
        prompt = [token for symbol in symbols for token in (2 * symbol, 2 * symbol + 1)] + [9]
        prefixes = [tuple(symbols[: i + 1]) for i in range(len(symbols))]
        hits = 0
        while hits < len(symbols) and prefixes[hits] in cached:
            hits += 1
        assert m.match(prompt) == 2 * hits
        seq = m.add(prompt)
        assert m.num_cached_tokens(seq) == 2 * hits
        for prefix in prefixes[:hits]:
            del cached[prefix]
        needed = len(symbols) + 1 - hits
        while needed > num_blocks - hits - len(cached):
            cached.popitem(last=False)
        compute_all(m, seq)
        m.free(seq)
        for prefix in reversed(prefixes):
            cached[prefix] = None
            cached.move_to_end(prefix)


# --- parts of blocks -------------------------------------------------------------------------------------------------


def test_a_prompt_shares_the_part_of_a_cached_block_that_it_begins_with() -> None:
    m = BlockManager(16, 8)
    a = add_computed(m, range(16))
    b = m.add([*range(13), 50, 51])
    assert m.num_cached_tokens(b) == m.num_computed_tokens(b) == 13
    assert m.block_table(b).tolist() == m.block_table(a).tolist()
    assert m.stats()["partial_hit_tokens"] == 5
    shared = int(m.block_table(a)[1])
    batch = m.step(b, 2)
    own = int(m.block_table(b)[1])
    assert own != shared
    assert batch.copies.tolist() == [[shared, own]]
    assert batch.slot_mapping.tolist() == [own * 8 + 5, own * 8 + 6]
    assert m.match([*range(16), 0]) == 16, "the cached block stays as it was"


def test_less_than_half_a_block_is_not_worth_a_copy() -> None:
    m = BlockManager(16, 8)
    m.free(add_computed(m, range(8)))
    assert m.match([0, 1, 2, 50, 51]) == 0
    assert m.match([0, 1, 2, 3, 51]) == 4


def test_a_part_of_a_block_is_copied_though_only_the_cache_holds_it() -> None:
    m = BlockManager(16, 4)
    m.free(add_computed(m, range(4)))
    b = m.add([0, 1, 2, 9, 9])
    assert m.num_cached_tokens(b) == 3
    batch = m.step(b, 2)
    assert batch.copies.tolist() == [[0, int(m.block_table(b)[0])]]
    assert m.match([0, 1, 2, 3, 9]) == 4
    assert m.match([0, 1, 2, 9, 9]) == 4
    assert m.ref_count(0) == 0


def test_a_borrowed_block_is_written_in_place_where_there_is_none_to_spare() -> None:
    # Holding the source while a copy is sought would wait for ever: the pool is as large as the prompt.
    m = BlockManager(2, 4)
    m.free(add_computed(m, range(4)))
    b = m.add([0, 1, 2, 9, 9, 9])
    assert m.num_cached_tokens(b) == 3
    assert m.step(b, 3).copies.shape == (0, 2)
    m.check()
    assert m.match([0, 1, 2, 3, 9]) == 3
    assert m.match([0, 1, 2, 9, 9]) == 4


def test_two_borrowers_of_one_block_get_a_copy_each() -> None:
    m = BlockManager(16, 4)
    m.free(add_computed(m, range(4)))
    seqs = [m.add([0, 1, 2, 9, 9]), m.add([0, 1, 2, 8])]
    batch = m.step(seqs, [2, 1])
    tables = [int(m.block_table(seq)[0]) for seq in seqs]
    assert batch.copies.tolist() == [[0, tables[0]], [0, tables[1]]]
    assert len({0, *tables}) == 3
    m.check()


def test_a_copied_source_is_never_handed_out_in_the_same_step() -> None:
    # The copies of a step run at once: a block that is source and destination would be read half overwritten.
    m = BlockManager(4, 4)
    m.free(add_computed(m, range(4)))
    borrower = m.add([0, 1, 2, 9])
    others = [m.add([50 + i]) for i in range(2)]
    batch = m.step([borrower, *others], 1)
    assert batch.copies[:, 0].tolist() == [0]
    assert 0 not in batch.block_tables[:, 0].tolist()
    with pytest.raises(OutOfBlocks):
        m.step(m.add(range(90, 96)), 6)


def test_a_waiting_borrower_takes_the_whole_block_when_it_has_been_computed() -> None:
    m = BlockManager(16, 4)
    m.free(add_computed(m, [0, 1, 2, 7]))
    a, b = m.add(range(6)), m.add(range(6))
    assert m.num_cached_tokens(b) == 3
    compute_all(m, a)
    assert m.take_prefix(b) == 4
    assert m.block_table(b)[0] == m.block_table(a)[0]
    m.check()


def test_a_fork_of_a_borrower_writes_to_a_block_of_its_own() -> None:
    m = BlockManager(16, 4)
    m.free(add_computed(m, range(4)))
    a = m.add([0, 1, 2, 9])
    b = m.fork(a)[0]
    batch = m.step([a, b], 1)
    tables = {int(m.block_table(seq)[0]) for seq in (a, b)}
    assert len(tables | {0}) >= 2
    assert batch.copies[:, 0].tolist() == [0, 0]
    m.check()


# --- pins ------------------------------------------------------------------------------------------------------------


def test_a_pinned_prefix_is_not_evicted() -> None:
    m = BlockManager(4, 2)
    m.free(add_computed(m, [1, 2, 3, 4, 5]))
    pin = m.pin([1, 2, 3, 4, 5])
    assert m.num_pinned_tokens(pin) == 4
    assert m.num_free_blocks == 2
    for i in range(4):
        m.free(add_computed(m, [50 + i] * 3))
        m.check()
    assert m.match([1, 2, 3, 4, 5]) == 4
    m.unpin(pin)
    assert m.num_free_blocks == 4
    m.free(add_computed(m, range(90, 97)))
    assert m.match([1, 2, 3, 4, 5]) == 0


def test_a_pin_is_no_sequence() -> None:
    m = BlockManager(4, 2)
    seq = add_computed(m, [1, 2])
    pin = m.pin([1, 2])
    assert (m.seqs(), m.pins()) == ([seq], [pin])
    for call in (m.free, m.preempt, m.swap_out, m.num_tokens, lambda p: m.step(p, 1), lambda p: m.append(p, 1)):
        with pytest.raises(InvalidArgumentError, match=f"{pin} is a pin"):
            call(pin)
    with pytest.raises(InvalidArgumentError, match="name pins"):
        m.unpin(seq)
    with pytest.raises(InvalidArgumentError, match="name pins, each once"):
        m.unpin([pin, pin])
    m.unpin(pin)
    with pytest.raises(InvalidArgumentError, match="name pins"):
        m.unpin(pin)
    m.check()


def test_what_is_not_cached_cannot_be_pinned() -> None:
    m = BlockManager(4, 2)
    add_computed(m, [1, 2])
    for prompt, key in (([1], b""), ([2, 1], b""), ([1, 2], b"another"), ([], b"")):
        with pytest.raises(InvalidArgumentError, match="begin with a cached block"):
            m.pin(prompt, extra_key=key)
    with pytest.raises(InvalidArgumentError, match="begin with a cached block"):
        BlockManager(4, 2, prefix_caching=False).pin([1, 2])


def test_pins_keep_nothing_after_the_cache_was_reset() -> None:
    m = BlockManager(4, 2)
    m.free(add_computed(m, [1, 2]))
    pin = m.pin([1, 2])
    m.reset_prefix_cache()
    m.check()
    assert m.num_pinned_tokens(pin) == 0
    assert m.num_free_blocks == 4
    m.unpin(pin)


# --- events and names ------------------------------------------------------------------------------------------------


def test_events_tell_what_is_stored_evicted_and_removed() -> None:
    m = BlockManager(2, 2, num_events=8)
    m.free(add_computed(m, [1, 2, 3, 4]))
    first, second = m.block_hashes([1, 2, 3, 4])
    events = m.events()
    assert events["kind"].tolist() == [BlockManager.EVENT_STORED, BlockManager.EVENT_STORED]
    np.testing.assert_array_equal(events["hash"], [first, second])
    np.testing.assert_array_equal(events["parent_hash"][1], first)
    assert events["token_ids"].tolist() == [[1, 2], [3, 4]]
    assert len(m.events()) == 0
    m.free(add_computed(m, [9]))  # takes the place of the tail
    m.reset_prefix_cache()
    events = m.events()
    assert events["kind"].tolist() == [BlockManager.EVENT_EVICTED, BlockManager.EVENT_REMOVED]
    np.testing.assert_array_equal(events["hash"], [second, first])
    assert events["block"].tolist() == [1, 0]


def test_a_router_that_follows_the_events_knows_the_cache() -> None:
    m = BlockManager(6, 2, num_events=1000)
    r = Random(secrets.randbits(32))
    known: set[tuple[int, ...]] = set()
    for _ in range(60):
        prompt = [r.randint(0, 2) for _ in range(r.randint(1, 9))]
        m.free(add_computed(m, prompt, extra_key=r.choice([b"", b"x"])))
        for event in m.events():
            name = tuple(event["hash"].tolist())
            assert (name in known) == (event["kind"] != BlockManager.EVENT_STORED)
            known ^= {name}
        assert len(known) == m.num_cached_blocks
        for key in (b"", b"x"):
            names = [tuple(name) for name in m.block_hashes(prompt, extra_key=key).tolist()]
            cached = len(list(takewhile(known.__contains__, names)))
            assert m.match([*prompt, 0], extra_key=key) // 2 == cached


def test_a_full_ring_drops_the_oldest_events_and_counts_them() -> None:
    m = BlockManager(8, 2, num_events=3)
    add_computed(m, range(10))
    assert m.stats()["dropped_events"] == 2
    assert m.events()["block"].tolist() == [2, 3, 4]
    assert BlockManager(8, 2).events().shape == (0,)


def test_names_are_equal_for_one_seed_and_follow_the_whole_prefix() -> None:
    a, b, c = BlockManager(4, 3, seed=5), BlockManager(9, 3, seed=5), BlockManager(4, 3)
    names = a.block_hashes(range(10))
    assert names.shape == (3, 2)
    assert names.dtype == np.uint64
    np.testing.assert_array_equal(names, b.block_hashes(np.arange(10)))
    assert not (names == c.block_hashes(range(10))).any()
    assert not (names == a.block_hashes(range(10), extra_key=b"x")).any()
    assert not (names == a.block_hashes([1, *range(1, 10)])).any()
    np.testing.assert_array_equal(names[:2], a.block_hashes([*range(8), 0])[:2])
    assert len(np.unique(a.block_hashes(np.zeros(3000, int)).ravel())) == 2000
