# SPDX-License-Identifier: Apache-2.0
"""What a workload takes of the cache at a block size: means over all its decode steps, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .sharing import found_tokens
from .workload import Workload


@dataclass(frozen=True, slots=True)
class Footprint:
    """Slots (tokens' room) and blocks of one sequence, means over the decode steps of all requests.

    Attributes
    ----------
    allocated_slots, used_slots : float
        Slots of its blocks, and those that hold a token.
    shared_slots : float
        Slots of blocks that an earlier request had made: allocated for the sequence, but not because of it.
    blocks : float
        Entries of its block table.
    found : float or None
        Part of all prompt tokens that is found cached; None where there are no prompts.
    computed_tokens : float
        Prompt tokens of a request that are not found, so have to be computed.
    """

    allocated_slots: float
    used_slots: float
    shared_slots: float
    blocks: float
    found: float | None
    computed_tokens: float

    @property
    def waste(self) -> float:
        """Part of the allocated slots that holds no token."""
        return 1 - self.used_slots / self.allocated_slots

    @property
    def unused_slots(self) -> float:
        """Slots of a sequence that hold no token."""
        return self.allocated_slots - self.used_slots

    @property
    def held_slots(self) -> float:
        """Slots that the sequence adds to the cache."""
        return self.allocated_slots - self.shared_slots


def footprint(work: Workload, block_size: int) -> Footprint:
    """Count what `work` takes in blocks of this size."""
    prompts, outputs = work.prompts, work.outputs
    steps = work.num_steps
    blocks = _mean(_blocks_up_to(prompts + outputs, block_size) - _blocks_up_to(prompts, block_size), steps)
    used = _mean(outputs * prompts + outputs * (outputs + 1) // 2, steps)
    shared, found, computed = 0.0, None, 0.0
    if work.shared is not None:
        tokens = found_tokens(prompts, work.shared, block_size)
        shared = _mean(outputs * tokens, steps)
        found = float(tokens.sum() / prompts.sum())
        computed = float((prompts - tokens).mean())
    return Footprint(blocks * block_size, used, shared, blocks, found, computed)


def table_shape(lengths: NDArray[np.int64], block_size: int) -> tuple[int, int]:
    """Rows and columns of the block tables of a batch."""
    return len(lengths), int(-(-lengths.max() // block_size))


def _mean(sums: NDArray[np.int64], steps: int) -> float:
    # Each sum fits 64 bits; the sum of very many might not.
    return float(sums.sum(dtype=np.float64)) / steps


def _blocks_up_to(length: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    # The sum of ceil(n / block_size) for n = 1 ... length: each whole block is counted block_size times.
    whole, rest = length // block_size, length % block_size
    total: NDArray[np.int64] = block_size * whole * (whole + 1) // 2 + rest * (whole + 1)
    return total
