# SPDX-License-Identifier: Apache-2.0
"""Which tokens run in the next step: continuous batching with chunked prefill and preemption.

Every step takes one token of each sequence that is decoding and up to ``chunk`` tokens of prompts, oldest sequence
first.  A request is admitted when its whole prompt fits and leaves a hundredth of the blocks free.  Sequences then grow
into what is left; when blocks run out, the latest gives its own back and is computed again later, so the oldest always
advances.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pagedattn import BlockManager, OutOfBlocks, StepBatch

from .clock import Clock
from .model import Model
from .settings import Settings
from .traces import Request


@dataclass(slots=True)
class Sequence:
    """One sample of a request, from admission to its last token.

    Attributes
    ----------
    id : int
        The block manager's name for it.
    tokens, digests : ndarray
        Everything it will ever hold; a replay knows in advance what is sampled.
    known : int
        Tokens that exist so far: the prompt and what was sampled.
    computed : int
        Tokens whose keys and values are in the cache.
    width : int
        Samples it stands for: more than one until its prompt is computed and it forks.
    prompt_seen : int
        Prompt tokens that have been counted, computed or found cached; a preemption does not take them back.
    sampled : int
        A sampled token that the block manager has not been told of yet: the next step appends it.  -1 for none.
    shares_tail : bool
        Whether its last block is still its sibling's, right after a fork, or the prefix cache's.
    """

    request: Request
    sample: int
    tokens: NDArray[np.int32]
    digests: NDArray[np.uint64]
    id: int
    known: int
    computed: int = 0
    width: int = 1
    prompt_seen: int = 0
    sampled: int = -1
    shares_tail: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sequences by arrival."""
        return self.request.index, self.sample

    @property
    def decoding(self) -> bool:
        """Whether only its latest token is left to compute."""
        return self.computed >= self.request.prompt_length and self.known - self.computed == 1


@dataclass(slots=True)
class Step:
    """What runs together: sequences, new tokens of each, and the block manager's arrays for the kernels."""

    sequences: list[Sequence]
    counts: list[int]
    arrays: StepBatch


@dataclass(slots=True)
class Counts:
    """What has happened so far."""

    completed: int = 0
    refused: int = 0
    refusals: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    hit_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    forks: int = 0


class Scheduler:
    """Feeds a trace through a block manager.

    Parameters
    ----------
    requests : iterable of Request
        In order of arrival; their times are not kept, each starts as soon as there is room.
    settings : Settings
        Limits on batch and chunk.
    manager : BlockManager
        Holds the blocks.
    batch : StepBatch
        Its arrays are reused by every step.
    clock : Clock
        Is charged for the manager's calls.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        settings: Settings,
        manager: BlockManager,
        batch: StepBatch,
        clock: Clock,
    ) -> None:
        self.counts = Counts()
        self.running: list[Sequence] = []
        self._settings = settings
        self._manager = manager
        self._batch = batch
        self._clock = clock
        self._arriving = deque(requests)
        self._preempted: deque[Sequence] = deque()
        self._open_samples: dict[int, int] = {}
        self._free_at_failure = -1

    def next_step(self) -> Step | None:
        """Choose the next step and get its blocks, or None when the trace is done."""
        while True:
            self._admit()
            if not self.running:
                return None
            while self.running:
                sequences, counts = self._plan()
                ids, sampled = [s.id for s in sequences], [s.sampled for s in sequences]
                try:
                    with self._clock("block manager"):
                        self._manager.step(ids, counts, self._batch, token_ids=sampled)
                except OutOfBlocks:
                    self._make_room()
                else:
                    for sequence in sequences:
                        sequence.sampled = -1
                    return Step(sequences, counts, self._batch)

    def commit(self, step: Step) -> None:
        """Account for a step that was computed: fork, sample, and free what is finished."""
        finished: list[Sequence] = []
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            sequence.computed += count
            sequence.shares_tail = False
            self._count_prompt(sequence)
            if sequence.computed < sequence.known:
                continue
            for sample in [sequence, *self._fork(sequence)]:
                sample.sampled = int(sample.tokens[sample.known])
                sample.known += 1
                self.counts.generated_tokens += 1
                if sample.known == len(sample.tokens):
                    finished.append(sample)
        if finished:
            with self._clock("block manager"):
                self._manager.free([s.id for s in finished])
        for sequence in finished:
            self.running.remove(sequence)
            self._close(sequence.request)

    def _count_prompt(self, sequence: Sequence) -> None:
        seen = min(sequence.computed, sequence.request.prompt_length)
        if seen > sequence.prompt_seen:
            self.counts.prompt_tokens += seen - sequence.prompt_seen
            sequence.prompt_seen = seen

    def _plan(self) -> tuple[list[Sequence], list[int]]:
        sequences, counts = [], []
        budget = self._settings.chunk
        for sequence in sorted(self.running, key=lambda s: s.order):
            count = sequence.known - sequence.computed
            if not sequence.decoding:
                count = min(count, budget)
                budget -= count
            if count:
                sequences.append(sequence)
                counts.append(count)
        return sequences, counts

    def _admit(self) -> None:
        while self._preempted or self._arriving:
            backlog = sum(s.known - s.computed for s in self.running if not s.decoding)
            if backlog >= self._settings.chunk:
                return
            if self._preempted:
                if not self._resume(self._preempted[0]):
                    return
                self.running.append(self._preempted.popleft())
                continue
            request = self._arriving[0]
            refusal = self._refusal(request)
            if refusal:
                self._arriving.popleft()
                self._refuse(request, refusal)
                continue
            sequence = self._start(request)
            if sequence is None:
                return
            self._arriving.popleft()
            self.running.append(sequence)

    def _refusal(self, request: Request) -> str:
        needed = self._settings.blocks(request.final_length)
        if needed > self._manager.num_blocks:
            return f"its {request.final_length} tokens need {needed} blocks of {self._manager.num_blocks}"
        if request.samples > self._settings.max_batch:
            return f"its {request.samples} samples exceed --max-batch {self._settings.max_batch}"
        return ""

    def _start(self, request: Request) -> Sequence | None:
        if not self._has_place(request.samples) or not self._worth_trying():
            return None
        prompt = request.prompt()
        with self._clock("block manager"):
            name = self._manager.add(prompt)
            cached = self._manager.num_cached_tokens(name)
        if not self._fits(len(prompt), cached):
            with self._clock("block manager"):
                self._manager.free([name])
            self._free_at_failure = self._manager.num_free_blocks
            return None
        tokens = np.concatenate([prompt, request.sampled(0, self._settings.seed)])
        self._open_samples[request.index] = request.samples
        self.counts.hit_tokens += cached
        started = Sequence(request, 0, tokens, Model.digests(tokens), name, len(prompt), cached, request.samples)
        started.shares_tail = cached % self._settings.block_size != 0
        self._count_prompt(started)
        return started

    def _resume(self, sequence: Sequence) -> bool:
        if not self._has_place(sequence.width) or not self._worth_trying():
            return False
        with self._clock("block manager"):
            cached = self._manager.take_prefix(sequence.id)
        if not self._fits(sequence.known, cached):
            with self._clock("block manager"):
                self._manager.preempt(sequence.id)
            self._free_at_failure = self._manager.num_free_blocks
            return False
        sequence.computed = cached
        sequence.shares_tail = cached % self._settings.block_size != 0
        self.counts.recomputed_tokens -= cached
        return True

    def _has_place(self, samples: int) -> bool:
        return sum(s.width for s in self.running) + samples <= self._settings.max_batch

    def _worth_trying(self) -> bool:
        # Looking a long prompt up costs time, and what did not fit does not fit before blocks were freed.
        return bool(self._manager.num_free_blocks > self._free_at_failure)

    def _fits(self, tokens: int, cached: int) -> bool:
        blocks = self._settings.blocks
        promised = sum(blocks(s.known) - blocks(s.computed) for s in self.running)
        spare = self._manager.num_blocks // 100 if self.running else 0
        needed = blocks(tokens) - blocks(cached) + promised + spare
        return bool(needed <= self._manager.num_free_blocks)

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        if sequence.width == 1:
            return []
        request = sequence.request
        with self._clock("block manager"):
            names = self._manager.fork(sequence.id, sequence.width - 1)
        prompt = sequence.tokens[: request.prompt_length]
        siblings = []
        for sample, name in enumerate(names, 1):
            tokens = np.concatenate([prompt, request.sampled(sample, self._settings.seed)])
            siblings.append(
                Sequence(
                    request,
                    sample,
                    tokens,
                    Model.digests(tokens),
                    int(name),
                    sequence.known,
                    sequence.computed,
                    prompt_seen=request.prompt_length,
                    shares_tail=True,
                )
            )
        self.counts.forks += len(siblings)
        self.running.extend(siblings)
        sequence.width = 1
        return siblings

    def _make_room(self) -> None:
        victim = max(self.running, key=lambda s: s.order)
        self.running.remove(victim)
        self._free_at_failure = -1
        # A request that outgrows the whole cache is refused when it arrives, so the oldest can always go on.
        assert self.running, f"request {victim.request.index} is alone in the cache and still short of blocks"
        with self._clock("block manager"):
            self._manager.preempt(victim.id)
        self.counts.preemptions += 1
        self.counts.recomputed_tokens += victim.computed
        victim.computed = 0
        victim.shares_tail = False
        self._preempted.appendleft(victim)

    def _close(self, request: Request) -> None:
        self._free_at_failure = -1
        self._open_samples[request.index] -= 1
        if not self._open_samples[request.index]:
            del self._open_samples[request.index]
            self.counts.completed += 1

    def _refuse(self, request: Request, reason: str) -> None:
        self.counts.refused += 1
        self.counts.refusals.append(f"request {request.index}: {reason}")
