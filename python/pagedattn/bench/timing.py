# SPDX-License-Identifier: Apache-2.0
"""Clocks: how long a call takes, several calls in turns, so that drift of the machine meets all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pagedattn._device import Device

from .peers.base import Prepared

_SAMPLE_SECONDS = 2e-3  # a shorter call is repeated until a sample lasts this long
_CALL_BUDGET_SECONDS = 2.0  # of measuring one call, unless it takes this long for the fewest samples
_MOST_SAMPLES, _FEWEST_SAMPLES = 25, 5
# Threads of OpenMP go on spinning after a call, and would take the next library's processor.
_PAUSE_SECONDS = 0.02
# After such a pause calls are slow for up to 2 ms, until processors run at full speed and caches hold the call's data.
_WARM_UP_SECONDS = 2e-3


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one call.

    Attributes
    ----------
    samples : tuple of float
        Seconds a call, in the order measured.
    method : str
        How: "wall clock", "graph", "difference of graphs", or "eager" where a call cannot be captured.
    """

    samples: tuple[float, ...]
    method: str

    @property
    def least(self) -> float:
        """The least of the samples, seconds."""
        return min(self.samples)

    @property
    def median(self) -> float:
        """The middle of the samples, seconds."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The lower quartile, seconds."""
        return _quartiles(self.samples)[0]

    @property
    def high(self) -> float:
        """The upper quartile, seconds."""
        return _quartiles(self.samples)[2]


class Timer(ABC):
    """A clock of one backend."""

    @abstractmethod
    def time(self, calls: Mapping[str, Prepared]) -> dict[str, Timing]:
        """Time the calls in turns: one sample of each, then the next of each."""

    @abstractmethod
    def host_time(self, prepared: Prepared) -> Timing:
        """Time that the host spends in a call among calls in a row: all of it on the CPU, enqueueing on CUDA."""


def make_timer(device: Device, *, quick: bool = False) -> Timer:
    """The clock of a backend; a quick one takes the fewest samples."""
    if device.backend == "cuda":
        from .cuda_timing import CudaTimer

        return CudaTimer(quick=quick)
    return WallTimer(quick=quick)


class WallTimer(Timer):
    """The clock of the CPU.  A cache that fits the processor's last level stays in it, as between two layers' calls."""

    def __init__(self, *, quick: bool = False) -> None:
        self._quick = quick

    def time(self, calls: Mapping[str, Prepared]) -> dict[str, Timing]:
        first = {name: _wall(prepared.call, 1) for name, prepared in calls.items()}  # warms up
        first = {name: _wall(prepared.call, 1) for name, prepared in calls.items()}
        numbers = {name: max(1, min(100_000, math.ceil(_SAMPLE_SECONDS / max(first[name], 1e-9)))) for name in calls}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        wanted = {name: self._sample_count(first[name] * numbers[name]) for name in calls}
        for turn in range(max(wanted.values())):
            for name, prepared in calls.items():
                if turn < wanted[name]:
                    if len(calls) > 1:
                        time.sleep(_PAUSE_SECONDS)
                        _warm_up(prepared.call)
                    samples[name].append(_wall(prepared.call, numbers[name]))
        return {name: Timing(tuple(values), "wall clock") for name, values in samples.items()}

    def host_time(self, prepared: Prepared) -> Timing:
        return self.time({"": prepared})[""]

    def _sample_count(self, sample_seconds: float) -> int:
        if self._quick:
            return _FEWEST_SAMPLES
        return max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, int(_CALL_BUDGET_SECONDS / sample_seconds)))


def _warm_up(call: Callable[[], None]) -> None:
    begin = time.perf_counter()
    while True:
        call()
        if time.perf_counter() - begin > _WARM_UP_SECONDS:
            return


def _wall(call: Callable[[], None], number: int) -> float:
    begin = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - begin) / number


def _quartiles(samples: tuple[float, ...]) -> list[float]:
    return statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
