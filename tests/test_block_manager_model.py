# SPDX-License-Identifier: Apache-2.0
"""Random calls against a model of what the blocks contain.

The model knows nothing of how blocks are chosen.  It keeps a toy KV cache in which the entry of a slot is the whole
prefix, namespace included, that a real entry would be computed from; it carries out what the manager says (copies,
writes, swaps) and then looks through every block table, as a kernel would.  A wrongly shared, doubly used, lost or
overwritten block shows as a wrong prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pagedattn import BlockManager, OutOfBlocks
from pagedattn._block_manager import StepBatch
from pagedattn._errors import InvalidArgumentError

Prefix = tuple[bytes, tuple[int, ...]]


@dataclass
class Sequence:
    key: bytes
    tokens: list[int]
    computed: int = 0
    swapped: bool = False
    started: bool = False

    def entry(self, position: int) -> Prefix:
        return self.key, tuple(self.tokens[: position + 1])


def attempt(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """What a call returned, or the error that it raised."""
    try:
        return call(*arguments, **options), None
    except (OutOfBlocks, InvalidArgumentError) as error:
        return None, error


def same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


class BlockManagerModel(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(3, 20),
        block_size=st.integers(1, 4),
        num_host_blocks=st.integers(0, 12),
        prefix_caching=st.sampled_from([True, True, True, False]),
        window=st.sampled_from([None, None, 1, 3, 6]),
        watermark=st.sampled_from([0.0, 0.0, 0.2]),
        hash_bits=st.sampled_from([64, 64, 0, 1]),
    )
    def make(self, hash_bits: int, **config: object) -> None:
        self.m = BlockManager(**config)
        self.m._weaken_hash(hash_bits)
        self.hash_bits = hash_bits
        self.kv: dict[int, Prefix] = {}
        self.host_kv: dict[int, Prefix] = {}
        self.sequences: dict[int, Sequence] = {}
        self.batch = StepBatch(32, 128, 512)

    # --- helpers ---

    def some(self, data: st.DataObject, **state: bool) -> int | None:
        ids = [i for i, s in self.sequences.items() if all(getattr(s, k) == v for k, v in state.items())]
        return data.draw(st.sampled_from(ids)) if ids else None

    def several(self, data: st.DataObject, **state: bool) -> list[int]:
        ids = [i for i, s in self.sequences.items() if all(getattr(s, k) == v for k, v in state.items())]
        return data.draw(st.lists(st.sampled_from(ids), unique=True, min_size=1)) if ids else []

    def needed_blocks(self, seqs: list[int], counts: list[int]) -> int:
        size = self.m.block_size
        needed, references = 0, {}
        for seq, count in zip(seqs, counts, strict=True):
            table, computed = self.m.block_table(seq), self.sequences[seq].computed
            needed += -(-(computed + count) // size) - len(table)
            if computed % size:
                last = int(table[-1])
                references.setdefault(last, self.m.ref_count(last))
                if references[last] > 1:
                    references[last] -= 1
                    needed += 1
        return needed

    def first_visible(self, position: int) -> int:
        return 0 if self.m.window is None else max(0, position - self.m.window + 1)

    # --- rules ---

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        key=st.sampled_from([b"", b"", b"a"]),
        priority=st.sampled_from([0, 0, -1, 1]),
    )
    def add(self, tokens: list[int], key: bytes, priority: int) -> None:
        size, window = self.m.block_size, self.m.window
        blocks = -(-len(tokens) // size)
        if window is not None:
            blocks = min(blocks, -(-(window - 1) // size) + 1)
        expected = self.m.match(tokens, extra_key=key)
        if blocks > self.m.num_blocks:
            with pytest.raises(InvalidArgumentError, match="fit into the pool"):
                self.m.add(tokens, extra_key=key, priority=priority)
            return
        seq = self.m.add(tokens, extra_key=key, priority=priority)
        cached = self.m.num_cached_tokens(seq)
        assert cached == expected
        assert cached <= len(tokens) - 1
        assert cached % size == 0
        assert self.m.prefix_caching or cached == 0
        self.sequences[seq] = Sequence(key, tokens, cached)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        ready = [i for i, s in self.sequences.items() if not s.swapped and s.computed < len(s.tokens)]
        if not ready:
            return
        seqs = data.draw(st.lists(st.sampled_from(ready), unique=True, min_size=1))
        counts = [data.draw(st.integers(1, len(self.sequences[i].tokens) - self.sequences[i].computed)) for i in seqs]
        needed, free = self.needed_blocks(seqs, counts), self.m.num_free_blocks
        before = self.m.snapshot()
        batch, error = attempt(self.m.step, seqs, counts, out=self.batch if data.draw(st.booleans()) else None)
        if error:
            admits = any(not self.sequences[i].started for i in seqs)
            reserve = int(self.m.watermark * self.m.num_blocks) if admits else 0
            assert needed + reserve > free
            assert (error.needed, error.free) == (needed, max(0, free - reserve))
            assert same_state(before, self.m.snapshot())
            return
        assert needed <= free
        self.run(seqs, counts, batch)

    def run(self, seqs: list[int], counts: list[int], batch: StepBatch) -> None:
        """What the kernels do with a batch."""
        size = self.m.block_size
        copied = {dst: [self.kv.get(src * size + k) for k in range(size)] for src, dst in batch.copies.tolist()}
        for dst, entries in copied.items():
            self.kv.update({dst * size + k: entry for k, entry in enumerate(entries)})
        assert len(set(batch.slot_mapping.tolist())) == sum(counts), "two tokens got one slot"
        assert batch.query_start_loc.tolist() == [0, *np.cumsum(counts).tolist()]
        slots, positions = iter(batch.slot_mapping.tolist()), iter(batch.positions.tolist())
        for seq, count in zip(seqs, counts, strict=True):
            s = self.sequences[seq]
            for position in range(s.computed, s.computed + count):
                assert next(positions) == position
                self.kv[next(slots)] = s.entry(position)
        for i, (seq, count) in enumerate(zip(seqs, counts, strict=True)):
            s = self.sequences[seq]
            start, s.computed, s.started = s.computed, s.computed + count, True
            assert batch.seq_lens[i] == s.computed
            for position in range(self.first_visible(start), s.computed):
                slot = int(batch.block_tables[i, position // size]) * size + position % size
                assert self.kv[slot] == s.entry(position), "a kernel would read another prompt's KV"

    @rule(data=st.data(), count=st.integers(1, 5))
    def append(self, data: st.DataObject, count: int) -> None:
        seqs = [i for i in self.several(data) if len(self.sequences[i].tokens) < 3 * self.m.block_size * 4]
        new = [data.draw(st.lists(st.integers(0, 1), min_size=0, max_size=count)) for _ in seqs]
        starts = np.cumsum([0, *map(len, new)])
        _, error = attempt(self.m.append, seqs, [t for tokens in new for t in tokens], starts)
        if error:
            assert "fit into the pool" in str(error)
            return
        for seq, tokens in zip(seqs, new, strict=True):
            self.sequences[seq].tokens = self.sequences[seq].tokens + tokens

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq = self.some(data)
        if seq is None:
            return
        s = self.sequences[seq]
        keep = data.draw(st.integers(1, len(s.tokens)))
        _, error = attempt(self.m.truncate, seq, keep)
        if error:
            assert self.m.window is not None
            assert keep < s.computed
            return
        s.tokens = s.tokens[:keep]
        s.computed = min(s.computed, keep)

    @rule(data=st.data(), n=st.integers(1, 2))
    def fork(self, data: st.DataObject, n: int) -> None:
        seq = self.some(data)
        if seq is None or len(self.sequences) > 12:
            return
        free = self.m.num_free_blocks
        for child in self.m.fork(seq, n):
            s = self.sequences[seq]
            self.sequences[child] = Sequence(s.key, list(s.tokens), s.computed, s.swapped, s.started)
        assert self.m.num_free_blocks == free, "a fork took blocks"

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seqs = self.several(data)
        self.m.free(seqs)
        for seq in seqs:
            del self.sequences[seq]

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        seqs = self.several(data)
        self.m.preempt(seqs)
        for seq in seqs:
            s = self.sequences[seq]
            s.computed, s.swapped, s.started = 0, False, False

    @rule(data=st.data())
    def take_prefix(self, data: st.DataObject) -> None:
        seq = self.some(data, started=False, swapped=False)
        if seq is None:
            return
        s = self.sequences[seq]
        self.m.take_prefix(seq)
        cached = self.m.num_computed_tokens(seq)
        assert s.computed <= cached < len(s.tokens) or cached == s.computed
        s.computed = cached

    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        seqs = self.several(data, swapped=False)
        before, size = self.m.snapshot(), self.m.block_size
        mapping, error = attempt(self.m.swap_out, seqs)
        if error:
            assert error.needed > error.free == self.m.num_free_host_blocks
            assert same_state(before, self.m.snapshot())
            return
        for src, dst in mapping.tolist():
            for k in range(size):
                self.host_kv[dst * size + k] = self.kv.get(src * size + k)
        for seq in seqs:
            self.sequences[seq].swapped = True

    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        seqs = self.several(data, swapped=True)
        before, size = self.m.snapshot(), self.m.block_size
        mapping, error = attempt(self.m.swap_in, seqs)
        if error:
            assert error.needed > error.free
            assert same_state(before, self.m.snapshot())
            return
        for src, dst in mapping.tolist():
            for k in range(size):
                self.kv[dst * size + k] = self.host_kv.get(src * size + k)
        for seq in seqs:
            self.sequences[seq].swapped = False

    @rule()
    def snapshot_and_restore(self) -> None:
        before = self.m.snapshot()
        self.m = BlockManager.restore(before)
        self.m._weaken_hash(self.hash_bits)
        assert same_state(before, self.m.snapshot())

    @precondition(lambda self: self.m.num_cached_blocks > 4)
    @rule()
    def reset_prefix_cache(self) -> None:
        self.m.reset_prefix_cache()
        assert self.m.num_cached_blocks == 0

    @rule(unknown=st.sampled_from([-1, 10**6]))
    def name_a_sequence_that_is_not_there(self, unknown: int) -> None:
        before = self.m.snapshot()
        seqs = [*self.sequences, unknown]
        for call in (self.m.free, self.m.preempt, self.m.swap_out, self.m.swap_in, lambda ids: self.m.step(ids, 1)):
            with pytest.raises(InvalidArgumentError):
                call(seqs)
        assert same_state(before, self.m.snapshot())

    # --- invariants ---

    @invariant()
    def every_table_shows_the_sequence_s_own_prefix(self) -> None:
        size = self.m.block_size
        writable: dict[int, int] = {}
        for seq, s in self.sequences.items():
            assert self.m.num_computed_tokens(seq) == s.computed
            assert self.m.token_ids(seq).tolist() == s.tokens
            assert self.m.is_swapped(seq) == s.swapped
            table = self.m.block_table(seq).tolist()
            assert len(table) == -(-s.computed // size)
            cache = self.host_kv if s.swapped else self.kv
            for position in range(self.first_visible(s.computed), s.computed):
                slot = table[position // size] * size + position % size
                assert cache[slot] == s.entry(position), "a block holds another prompt's KV"
            if s.computed % size and not s.swapped:
                writable[table[-1]] = writable.get(table[-1], 0) + 1
        for block, sharers in writable.items():
            assert self.m.ref_count(block) >= sharers

    @invariant()
    def the_manager_finds_no_fault_with_itself(self) -> None:
        self.m.check()

    def teardown(self) -> None:
        if not hasattr(self, "m"):
            return
        self.m.free(list(self.sequences))
        self.m.check()
        assert self.m.num_free_blocks == self.m.num_blocks, "blocks leaked"
        assert self.m.num_free_host_blocks == self.m.num_host_blocks, "host blocks leaked"
        assert self.m.usage == 0


BlockManagerModel.TestCase.settings = settings(
    deadline=None, max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
TestBlockManagerModel = BlockManagerModel.TestCase
