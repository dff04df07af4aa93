# SPDX-License-Identifier: Apache-2.0
"""Where work runs: NumPy on the processor, or CuPy on the current CUDA device."""

from __future__ import annotations

import gc
import sys
from typing import Any, Literal

import ml_dtypes
import numpy as np

import pagedattn

# `bench` takes it from here: asv runs its inputs with commits that have no other place for it.
from pagedattn._units import show_bytes as show_bytes

Backend = Literal["cpu", "cuda"]

DTYPES = ("float32", "float16", "bfloat16")
FP8_DTYPES = ("float8_e4m3", "float8_e5m2")
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "float8_e5m2": 1}

# CuPy's float8 is missing and its bfloat16 is young, so bits are moved as integers and named at the last moment.
STORAGE: dict[str, Any] = {
    "float32": np.dtype(np.uint32),
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.uint16),
    "float8_e4m3": np.dtype(np.uint8),
    "float8_e5m2": np.dtype(np.uint8),
}
ELEMENT: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


def out_dtype(dtype: str) -> str:
    """Type of the result of queries of a type, where none is given."""
    return "bfloat16" if dtype in FP8_DTYPES else dtype


class BackendError(ValueError):
    """The backend that was asked for is unknown, or cannot run here."""


class Device:
    """The array module of a backend, and the few things in which the two differ."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.xp: Any = np
        if backend == "cuda":
            reason = cuda_missing()
            if reason:
                raise BackendError(f"--backend cuda: {reason}")
            import cupy

            self.xp = cupy

    @property
    def name(self) -> str:
        """What the report calls the machine."""
        if self.backend == "cpu":
            return f"cpu ({pagedattn.config()['cpu']['isa']}), {pagedattn.get_num_threads()} threads"
        properties = self.xp.cuda.runtime.getDeviceProperties(self.xp.cuda.runtime.getDevice())
        return f"cuda, {properties['name'].decode()}"

    def synchronize(self) -> None:
        """Wait until everything that was launched is done."""
        if self.backend == "cuda":
            self.xp.cuda.get_current_stream().synchronize()

    def synchronize_all(self) -> None:
        """Wait for all streams of the device, so that one that waits for none sees what was written on another."""
        if self.backend == "cuda":
            self.xp.cuda.runtime.deviceSynchronize()

    def release(self) -> None:
        """Give memory that CuPy and torch keep for reuse back, so that others can have it."""
        if self.backend == "cuda":
            gc.collect()
            self.xp.get_default_memory_pool().free_all_blocks()
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()

    def put(self, array: np.ndarray) -> Any:
        """A host array on the device."""
        return self.xp.asarray(array)

    def get(self, array: Any) -> np.ndarray:
        """A device array on the host."""
        host: np.ndarray = array if self.backend == "cpu" else self.xp.asnumpy(array)
        return host

    def free_memory(self) -> int | None:
        """Bytes that could be allocated, or None where the system does not tell."""
        if self.backend == "cuda":
            return int(self.xp.cuda.runtime.memGetInfo()[0])
        try:
            with open("/proc/meminfo") as lines:
                fields = dict(line.split(":", 1) for line in lines)
            return int(fields["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            return None


def cuda_missing() -> str:
    """Why the CUDA backend cannot run here; "" if it can."""
    cuda = pagedattn.config()["cuda"]
    if not cuda["built"]:
        return "this build of pagedattn has no CUDA kernels"
    # Before CuPy: who has no GPU is not to be told to install it.
    if not cuda["devices"]:
        return (cuda["no_device_because"] or "no CUDA device was found").partition(";")[0]
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); pip install 'pagedattn[cu13]' or 'pagedattn[cu12]'"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no usable CUDA device: {error}"
    return "" if count else "no CUDA device was found"


def choose_backend(requested: str) -> tuple[Backend, str]:
    """The backend to use, and why, for ``auto``, ``cpu`` or ``cuda``."""
    if requested == "cpu":
        return "cpu", "as asked"
    if requested not in ("auto", "cuda"):
        raise BackendError(f"--backend must be auto, cpu or cuda; got {requested}")
    missing = cuda_missing()
    if requested == "cuda":
        if missing:
            raise BackendError(f"--backend cuda: {missing}")
        return "cuda", "as asked"
    return ("cpu", missing) if missing else ("cuda", "a CUDA device was found")
