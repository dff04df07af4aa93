"""The clock, the ceilings and the inputs of `pagedattn bench` on a CUDA device.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from backends import CupyBackend
from pagedattn._device import Device
from pagedattn.bench.accuracy import check, reference_rows
from pagedattn.bench.cases import Case, decode, prefill
from pagedattn.bench.inputs import Inputs
from pagedattn.bench.peers import Prepared

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device(cuda: CupyBackend) -> Device:
    return Device("cuda")


@pytest.fixture(scope="module")
def timer(device: Device) -> Any:
    from pagedattn.bench.cuda_timing import CudaTimer

    return CudaTimer()


@pytest.fixture(scope="module")
def ceilings(device: Device) -> Any:
    from pagedattn.bench.ceilings import measure_ceilings

    return measure_ceilings(device)


def copy(timer: Any, num_bytes: int) -> Prepared:
    import cupy

    source, target = cupy.random.random(num_bytes // 8), cupy.empty(num_bytes // 8)
    cupy.cuda.runtime.deviceSynchronize()
    return Prepared(lambda: target.data.copy_from_device_async(source.data, num_bytes, timer.stream), target)


def test_a_long_copy_takes_what_its_bytes_take(timer: Any, ceilings: Any) -> None:
    size = 1 << 30
    timing = timer.time({"copy": copy(timer, size)})["copy"]
    assert timing.method == "graph"
    assert 2 * size / timing.median == pytest.approx(ceilings.copy, rel=0.1)
    assert timing.high - timing.low < 0.1 * timing.median


def test_a_short_call_is_a_difference_of_graphs(timer: Any, ceilings: Any) -> None:
    import cupy

    nothing = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
    timings = timer.time(
        {
            "nothing": Prepared(lambda: nothing((1,), (1,), ()), None),
            "8 MiB": copy(timer, 8 << 20),
        }
    )
    assert {timing.method for timing in timings.values()} == {"difference of graphs"}
    assert 0 < timings["nothing"].median < 5e-6
    # Cold: out of memory, not out of L2, which would be several times as fast.
    assert timings["8 MiB"].median > (8 << 20) / ceilings.read
    assert timings["8 MiB"].median < 50e-6


def test_the_time_of_enqueueing_is_not_the_devices(timer: Any) -> None:
    import cupy

    nothing = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing")

    def slowly() -> None:
        end = time.perf_counter() + 100e-6
        while time.perf_counter() < end:
            pass
        nothing((1,), (1,), ())

    with timer.stream:
        nothing((1,), (1,), ())
        assert min(timer.elapsed(slowly) for _ in range(5)) < 30e-6


def test_a_call_that_cannot_be_captured_is_timed_eagerly(timer: Any) -> None:
    import cupy

    array = cupy.ones(1 << 20)
    timing = timer.time({"reads back": Prepared(lambda: array.sum().get(), None)})["reads back"]
    assert timing.method.startswith("eager")
    assert timing.median > 0
    # The stream has survived it.
    assert timer.time({"copy": copy(timer, 64 << 20)})["copy"].method in ("graph", "difference of graphs")


def test_the_ceilings_are_those_of_a_gpu(ceilings: Any) -> None:
    assert 2e11 < ceilings.read < 2e13
    assert 2e11 < ceilings.copy < 2e13
    assert 1e13 < ceilings.matmul < 1e16
    assert 3e9 < ceilings.host_to_device < 1e12
    assert 3e9 < ceilings.device_to_host < 1e12
    assert 1e-7 < ceilings.launch < 1e-5


@pytest.mark.parametrize(
    "case",
    [
        decode("decode", "skew:3:1000:5", heads=8, kv_heads=2, head_dim=64),
        decode("fp8", "3x100", kv_dtype="float8_e4m3"),
        decode("fp16 with e5m2", "3x100", dtype="float16", kv_dtype="float8_e5m2"),
        decode("fp8 queries", "3x100", dtype="float8_e4m3", kv_dtype="float8_e4m3"),
        prefill("float32", "100+7", "100+300", dtype="float32", kv_dtype="float32"),
    ],
    ids=lambda case: case.name,
)
def test_our_answer_is_right_and_the_host_makes_the_same_inputs(device: Device, timer: Any, case: Case) -> None:
    inputs = Inputs(case, device)
    call = inputs.attend()
    error = check(inputs, call, inputs.out, reference_rows(inputs))
    assert error < 4e-3
    host = Inputs(case, Device("cpu"))
    assert np.array_equal(inputs.host_block_tables, host.host_block_tables)
    for mine, theirs in zip(inputs.sequence(0), host.sequence(0), strict=True):
        assert np.array_equal(mine, theirs)
    device.synchronize_all()
    # With out and workspace given, a call allocates nothing: it can be captured.
    assert timer.time({"": Prepared(call, inputs.out)})[""].method in ("graph", "difference of graphs")
    assert 0 < timer.host_time(Prepared(call, inputs.out)).median < 1e-3
