# SPDX-License-Identifier: Apache-2.0
"""What the machine gives in this run, and in which state it is: without it no other figure means much."""

from __future__ import annotations

from typing import Any, ClassVar

from pagedattn._device import Device, cuda_missing
from pagedattn_bench.ceilings import machine_facts, measure_ceilings

from .cuda_run import unjudged

COMMON = {"read, GB/s": ("read", 1e-9), "copy, GB/s": ("copy", 1e-9), "matmul, TFLOP/s": ("matmul", 1e-12)}
BUS = {"host to device, GB/s": ("host_to_device", 1e-9), "device to host, GB/s": ("device_to_host", 1e-9)}
LAUNCH = {"launch, µs": ("launch", 1e6)}
# asv keeps numbers alone: a driver 580.95.05 is 580.95.
STATE = ["driver", "sm_clock_mhz", "sm_clock_max_mhz", "memory_clock_mhz", "power_limit_w", "temperature_c"]


class Cuda:
    """The device: its rates, and the driver and clocks that they belong to."""

    timeout = 300.0
    params: ClassVar = [[*COMMON, *BUS, *LAUNCH, *STATE]]
    param_names: ClassVar = ["what"]
    unit = "as named"

    def setup_cache(self) -> dict[str, float | None]:
        if cuda_missing():
            return {}
        device = Device("cuda")
        ceilings = measure_ceilings(device)
        facts = machine_facts(device)
        rates = {name: getattr(ceilings, field) * scale for name, (field, scale) in (COMMON | BUS | LAUNCH).items()}
        return rates | {name: _number(facts.get(name)) for name in STATE}

    def setup(self, measured: dict[str, float | None], what: str) -> None:
        if measured.get(what) is None:
            raise NotImplementedError(cuda_missing() or f"nvidia-ml-py is needed for {what}")

    def track_ceiling(self, measured: dict[str, float], what: str) -> dict[str, Any]:
        return unjudged(measured[what])


class Cpu:
    """The processor and its memory, with all threads."""

    timeout = 300.0
    params: ClassVar = [[*COMMON, *LAUNCH]]
    param_names: ClassVar = ["what"]
    unit = "as named"

    def setup_cache(self) -> dict[str, float]:
        ceilings = measure_ceilings(Device("cpu"))
        return {name: getattr(ceilings, field) * scale for name, (field, scale) in (COMMON | LAUNCH).items()}

    def track_ceiling(self, measured: dict[str, float], what: str) -> dict[str, Any]:
        return unjudged(measured[what])


def _number(fact: Any) -> float | None:
    if isinstance(fact, str):
        parts = fact.split(".")
        return float(".".join(parts[:2])) if all(part.isdigit() for part in parts[:2]) else None
    return None if fact is None else float(fact)
