# SPDX-License-Identifier: Apache-2.0
"""A trace through the block manager alone: no keys, no values, no kernels.

It says what the manager costs and what its prefix cache finds under a real load.  Requests arrive in the order of the
trace; one starts as soon as there is a place for it and room for all its tokens, has its prompt computed in one step,
and then decodes a token a step beside the others until it is done.  What runs when follows from lengths alone, so a
model of the cache can be put through the very same turns.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedattn import BlockManager, StepBatch

from .traces import VOCABULARY_BITS, Request

_PROMPTS_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Turn:
    """What happens in one turn: prompts are computed, whoever runs decodes a token, and some are finished."""

    admitted: list[Request]
    finished: list[Request]


@dataclass(frozen=True, slots=True)
class ManagerRun:
    """What a trace cost the block manager, and what was found cached.

    Attributes
    ----------
    seconds : float
        Time inside the manager's calls.
    hit_tokens, partial_hit_tokens : int
        Prompt tokens found cached, and those of them that were a part of a block.
    stats : dict
        The manager's counters at the end.
    """

    requests: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    seconds: float
    hit_tokens: int
    partial_hit_tokens: int
    stats: dict[str, int]


def turns(requests: Iterable[Request], num_blocks: int, block_size: int, max_batch: int) -> Iterator[Turn]:
    """What runs when.

    Raises
    ------
    ValueError
        A request alone needs more blocks than there are.
    """
    arriving = deque(requests)
    running: list[tuple[int, int, Request]] = []  # by the turn in which they are finished
    promised = 0
    turn = 0
    while arriving or running:
        admitted = []
        while arriving and len(running) < max_batch:
            request = arriving[0]
            needed = -(-request.final_length // block_size)
            if needed > num_blocks:
                raise ValueError(f"turns: request {request.index} needs {needed} blocks of {num_blocks}")
            if promised + needed > num_blocks:
                break
            promised += needed
            admitted.append(arriving.popleft())
            heapq.heappush(running, (turn + request.output_length - 1, request.index, request))
        finished = []
        while running and running[0][0] <= turn:
            finished.append(heapq.heappop(running)[2])
            promised -= -(-finished[-1].final_length // block_size)
        yield Turn(admitted, finished)
        turn += 1


class _Rows:
    """Who runs in which row of the batch.  The last row takes a free place, so that no other table is written anew."""

    def __init__(self, max_batch: int) -> None:
        self._seqs = np.zeros(max_batch, np.int64)
        self._requests: list[int] = []
        self._rows: dict[int, int] = {}

    def seqs(self) -> NDArray[np.int64]:
        return self._seqs[: len(self._requests)]

    def add(self, request: Request, seq: int) -> None:
        row = self._rows[request.index] = len(self._requests)
        self._requests.append(request.index)
        self._seqs[row] = seq

    def remove(self, request: Request) -> int:
        row = self._rows.pop(request.index)
        seq = int(self._seqs[row])
        last = self._requests.pop()
        if last != request.index:
            self._requests[row] = last
            self._rows[last] = row
            self._seqs[row] = self._seqs[len(self._requests)]
        return seq


def _prompts(requests: SequenceOf[Request]) -> Iterator[NDArray[np.int32]]:
    # Many at a time: making one needs more memory than the processor's caches hold, and the next call would find them
    # emptied.
    for first in range(0, len(requests), _PROMPTS_AHEAD):
        yield from [request.prompt() for request in requests[first : first + _PROMPTS_AHEAD]]


def replay_manager(
    requests: SequenceOf[Request], *, num_blocks: int, block_size: int = 16, max_batch: int = 64
) -> ManagerRun:
    """Run a trace through a block manager.

    Parameters
    ----------
    requests : sequence of Request
        Their `samples` are not followed: each is one sequence.
    num_blocks, block_size : int
        The pool.
    max_batch : int
        Sequences that run at a time.

    Returns
    -------
    ManagerRun
    """
    manager = BlockManager(num_blocks, block_size)
    longest = max(request.final_length for request in requests)
    widest = -(-longest // block_size)
    alone, together = StepBatch(1, widest, longest), StepBatch(max_batch, widest, max_batch)
    sampled = np.random.default_rng(0).integers(0, 2**VOCABULARY_BITS, max_batch, np.int32)
    prompts = _prompts(requests)
    running = _Rows(max_batch)
    clock = time.perf_counter
    seconds, steps = 0.0, 0
    for turn in turns(requests, num_blocks, block_size, max_batch):
        seqs = running.seqs()
        if len(seqs):
            start = clock()
            manager.step(seqs, 1, together, token_ids=sampled[: len(seqs)])
            seconds += clock() - start
            steps += 1
        for request in turn.admitted:
            prompt = next(prompts)
            start = clock()
            seq = manager.add(prompt)
            manager.step(seq, len(prompt) - manager.num_cached_tokens(seq), alone)
            seconds += clock() - start
            steps += 1
            running.add(request, seq)
        if turn.finished:
            done = [running.remove(request) for request in turn.finished]
            start = clock()
            manager.free(done)
            seconds += clock() - start
    manager.check()
    stats = manager.stats()
    return ManagerRun(
        requests=len(requests),
        prompt_tokens=sum(request.prompt_length for request in requests),
        generated_tokens=sum(request.output_length for request in requests),
        steps=steps,
        seconds=seconds,
        hit_tokens=stats["prefix_hit_tokens"],
        partial_hit_tokens=stats["partial_hit_tokens"],
        stats=stats,
    )
