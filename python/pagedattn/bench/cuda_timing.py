# SPDX-License-Identifier: Apache-2.0
"""The clock of CUDA: events on the device, with a cold L2 before each call.

L2 is made cold by reading a buffer of four times its size: reading, because dirty lines left by writing would be
written back during the call.  A call of 50 µs or more is a graph between two events.  For a shorter one the events
themselves are too coarse: a graph of R times (read the buffer, call) is timed against one of R times (read the
buffer), and the difference is R calls.  Peers on torch are captured by torch, so that it keeps their memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .peers.base import Prepared
from .timing import Timer, Timing

_SHORT_SECONDS = 50e-6
_REPEATS = 20  # calls in a graph of short calls
_SAMPLES, _QUICK_SAMPLES = 15, 5
_BUDGET_SECONDS = 3.0  # of device time a call, for calls of many milliseconds
_FEWEST_SAMPLES = 5
_WAKE_SECONDS = 0.4
_HOST_TURNS = 15  # of up to 200 calls: the processor has better and worse moments
_HEAD_START = 4  # readings of the buffer, some 60 µs each, during which the host enqueues what is timed
_LEAST_COLD_BYTES = 192 << 20

_READ = r"""
extern "C" __global__ void pagedattn_read(const float4* __restrict__ data, size_t count, float* sink) {
  // Reads everything once, four independent loads at a time; the sum is there so that no load is left out.
  float sum = 0.0f;
  const size_t step = (size_t)gridDim.x * blockDim.x;
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    float4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = data[i + k * step];
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += (v[k].x + v[k].y) + (v[k].z + v[k].w);
  }
  for (; i < count; i += step) sum += data[i].x + data[i].y + data[i].z + data[i].w;
  if (sum == 1.2345e-30f) *sink = sum;
}
extern "C" __global__ void pagedattn_nothing() {}
"""


class Reader:
    """Reads a buffer on CuPy's current stream, at the full rate and writing nothing."""

    def __init__(self, num_bytes: int) -> None:
        import cupy

        self.num_bytes = num_bytes // 16 * 16
        self._data = cupy.ones(self.num_bytes // 4, cupy.float32)
        self._sink = cupy.zeros(1, cupy.float32)
        kernels = cupy.RawModule(code=_READ)
        self._kernel = kernels.get_function("pagedattn_read")
        self.nothing = kernels.get_function("pagedattn_nothing")
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        self._grid = (properties["multiProcessorCount"] * 2,)

    def __call__(self) -> None:
        self._kernel(self._grid, (1024,), (self._data, self._data.size // 4, self._sink))


def cold_bytes() -> int:
    """Size of the buffer whose reading leaves nothing of a call's data in L2."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    return max(_LEAST_COLD_BYTES, 4 * int(properties["l2CacheSize"]))


@dataclass(slots=True)
class _Plan:
    """How one call will be timed."""

    replay: Callable[[], None]
    calls: int  # in a replay
    method: str
    samples: int


class CudaTimer(Timer):
    """Times calls on a stream of its own, which CuPy sees as the current one during them."""

    def __init__(self, *, quick: bool = False) -> None:
        import cupy

        self._cuda = cupy.cuda
        self._samples = _QUICK_SAMPLES if quick else _SAMPLES
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.make_cold = Reader(cold_bytes())
        cupy.cuda.runtime.deviceSynchronize()  # the buffer was filled on another stream
        self._only_cold: Callable[[], None] | None = None

    def time(self, calls: Mapping[str, Prepared]) -> dict[str, Timing]:
        with self.stream:
            plans = {name: self._plan(prepared) for name, prepared in calls.items()}
            samples: dict[str, list[float]] = {name: [] for name in calls}
            self._wake()
            for turn in range(max(plan.samples for plan in plans.values())):
                for name, plan in plans.items():
                    if turn < plan.samples:
                        samples[name].append(self._sample(plan))
        return {name: Timing(tuple(samples[name]), plans[name].method) for name in calls}

    def host_time(self, prepared: Prepared) -> Timing:
        with self.stream:
            prepared.call()
            number = max(10, min(200, int(0.2 / max(self.elapsed(prepared.call), 1e-6))))
            times = []
            for _ in range(_HOST_TURNS):
                self.stream.synchronize()
                begin = time.perf_counter()
                for _ in range(number):
                    prepared.call()
                times.append((time.perf_counter() - begin) / number)
            self.stream.synchronize()
        return Timing(tuple(times), "calls in a row")

    def graph_seconds(self, body: Callable[[], None], number: int = 1) -> float:
        """Least time of `body` as a graph, divided by `number`, as a ceiling wants it."""
        with self.stream:
            body()
            replay = self._capture(body, uses_torch=False)
            replay()
            self._wake()
            return min(self.elapsed(replay) for _ in range(self._samples)) / number

    def _wake(self) -> None:
        """Keep the device busy until its clocks are up: after an idle second the first milliseconds run slower."""
        end = time.perf_counter() + _WAKE_SECONDS
        while time.perf_counter() < end:
            for _ in range(100):
                self.make_cold()
            self.stream.synchronize()

    def _plan(self, prepared: Prepared) -> _Plan:
        call = prepared.call
        for _ in range(3):
            call()
        estimate = self.elapsed(call)
        samples = max(_FEWEST_SAMPLES, min(self._samples, int(_BUDGET_SECONDS / estimate)))
        if not prepared.capturable:
            return _Plan(call, 1, "eager", samples)
        try:
            once = self._capture(call, uses_torch=prepared.uses_torch)
            once()
            if self.elapsed(once) >= _SHORT_SECONDS:
                return _Plan(once, 1, "graph", samples)
            if self._only_cold is None:
                self._only_cold = self._capture(lambda: self._repeat(None), uses_torch=False)
            many = self._capture(lambda: self._repeat(call), uses_torch=prepared.uses_torch)
            many()
            return _Plan(many, _REPEATS, "difference of graphs", samples)
        except Exception as error:
            # A peer that allocates or synchronises cannot be captured, and says so in its own kind of error.
            self.stream.synchronize()
            return _Plan(call, 1, f"eager ({type(error).__name__} in capture)", samples)

    def _sample(self, plan: _Plan) -> float:
        if plan.calls == 1:
            return self.elapsed(plan.replay)
        assert self._only_cold is not None
        cold = self.elapsed(self._only_cold)
        return (self.elapsed(plan.replay) - cold) / plan.calls

    def _repeat(self, call: Callable[[], None] | None) -> None:
        for _ in range(_REPEATS):
            self.make_cold()
            if call is not None:
                call()

    def elapsed(self, work: Callable[[], None]) -> float:
        """Seconds of the device between the start and the end of what `work` enqueues on the timer's stream.

        The device is kept busy meanwhile: the host's time for enqueueing, which differs from library to library, would
        else count as the device's.
        """
        begin, end = self._cuda.Event(), self._cuda.Event()
        for _ in range(_HEAD_START):
            self.make_cold()
        begin.record(self.stream)
        work()
        end.record(self.stream)
        end.synchronize()
        return float(self._cuda.get_elapsed_time(begin, end)) * 1e-3

    def _capture(self, body: Callable[[], None], *, uses_torch: bool) -> Callable[[], None]:
        return self._capture_by_torch(body) if uses_torch else self._capture_by_cupy(body)

    def _capture_by_cupy(self, body: Callable[[], None]) -> Callable[[], None]:
        self.stream.begin_capture()
        try:
            body()
        finally:
            graph = self.stream.end_capture()
        graph.upload(self.stream)
        return lambda: graph.launch(self.stream)

    def _capture_by_torch(self, body: Callable[[], None]) -> Callable[[], None]:
        import torch

        stream: Any = torch.cuda.ExternalStream(self.stream.ptr)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            body()

        def replay() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return replay
