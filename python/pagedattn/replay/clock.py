# SPDX-License-Identifier: Apache-2.0
"""Where the time of a replay goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PARTS = ("attention", "cache writes", "block manager", "making vectors", "verification")
_HOST_ALONE = ("block manager",)


class Clock:
    """Seconds by part.  ``with clock("attention"): ...`` charges what runs inside to that part.

    Parameters
    ----------
    synchronize : callable
        Waits for the device; called at the end of each part that uses it, so that a part's kernels count as its own.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._synchronize = synchronize
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if part not in _HOST_ALONE:
                self._synchronize()
            self.seconds[part] += time.perf_counter() - start

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start
