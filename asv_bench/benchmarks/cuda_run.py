# SPDX-License-Identifier: Apache-2.0
"""CUDA measurements in asv's terms.

asv starts a process for each benchmark and parameter.  A class here measures all its cases in one process instead, its
``setup_cache``, and its benchmarks hand out what that found: device time is dear, and rates, shares and ceilings then
belong to the very samples that are judged.

asv takes a benchmark that returns ``{"samples": [...], "number": n}`` for timed and computes its own statistics of
them, and it holds less to be better of whatever it compares.  So seconds are returned as samples, and rates as five
values around the measured one whose confidence interval reaches zero: asv shows their median and never calls one
different from another.  A test pins both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pagedattn._device import Device, cuda_missing
from pagedattn_bench.accuracy import check, reference_rows
from pagedattn_bench.cases import Case
from pagedattn_bench.ceilings import Ceilings, measure_ceilings
from pagedattn_bench.inputs import Inputs
from pagedattn_bench.peers.base import Prepared
from pagedattn_bench.timing import Timer, make_timer

from .operations import Operation

Measured = dict[str, Any]
"""By case: its samples and rates, or the "error"; or, without a device, "missing" and the reason."""

TIMEOUT_SECONDS = 900.0


def timed(samples: Sequence[float]) -> dict[str, Any]:
    """Seconds as asv's own timed benchmarks return them: each sample is one call."""
    return {"samples": list(samples), "number": 1}


def unjudged(value: float) -> dict[str, Any]:
    """A value that asv shows and never judges."""
    value = float(f"{value:.6g}")
    return {"samples": [0.0, value, value, value, 2.0 * value], "number": 1}


def measure_attention(cases: Sequence[Case]) -> Measured:
    """Samples, rates and shares of the ceilings of attention cases, each checked before."""

    def one(case: Case, device: Device, timer: Timer, ceilings: Ceilings) -> Measured:
        inputs = Inputs(case, device)
        call = inputs.attend()
        check(inputs, call, inputs.out, reference_rows(inputs))
        device.synchronize_all()
        timing = timer.time({"": Prepared(call, inputs.out)})[""]
        seconds = timing.median
        return {
            "samples": timing.samples,
            "bandwidth": case.bytes / seconds / 1e9,
            "rate": case.flops / seconds / 1e12,
            "share": 100 * ceilings.bound(case)[0] / seconds,
        }

    return _measure({case.name: case for case in cases}, one)


def measure_operations(operations: Mapping[str, Callable[[Device], Operation]]) -> Measured:
    """Samples and bandwidth of operations, and their share of the rate of a plain copy of as many bytes."""

    def one(make: Callable[[Device], Operation], device: Device, timer: Timer, _: Ceilings) -> Measured:
        operation = make(device)
        plain = operation.make_plain()
        device.synchronize_all()
        timings = timer.time({"": Prepared(operation.call, None, capturable=operation.capturable), "plain": plain})
        seconds = timings[""].median
        return {
            "samples": timings[""].samples,
            "bandwidth": operation.num_bytes / seconds / 1e9,
            "share": 100 * timings["plain"].median / seconds,
        }

    return _measure(operations, one)


def _measure(items: Mapping[str, Any], one: Callable[[Any, Device, Timer, Ceilings], Measured]) -> Measured:
    if reason := cuda_missing():
        return {"missing": reason}
    device = Device("cuda")
    ceilings, timer = measure_ceilings(device), make_timer(device)
    measured: Measured = {}
    for name, item in items.items():
        try:
            measured[name] = one(item, device, timer, ceilings)
        except Exception as error:
            # This case fails, in its own benchmark; the others have their times.
            measured[name] = {"error": f"{type(error).__name__}: {error}"}
        device.release()
    return measured


class CudaBenchmark(ABC):
    """What the classes of cases share; each brings `params`.  asv passes over a class that is abstract."""

    timeout = TIMEOUT_SECONDS
    param_names: ClassVar = ["case"]

    @abstractmethod
    def setup_cache(self) -> Measured:
        """Measure all cases.  asv runs a function once, whoever inherits it: so each class has its own."""

    def setup(self, measured: Measured, case: str) -> None:
        if "missing" in measured:
            raise NotImplementedError(measured["missing"])  # asv's n/a
        if "error" in measured[case]:
            raise RuntimeError(measured[case]["error"])

    def track_seconds(self, measured: Measured, case: str) -> dict[str, Any]:
        return timed(measured[case]["samples"])

    track_seconds.type = "time"  # type: ignore[attr-defined]
    track_seconds.unit = "seconds"  # type: ignore[attr-defined]

    def track_bandwidth(self, measured: Measured, case: str) -> dict[str, Any]:
        return unjudged(measured[case]["bandwidth"])

    track_bandwidth.unit = "GB/s"  # type: ignore[attr-defined]

    def track_share(self, measured: Measured, case: str) -> dict[str, Any]:
        return unjudged(measured[case]["share"])

    track_share.unit = "% of ceiling"  # type: ignore[attr-defined]
