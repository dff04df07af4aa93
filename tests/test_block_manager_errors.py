# SPDX-License-Identifier: Apache-2.0
"""Wrong calls say what is wrong and change nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from block_manager_helpers import add_computed, assert_unchanged
from pagedattn import BlockManager, OutOfBlocks, StepBatch
from pagedattn._errors import InvalidArgumentError, PagedAttnError

# --- wrong calls ------------------------------------------------------------------------------------------------------


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
        (lambda m: m.add("text"), "add: `token_ids` must be a sequence or array of integers; got str"),
        (lambda m: m.add(7), "add: `token_ids` must be a sequence or array of integers; got int"),
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
        (
            lambda m: m.step(0, 1, token_ids=[1, 2]),
            "step: `token_ids` must hold one token for each of 1 sequences; got 2",
        ),
        (lambda m: m.step(0, 1, token_ids=[-2]), r"step: `token_ids` must lie in -1 \.\.\. 2147483647; got -2"),
        (lambda m: m.step(0, 2, token_ids=[1]), r"step: `num_new_tokens` must lie in 1 \.\.\. 1"),
        (lambda m: m.step([1], [1], out={}), "step: `out` must be a StepBatch; got dict"),
        (lambda m: m.step("1", 1), "step: `seqs` must be a sequence or array of integers; got str"),
        (lambda m: m.free(7), "free: `seqs` must name live sequences; 7 was never added or has been freed"),
        (lambda m: m.free([1, 0, 1]), "free: `seqs` must name each sequence once; 1 is repeated"),
        (lambda m: m.free(-1), "free: `seqs` must name live sequences; -1"),
        (lambda m: m.reorder([0, 0], [1, 1]), "reorder: `seqs` must name each sequence once; 0 is repeated"),
        (lambda m: m.reorder([0, 1], [1, 9]), "reorder: `parents` must name live sequences; got 9"),
        (lambda m: m.reorder([0, 1], [0]), "reorder: `parents` must hold one parent for each of 2 sequences; got 1"),
        (lambda m: m.pin([5, 5, 5, 5]), "pin: `token_ids` must begin with a cached block"),
        (lambda m: m.unpin(0), "unpin: `pins` must name pins, each once; got 0"),
        (lambda m: m.num_pinned_tokens(0), "num_pinned_tokens: `pin` must be a pin; got 0"),
        (lambda m: m.block_hashes([-1]), "block_hashes: `token_ids` must lie in"),
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
        ({"watermark": "a"}, "`watermark` must be a real number; got 'a'"),
        ({"watermark": "0.5"}, "`watermark` must be a real number; got '0.5'"),
        ({"watermark": False}, "`watermark` must be a real number; got False"),
        ({"watermark": np.array(0.5)}, "`watermark` must be a real number; got array"),
        ({"watermark": 10**400}, r"`watermark` must lie in \[0, 1\)"),
        ({"watermark": Fraction(10**30 - 1, 10**30)}, r"`watermark` must lie in \[0, 1\)"),
        ({"prefix_caching": "no"}, "`prefix_caching` must be a bool; got 'no'"),
        ({"prefix_caching": 1}, "`prefix_caching` must be a bool; got 1"),
        ({"prefix_caching": None}, "`prefix_caching` must be a bool; got None"),
        ({"window": 0}, "`window` must lie in 1"),
        ({"seed": -1}, "`seed` must lie in 0"),
        ({"seed": 2**64}, "`seed` must lie in 0"),
        ({"seed": "a"}, "`seed` must be an integer or None"),
    ],
)
def test_a_wrong_parameter_makes_no_manager(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"BlockManager: {message}"):
        BlockManager(**{"num_blocks": 8, "block_size": 4, **arguments})


def test_flags_and_numbers_of_numpy_are_taken() -> None:
    m = BlockManager(8, 4, prefix_caching=np.False_, watermark=np.float32(0.25))
    assert (m.prefix_caching, m.watermark) == (False, 0.25)
    assert BlockManager(8, 4, watermark=Fraction(1, 4)).watermark == 0.25
    assert BlockManager(8, 4, watermark=0).watermark == 0


@pytest.mark.parametrize("argument", ["max_seqs", "max_blocks", "max_tokens"])
def test_a_wrong_capacity_of_a_batch_names_the_batch(argument: str) -> None:
    capacities = {"max_seqs": 1, "max_blocks": 1, "max_tokens": 1}
    for value, rule in ((-1, r"lie in 0 \.\.\. 2147483647; got -1"), ("a", "be an integer; got 'a'")):
        with pytest.raises(InvalidArgumentError, match=f"^StepBatch: `{argument}` must {rule}"):
            StepBatch(**{**capacities, argument: value})


@pytest.mark.parametrize(
    ("capacities", "size"),
    [((2**31 - 1, 2**31 - 1, 1), 18446744108069289984), ((2**31 - 1, 2**29 - 7, 0), 4611686007689969672)],
)
def test_a_batch_that_cannot_be_held_in_memory_says_how_large_it_is(
    capacities: tuple[int, int, int], size: int
) -> None:
    with pytest.raises(MemoryError, match=f"StepBatch: arrays of {size} bytes do not fit into memory"):
        StepBatch(*capacities)


def test_a_pool_that_cannot_be_held_in_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        BlockManager(2**31 - 1, 2**31 - 1)


def test_a_manager_that_was_never_initialised_says_so_instead_of_crashing() -> None:
    bare = BlockManager.__new__(BlockManager)
    two_arguments = {"append", "reorder", "step", "truncate"}
    of_tokens = {"add", "match", "pin", "block_hashes"}
    of_nothing = {"pins", "events", "reset_prefix_cache", "seqs", "stats", "check", "layout", "snapshot"}
    names = [name for name, value in vars(BlockManager).items() if hasattr(value, "__get__") and name[0] != "_"]
    names.remove("restore")
    assert len(names) > 40
    for name in [*names, "__repr__", "_repr_svg_", "_weaken_hash"]:
        arguments: tuple[object, ...] = (1,)
        if name in two_arguments:
            arguments = (1, 1)
        elif name in of_tokens:
            arguments = ([1],)
        elif name in of_nothing or name in ("__repr__", "_repr_svg_"):
            arguments = ()
        with pytest.raises(PagedAttnError, match="`__init__` has not been called"):
            getattr(bare, name)(*arguments)


def test_a_manager_that_is_initialised_again_says_so_and_keeps_its_state() -> None:
    m = busy_manager()
    before = m.snapshot()
    for again in (m, BlockManager.restore(before)):
        with pytest.raises(PagedAttnError, match="BlockManager: `__init__` has been called already"):
            again.__init__(100, 4)
        assert_unchanged(again, before)


def test_a_restore_into_a_manager_that_exists_is_refused_and_leaves_it() -> None:
    class OnlyOne(BlockManager):
        def __new__(cls, *_: object, **__: object) -> OnlyOne:
            return one

    one = BlockManager.__new__(OnlyOne)
    one.__init__(8, 4)
    add_computed(one, range(6))
    before = one.snapshot()
    with pytest.raises(PagedAttnError, match="has been called already"):
        OnlyOne.restore(busy_manager().snapshot())
    assert_unchanged(one, before)


def test_a_manager_may_be_initialised_again_while_others_are_inside_it() -> None:
    # In a process of its own: it crashed.
    script = """
import threading
import pagedattn

m, refused = pagedattn.BlockManager(5000, 4), 0
stop = threading.Event()

def work(i):
    while not stop.is_set():
        seq = m.add(range(i * 100000, i * 100000 + 4000))
        m.step(seq, m.num_tokens(seq) - m.num_computed_tokens(seq))
        m.free(seq)

threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
for thread in threads:
    thread.start()
for _ in range(100):
    try:
        m.__init__(5000, 4)
    except pagedattn.PagedAttnError:
        refused += 1
stop.set()
for thread in threads:
    thread.join()
m.check()
assert refused == 100 and m.seqs() == [], (refused, m.seqs())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_batch_that_was_never_initialised_is_refused() -> None:
    m = BlockManager(4, 4)
    with pytest.raises(InvalidArgumentError, match="`out` must have arrays"):
        m.step([], [], StepBatch.__new__(StepBatch))
