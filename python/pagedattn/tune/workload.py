# SPDX-License-Identifier: Apache-2.0
"""What is served: requests with their prompts and outputs, and batches drawn from them as a server would meet them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedattn.replay import Request

from .sharing import shared_prefixes

Ints = NDArray[np.int64]

_CHUNK_DRAWS = 31


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, each of which decodes ``outputs`` tokens behind ``prompts`` tokens.

    Attributes
    ----------
    source : str
        What tables call it.
    prompts, outputs : ndarray [R] int64
        Tokens of each prompt, and decode steps of each request: the sequence has ``prompts + 1`` tokens in its first.
    shared : ndarray [R] int64, or None
        Tokens that each prompt has in common with an earlier one; None where there are lengths alone, no requests.
    """

    source: str
    prompts: Ints
    outputs: Ints
    shared: Ints | None

    @property
    def num_steps(self) -> int:
        """Decode steps of all requests."""
        return int(self.outputs.sum())

    def decode_lengths(self, count: int, rng: np.random.Generator) -> Ints:
        """Tokens of `count` sequences, each met in a decode step drawn at random from all.

        A long output has more steps, so it is met more often, as in a running batch.
        """
        ends = np.cumsum(self.outputs)
        steps = rng.choice(self.num_steps, count, replace=count > self.num_steps)
        chosen = np.searchsorted(ends, steps, side="right")
        lengths: Ints = self.prompts[chosen] + 1 + steps - (ends - self.outputs)[chosen]
        return lengths

    def chunks(self, tokens: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Query lengths and lengths of chunks of random prompts, `tokens` query tokens at most, as prefill meets them.

        A prompt is cut every `tokens` tokens behind what it shares with an earlier one.  Few chunks fill a call, so of
        several draws the one is taken whose work is closest to the mean.
        """
        assert self.shared is not None
        starts = np.minimum(self.shared, self.prompts - 1)
        draws = [self._draw_chunks(tokens, starts, rng) for _ in range(_CHUNK_DRAWS)]
        work = [float((q_lens * kv_lens).sum()) for q_lens, kv_lens in draws]
        mean = sum(work) / len(work)
        return min(zip(work, draws, strict=True), key=lambda drawn: abs(drawn[0] - mean))[1]

    def _draw_chunks(self, tokens: int, starts: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        ends = np.cumsum(self.prompts - starts)
        q_lens: list[int] = []
        kv_lens: list[int] = []
        room = min(tokens, int(ends[-1]))
        while room:
            token = int(rng.integers(ends[-1]))
            chosen = int(np.searchsorted(ends, token, side="right"))
            prompt = int(self.prompts[chosen])
            offset = token - int(ends[chosen]) + prompt  # where in its prompt the token stands
            begin = offset - (offset - int(starts[chosen])) % tokens
            length = min(tokens, prompt - begin, room)
            q_lens.append(length)
            kv_lens.append(begin + length)
            room -= length
        return np.array(q_lens, np.int64), np.array(kv_lens, np.int64)


def trace_workload(source: str, requests: Sequence[Request]) -> Workload:
    """The requests of a trace; parallel samples count as one."""
    return Workload(
        source,
        np.array([request.prompt_length for request in requests], np.int64),
        np.array([request.output_length for request in requests], np.int64),
        shared_prefixes(requests),
    )


def lengths_workload(source: str, lengths: Sequence[int]) -> Workload:
    """Sequences met at these lengths: each a single decode step."""
    prompts = np.array(lengths, np.int64) - 1
    return Workload(source, prompts, np.ones_like(prompts), None)
