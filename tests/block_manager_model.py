# SPDX-License-Identifier: Apache-2.0
"""A block manager beside a model of what its blocks contain.

The model knows nothing of how blocks are chosen.  It keeps a toy KV cache in which the entry of a slot is a number for
the whole prefix, namespace included, that a real entry would be computed from; it carries out what the manager says
(copies, writes, swaps) and then looks through every block table, as a kernel would.  A wrongly shared, doubly used,
lost or overwritten block shows as a wrong prefix.

    python tests/block_manager_model.py CALLS [SEED]

makes so many random calls, compares and proves the invariants after each, and says how often what happened.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
import pytest
from pagedattn import BlockManager, OutOfBlocks
from pagedattn._block_manager import StepBatch
from pagedattn._errors import InvalidArgumentError

OTHER_TOKEN = 7  # in no prompt

Block = list[int]  # the entries of its slots; 0 where nothing was written

# A number for each prefix: for the namespace or the prefix before it, and its last token.
_PREFIXES: dict[tuple[bytes | int, int], int] = {}


@dataclass
class Sequence:
    key: bytes
    tokens: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)  # the entry of each token
    computed: int = 0
    swapped: bool = False
    started: bool = False

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    def append(self, tokens: list[int]) -> None:
        for token in tokens:
            before = self.prefixes[-1] if self.prefixes else self.key
            self.prefixes.append(_PREFIXES.setdefault((before, token), len(_PREFIXES) + 1))
        self.tokens += tokens

    def cut(self, keep: int) -> None:
        del self.tokens[keep:], self.prefixes[keep:]
        self.computed = min(self.computed, keep)

    def copy(self) -> Sequence:
        return replace(self, tokens=[*self.tokens], prefixes=[*self.prefixes])


def attempt(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """What a call returned, or the error that it raised."""
    try:
        return call(*arguments, **options), None
    except (OutOfBlocks, InvalidArgumentError) as error:
        return None, error


def same_state(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


class CheckedManager:
    """A manager and its model.  Each method makes one random call, carries it out on both and compares."""

    MAX_SEQUENCES = 12

    def __init__(self, hash_bits: int, **config: Any) -> None:
        self.m = BlockManager(**config)
        self.m._weaken_hash(hash_bits)
        self.hash_bits = hash_bits
        self.kv: list[Block] = [[0] * self.m.block_size for _ in range(self.m.num_blocks)]
        self.host_kv: list[Block] = [[0] * self.m.block_size for _ in range(self.m.num_host_blocks)]
        self.sequences: dict[int, Sequence] = {}
        self.pins: dict[int, tuple[bytes, list[int]]] = {}
        self.cached: set[int] = set()  # the blocks that the prefix cache offers, as its events tell
        self.batch = StepBatch(32, 128, 1024)

    @classmethod
    def random(cls, r: Random) -> CheckedManager:
        return cls(
            hash_bits=r.choice([64, 64, 0, 1]),
            num_blocks=r.choice([r.randint(3, 24), r.randint(3, 24), r.randint(25, 150)]),
            block_size=r.randint(1, 4),
            num_host_blocks=r.randint(0, 16),
            prefix_caching=r.random() < 0.85,
            window=r.choice([None, None, None, 1, 3, 6]),
            watermark=r.choice([0.0, 0.0, 0.2]),
            num_events=1000,
        )

    # --- choosing ---

    def ids(self, **state: bool) -> list[int]:
        return [i for i, s in self.sequences.items() if all(getattr(s, k) == v for k, v in state.items())]

    def some(self, r: Random, ids: list[int]) -> list[int]:
        return r.sample(ids, r.randint(1, len(ids)))

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks that a sequence of so many tokens needs at once, whatever its steps."""
        size, window = self.m.block_size, self.m.window
        blocks = -(-num_tokens // size)
        return blocks if window is None else min(blocks, -(-(window - 1) // size) + 1)

    # --- calls ---

    def add(self, r: Random) -> None:
        size = self.m.block_size
        tokens = [r.randint(0, 1) for _ in range(r.randint(1, 5 * size))]
        key, priority = r.choice([b"", b"", b"a"]), r.choice([0, 0, -1, 1])
        blocks = self.most_blocks(len(tokens))
        expected = self.m.match(tokens, extra_key=key)
        seq, error = attempt(self.m.add, tokens, extra_key=key, priority=priority)
        assert (error is not None) == (blocks > self.m.num_blocks)
        if error:
            return
        cached = self.m.num_cached_tokens(seq)
        assert cached == expected
        assert cached <= len(tokens) - 1
        assert cached % size == 0 or 2 * (cached % size) >= size
        assert self.m.prefix_caching or cached == 0
        s = self.sequences[seq] = Sequence(key, computed=cached)
        s.append(tokens)

    def step(self, r: Random) -> None:
        seqs = self.some(r, [i for i in self.ids(swapped=False) if self.sequences[i].pending])
        counts = [r.randint(1, self.sequences[i].pending) for i in seqs]
        self.try_step(seqs, counts, reuse=r.random() < 0.5)

    def decode(self, r: Random) -> None:
        """The common step: a sampled token for everybody, and all that is known is computed."""
        seqs = self.some(r, self.ids(swapped=False))
        pending = [self.sequences[i].pending for i in seqs]
        sampled = [r.randint(0, 1) if count == 0 or r.random() < 0.5 else -1 for count in pending]
        counts = [count + (token >= 0) for count, token in zip(pending, sampled, strict=True)]
        self.try_step(seqs, counts, reuse=r.random() < 0.5, sampled=sampled)

    def append(self, r: Random) -> None:
        seqs = self.some(r, self.ids())
        self.try_append(seqs, [[r.randint(0, 1) for _ in range(r.randint(0, 4))] for _ in seqs])

    def truncate(self, r: Random) -> None:
        seq = r.choice(self.ids())
        s = self.sequences[seq]
        keep = r.randint(max(1, len(s.tokens) - 6), len(s.tokens))
        _, error = attempt(self.m.truncate, seq, keep)
        if error:
            assert self.m.window is not None
            assert keep < s.computed
            return
        s.cut(keep)

    def fork(self, r: Random) -> None:
        seq = r.choice(self.ids())
        free = self.m.num_free_blocks
        s = self.sequences[seq]
        for child in self.m.fork(seq, r.randint(1, 2)):
            self.sequences[child] = s.copy()
        assert self.m.num_free_blocks == free, "a fork took blocks"

    def reorder(self, r: Random) -> None:
        seqs = self.some(r, self.ids())
        parents = [r.choice(self.ids()) for _ in seqs]
        held = self.m.usage
        self.m.reorder(seqs, parents)
        assert self.m.usage <= held, "reordering took blocks"
        old = dict(self.sequences)
        for seq, parent in zip(seqs, parents, strict=True):
            self.sequences[seq] = old[parent].copy()

    def pin(self, r: Random) -> None:
        s = self.sequences[r.choice(self.ids())]
        prompt = s.tokens[: r.randint(1, len(s.tokens))]
        cached = self.m.match([*prompt, OTHER_TOKEN], extra_key=s.key)
        cached -= cached % self.m.block_size
        pin, error = attempt(self.m.pin, prompt, extra_key=s.key)
        assert (error is not None) == (cached == 0)
        if pin is not None:
            assert self.m.num_pinned_tokens(pin) == cached
            self.pins[pin] = s.key, prompt[:cached]

    def unpin(self, r: Random) -> None:
        pins = self.some(r, list(self.pins))
        self.m.unpin(pins)
        for pin in pins:
            del self.pins[pin]

    def free(self, r: Random) -> None:
        seqs = self.some(r, self.ids())[:3]
        self.m.free(seqs)
        for seq in seqs:
            del self.sequences[seq]

    def preempt(self, r: Random) -> None:
        seqs = self.some(r, self.ids())[:2]
        self.m.preempt(seqs)
        for seq in seqs:
            s = self.sequences[seq]
            s.computed, s.swapped, s.started = 0, False, False

    def take_prefix(self, r: Random) -> None:
        seq = r.choice(self.ids(started=False, swapped=False))
        s = self.sequences[seq]
        self.m.take_prefix(seq)
        computed = self.m.num_computed_tokens(seq)
        assert s.computed <= computed
        assert computed < len(s.tokens) or computed == s.computed
        s.computed = computed

    def swap_out(self, r: Random) -> None:
        seqs = self.some(r, self.ids(swapped=False))
        before = self.m.snapshot()
        mapping, error = attempt(self.m.swap_out, seqs)
        if error:
            assert error.needed > error.free
            assert error.free == self.m.num_free_host_blocks
            assert same_state(before, self.m.snapshot())
            return
        self.copy(self.kv, self.host_kv, mapping)
        for seq in seqs:
            self.sequences[seq].swapped = True

    def swap_in(self, r: Random) -> None:
        seqs = self.some(r, self.ids(swapped=True))
        before = self.m.snapshot()
        mapping, error = attempt(self.m.swap_in, seqs)
        if error:
            assert error.needed > error.free
            assert same_state(before, self.m.snapshot())
            return
        self.copy(self.host_kv, self.kv, mapping)
        for seq in seqs:
            self.sequences[seq].swapped = False

    def snapshot_and_restore(self, _: Random) -> None:
        before = self.m.snapshot()
        self.m = BlockManager._restore(before, self.hash_bits)
        assert same_state(before, self.m.snapshot())

    def reset_prefix_cache(self, _: Random) -> None:
        self.m.reset_prefix_cache()
        assert self.m.num_cached_blocks == 0
        self.pins = {pin: (key, []) for pin, (key, _) in self.pins.items()}

    def name_a_sequence_that_is_not_there(self, r: Random) -> None:
        before = self.m.snapshot()
        seqs = [*self.sequences, r.choice([-1, 10**6])]
        for call in (self.m.free, self.m.preempt, self.m.swap_out, self.m.swap_in, lambda ids: self.m.step(ids, 1)):
            with pytest.raises(InvalidArgumentError):
                call(seqs)
        assert same_state(before, self.m.snapshot())

    # What makes a call possible, and how often a soak makes it.
    def possible(self) -> dict[str, int]:
        resident = [s for s in self.sequences.values() if not s.swapped]
        live = bool(self.sequences)
        waiting = any(not s.started for s in resident)
        room = len(self.sequences) < self.MAX_SEQUENCES
        return {
            "add": 12 * room,
            "step": 12 * any(s.pending for s in resident),
            "decode": 30 * bool(resident),
            "append": 6 * live,
            "truncate": 6 * live,
            "fork": 8 * (live and room),
            "reorder": 5 * live,
            "pin": 4 * (live and len(self.pins) < 4),
            "unpin": 4 * bool(self.pins),
            "free": 6 * live,
            "preempt": 3 * live,
            "take_prefix": 4 * waiting,
            "swap_out": 5 * bool(resident),
            "swap_in": 10 * (len(resident) < len(self.sequences)),
            "snapshot_and_restore": 1,
            "reset_prefix_cache": 1,
            "name_a_sequence_that_is_not_there": 1,
        }

    # --- carrying out ---

    def copy(self, src: list[Block], dst: list[Block], pairs: np.ndarray) -> None:
        """All at once, as one launch would: no pair may depend on another."""
        read = [[*src[a]] for a, _ in pairs.tolist()]
        for (_, b), entries in zip(pairs.tolist(), read, strict=True):
            dst[b] = entries

    def try_append(self, seqs: list[int], new: list[list[int]]) -> None:
        flat = [token for tokens in new for token in tokens]
        _, error = attempt(self.m.append, seqs, flat, np.cumsum([0, *map(len, new)]))
        if error:
            assert "fit into the pool" in str(error)
            return
        for seq, tokens in zip(seqs, new, strict=True):
            self.sequences[seq].append(tokens)

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

    def try_step(self, seqs: list[int], counts: list[int], reuse: bool, sampled: list[int] | None = None) -> None:
        new = [[] if sampled is None or sampled[i] < 0 else [sampled[i]] for i in range(len(seqs))]
        longest = max((len(self.sequences[i].tokens) + len(t) for i, t in zip(seqs, new, strict=True)), default=0)
        too_long = self.most_blocks(longest) > self.m.num_blocks
        needed, free = self.needed_blocks(seqs, counts), self.m.num_free_blocks
        admits = any(not self.sequences[i].started for i in seqs)
        reserve = int(self.m.watermark * self.m.num_blocks) if admits else 0
        before = self.m.snapshot() if too_long or needed + reserve > free else {}
        options = {"out": self.batch if reuse else None, "token_ids": sampled}
        batch, error = attempt(self.m.step, seqs, counts, **options)
        assert isinstance(error, InvalidArgumentError) == too_long
        if too_long:
            assert same_state(before, self.m.snapshot())
            return
        if error:
            assert needed > 0
            assert needed + reserve > free
            assert (error.needed, error.free) == (needed, max(0, free - reserve))
            assert same_state(before, self.m.snapshot())
            return
        assert needed <= free
        for seq, tokens in zip(seqs, new, strict=True):
            self.sequences[seq].append(tokens)
        self.run_kernels(seqs, counts, batch)

    def run_kernels(self, seqs: list[int], counts: list[int], batch: StepBatch) -> None:
        size = self.m.block_size
        self.copy(self.kv, self.kv, batch.copies)
        assert len(set(batch.slot_mapping.tolist())) == sum(counts), "two tokens got one slot"
        assert batch.query_start_loc.tolist() == [0, *np.cumsum(counts).tolist()]
        slots, positions = iter(batch.slot_mapping.tolist()), iter(batch.positions.tolist())
        for seq, count in zip(seqs, counts, strict=True):
            s = self.sequences[seq]
            for position in range(s.computed, s.computed + count):
                assert next(positions) == position
                slot = next(slots)
                self.kv[slot // size][slot % size] = s.prefixes[position]
        for i, (seq, count) in enumerate(zip(seqs, counts, strict=True)):
            s = self.sequences[seq]
            start, s.computed, s.started = s.computed, s.computed + count, True
            assert batch.seq_lens[i] == s.computed
            self.compare_entries(s, batch.block_tables[i].tolist(), self.kv, self.first_visible(start))

    # --- comparing ---

    def first_visible(self, position: int) -> int:
        return 0 if self.m.window is None else max(0, position - self.m.window + 1)

    def compare_entries(self, s: Sequence, table: list[int], cache: list[Block], first: int) -> None:
        """What a kernel would read from position `first` on."""
        size = self.m.block_size
        begin, end = first // size, -(-s.computed // size)
        entries = [entry for block in table[begin:end] for entry in cache[block]]
        found = entries[first - begin * size : s.computed - begin * size]
        assert found == s.prefixes[first : s.computed], "a block holds another prompt's KV"

    def compare(self) -> None:
        self.m.check()
        size = self.m.block_size
        assert self.m.seqs() == sorted(self.sequences)
        for seq, s in self.sequences.items():
            assert self.m.num_computed_tokens(seq) == s.computed
            assert self.m.token_ids(seq).tolist() == s.tokens
            assert self.m.is_swapped(seq) == s.swapped
            table = self.m.block_table(seq).tolist()
            assert len(table) == -(-s.computed // size)
            cache = self.host_kv if s.swapped else self.kv
            self.compare_entries(s, table, cache, self.first_visible(s.computed))
        for key, tokens in self.pins.values():
            assert self.m.match([*tokens, OTHER_TOKEN], extra_key=key) >= len(tokens), "a pinned prefix was evicted"
        events = self.m.events()
        for block, kind in zip(events["block"].tolist(), events["kind"].tolist(), strict=True):
            assert (block in self.cached) == (kind != BlockManager.EVENT_STORED)
            self.cached ^= {block}
        assert len(self.cached) == self.m.num_cached_blocks

    def finish(self) -> None:
        assert self.cached == set(np.flatnonzero(self.m.layout()["is_cached"]).tolist())
        self.m.free(list(self.sequences))
        self.m.unpin(list(self.pins))
        self.m.check()
        assert self.m.num_free_blocks == self.m.num_blocks, "blocks leaked"
        assert self.m.num_free_host_blocks == self.m.num_host_blocks, "host blocks leaked"
        assert self.m.usage == 0


def live_long(calls: int, seed: int) -> dict[str, int]:
    """Make random calls to one manager after another, comparing after each; the sums of their counters."""
    r = Random(seed)
    made = 0
    stats: dict[str, int] = {}
    while made < calls:
        checked = CheckedManager.random(r)
        for _ in range(r.randint(50, 400)):
            weights = checked.possible()
            name = r.choices(list(weights), list(weights.values()))[0]
            try:
                getattr(checked, name)(r)
                checked.compare()
            except Exception as error:
                pytest.fail(f"{name}, call {made} with seed {seed}: {type(error).__name__}: {error}")
            made += 1
        for key, value in checked.m.stats().items():
            stats[key] = stats.get(key, 0) + value
        checked.finish()
    return stats


def main(calls: str, seed: str | None = None) -> None:
    chosen = secrets.randbits(32) if seed is None else int(seed)
    start = time.monotonic()
    stats = live_long(int(calls), chosen)
    print(f"seed {chosen}: {calls} calls in {time.monotonic() - start:.0f} s, none failed; {stats}")


if __name__ == "__main__":
    main(*sys.argv[1:])
