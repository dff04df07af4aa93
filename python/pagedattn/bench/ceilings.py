# SPDX-License-Identifier: Apache-2.0
"""What the machine gives at best, measured there and then: reading, copying, multiplying, host to device, launching."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

import pagedattn
from pagedattn._device import Device

from .cases import Case
from .timing import make_timer

_CUDA_BYTES = 2 << 30
_PINNED_BYTES = 256 << 20
_MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
_CPU_COPY_BYTES = 256 << 20
_CPU_READ_BYTES = tuple(1 << shift for shift in range(20, 31, 2))  # 1 MiB to 1 GiB
_LAUNCHES = 200


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of one machine in one run.

    Attributes
    ----------
    read, copy : float
        Bytes a second of device memory (the processor's memory on the CPU); a copy counts what it reads and writes.
    matmul : float
        Floating-point operations a second of a large matrix product by the vendor's library: float16 on CUDA,
        float32 on the CPU.
    host_to_device, device_to_host : float or None
        Bytes a second from and to pinned host memory; None on the CPU.
    launch : float
        Seconds of an empty kernel in a graph; on the CPU, of a call of `paged_attention` on an empty sequence.
    read_at : dict
        CPU: bytes a second of reading a buffer of so many bytes again and again, where caches help.
    """

    read: float
    copy: float
    matmul: float
    host_to_device: float | None
    device_to_host: float | None
    launch: float
    read_at: dict[int, float] = field(default_factory=dict)

    def read_rate(self, num_bytes: int) -> float:
        """Bytes a second at which a working set of this size can be read at best."""
        if not self.read_at:
            return self.read
        nearest = min(self.read_at, key=lambda size: abs(math.log(size / max(num_bytes, 1))))
        return self.read_at[nearest]

    def bound(self, case: Case) -> tuple[float, str]:
        """The roofline of a case: the least seconds, and whether "memory" or "compute" sets them."""
        memory, compute = case.bytes / self.read_rate(case.bytes), case.flops / self.matmul
        return (memory, "memory") if memory >= compute else (compute, "compute")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def measure_ceilings(device: Device, *, quick: bool = False) -> Ceilings:
    """Measure the machine; a few seconds."""
    return _cuda_ceilings(device, quick) if device.backend == "cuda" else _cpu_ceilings(quick)


def machine_facts(device: Device) -> dict[str, Any]:
    """What the figures belong to: names, versions, clocks."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "threads": pagedattn.get_num_threads(),
        "isa": pagedattn.config()["cpu"]["isa"],
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    if device.backend == "cpu":
        return {"device": f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}", **facts}
    return {**_gpu_facts(device), **facts}


def _cuda_ceilings(device: Device, quick: bool) -> Ceilings:
    from .cuda_timing import CudaTimer, Reader

    xp = device.xp
    timer = CudaTimer(quick=quick)
    free = device.free_memory() or 0
    size = min(_CUDA_BYTES, free // 8)
    reader = Reader(size)
    source, target = xp.ones(size // 4, xp.float32), xp.empty(size // 4, xp.float32)
    n = _MATMUL_SIZE["cuda"]
    # Random numbers: zeros draw less power and run faster than any real product.
    a, b = (xp.random.standard_normal((n, n), dtype=xp.float32).astype(xp.float16) for _ in range(2))
    c = xp.empty((n, n), xp.float16)
    pinned = _pinned(xp, _PINNED_BYTES)
    near = xp.empty(_PINNED_BYTES, xp.uint8)
    xp.cuda.runtime.deviceSynchronize()

    def launch() -> None:
        for _ in range(_LAUNCHES):
            reader.nothing((1,), (1,), ())

    with timer.stream:
        for _ in range(10):
            xp.matmul(a, b, out=c)
        times = sorted(timer.elapsed(lambda: xp.matmul(a, b, out=c)) for _ in range(10))
        to_device = min(timer.elapsed(lambda: near.set(pinned, timer.stream)) for _ in range(3))
        to_host = min(timer.elapsed(lambda: near.get(timer.stream, out=pinned, blocking=False)) for _ in range(3))
    return Ceilings(
        read=reader.num_bytes / timer.graph_seconds(reader),
        copy=2
        * source.nbytes
        / timer.graph_seconds(lambda: target.data.copy_from_device_async(source.data, source.nbytes, timer.stream)),
        matmul=2 * n**3 / times[len(times) // 2],
        host_to_device=_PINNED_BYTES / to_device,
        device_to_host=_PINNED_BYTES / to_host,
        launch=timer.graph_seconds(launch, _LAUNCHES),
    )


def _pinned(xp: Any, size: int) -> np.ndarray:
    return np.frombuffer(xp.cuda.alloc_pinned_memory(size), np.uint8, size)


def _gpu_facts(device: Device) -> dict[str, Any]:
    runtime = device.xp.cuda.runtime
    index = runtime.getDevice()
    properties = runtime.getDeviceProperties(index)
    facts = {
        "device": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "cuda_runtime": runtime.runtimeGetVersion(),
        "cupy": device.xp.__version__,
    }
    return facts | _driver_facts(runtime.deviceGetPCIBusId(index))


def _driver_facts(bus_id: str) -> dict[str, Any]:
    """Driver, clocks and power, where nvidia-ml-py is installed."""
    try:
        import pynvml
    except ImportError:
        return {"driver": None}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "sm_clock_max_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    except pynvml.NVMLError as error:
        return {"driver": None, "driver_unknown_because": str(error)}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cpu_ceilings(quick: bool) -> Ceilings:
    threads = pagedattn.get_num_threads()
    sizes = _CPU_READ_BYTES[:-1] if quick else _CPU_READ_BYTES
    # 32-bit integers, because NumPy's largest-of reduction over them is bound by loads alone.
    buffer = np.random.default_rng(0).integers(0, 1 << 30, max(sizes) // 4, np.int32)
    with ThreadPoolExecutor(threads) as pool:
        read_at = {size: _read_rate(pool, threads, buffer[: size // 4]) for size in sizes}
        # A part is read at least as fast as the whole: what says otherwise is a neighbour's noise.
        for size, larger in reversed(list(pairwise(sizes))):
            read_at[size] = max(read_at[size], read_at[larger])
        half = min(_CPU_COPY_BYTES, buffer.nbytes // 2) // 4
        sources, targets = np.array_split(buffer[:half], threads), np.array_split(buffer[half : 2 * half], threads)
        copy = _best(lambda: list(pool.map(np.copyto, targets, sources)), 4)
    n = _MATMUL_SIZE["cpu"]
    a = np.random.default_rng(1).standard_normal((n, n), np.float32)
    c = np.empty_like(a)
    return Ceilings(
        read=read_at[max(sizes)],
        copy=2 * 4 * half / copy,
        matmul=2 * n**3 / _best(lambda: np.matmul(a, a, out=c), 4),
        host_to_device=None,
        device_to_host=None,
        launch=_empty_call_seconds(),
        read_at=read_at,
    )


def _read_rate(pool: ThreadPoolExecutor, threads: int, buffer: np.ndarray) -> float:
    """Bytes a second; each thread reads its part often enough that starting it does not count."""
    parts = np.array_split(buffer, threads)
    passes = max(1, (256 << 20) // buffer.nbytes)

    def read(part: np.ndarray) -> None:
        for _ in range(passes):
            part.max()

    return passes * buffer.nbytes / _best(lambda: list(pool.map(read, parts)), 12)


def _best(work: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def _empty_call_seconds() -> float:
    from .inputs import Inputs
    from .peers.base import Prepared

    device = Device("cpu")
    inputs = Inputs(Case("empty", (1,), (1,)), device)
    call = inputs.attend(seq_lens=np.zeros(1, np.int32))
    return make_timer(device, quick=True).host_time(Prepared(call, inputs.out)).median
