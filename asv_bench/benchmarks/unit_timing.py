# SPDX-License-Identifier: Apache-2.0
"""Prompts and the clock of `block_manager_units`, for other block managers too: it needs NumPy alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 16
PROMPT = 4096
PROMPT_BLOCKS = PROMPT // BLOCK_SIZE
REPETITIONS = 25


def prompts(count: int, tokens: int, seed: int = 0) -> NDArray[np.int32]:
    """Token ids ``[count, tokens]``; no two rows begin alike."""
    ids = np.random.default_rng([seed, count]).integers(0, 32_000, (count, tokens), np.int32)
    ids[:, 0] = seed * count + np.arange(count)
    return ids


def best(call: Callable[[Any], object], setup: Callable[[], Any], repetitions: int = REPETITIONS) -> float:
    """Seconds of the fastest call, each on what its own setup made."""
    fastest = float("inf")
    for _ in range(repetitions):
        made = setup()
        start = time.perf_counter()
        call(made)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
