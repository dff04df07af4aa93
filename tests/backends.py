"""Moves test arrays to the backend under test and back, strides and shared allocations included.

A test builds plain host arrays, hands them over with ``backend.arrays(...)``, calls pagedattn, and fetches results with
``backend.host(...)``.  Moving copies whole allocations byte for byte and rebuilds each view at its offset: a cache with
HND strides, or K and V interleaved in one allocation, arrives as it was.  No CuPy kernel is compiled for it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = Any  # an np.ndarray or a cupy.ndarray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8_E5M2 = np.dtype(ml_dtypes.float8_e5m2)

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float8_e4m3": FLOAT8_E4M3,
    "float8_e5m2": FLOAT8_E5M2,
}


def dtype_name(dtype: Any) -> str:
    """Return pagedattn's name of an element type."""
    return next(name for name, known in DTYPES.items() if known == np.dtype(dtype))


def is_float8(dtype: Any) -> bool:
    return np.dtype(dtype) in (FLOAT8_E4M3, FLOAT8_E5M2)


def allocation(array: np.ndarray) -> np.ndarray:
    """Return the bytes of the whole allocation that `array` is a view of, as a writable-through uint8 view."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return root.reshape(-1, order="A").view(np.uint8)


def offset_in(array: np.ndarray, owner: np.ndarray) -> int:
    """Return the byte offset of `array`'s first element in the allocation `owner`."""
    return int(array.__array_interface__["data"][0] - owner.__array_interface__["data"][0])


class NumpyBackend:
    """Host memory, computed by the CPU backend."""

    name = "numpy"
    is_cuda = False

    def arrays(self, *host: np.ndarray | None) -> tuple[Array, ...]:
        """Return copies of host arrays; arrays of one allocation share one allocation again."""
        moved: dict[int, Array] = {}
        result: list[Array] = []
        for array in host:
            if array is None:
                result.append(None)
                continue
            flat = allocation(array)
            key = flat.__array_interface__["data"][0]
            if key not in moved:
                moved[key] = self._upload(flat)
            result.append(self._view(moved[key], array, offset_in(array, flat)))
        return tuple(result)

    def array(self, host: np.ndarray) -> Array:
        """Return a copy of one host array."""
        return self.arrays(host)[0]

    def host(self, array: Array) -> np.ndarray:
        """Return a host copy of one of this backend's arrays."""
        copy: np.ndarray = np.array(array)
        return copy

    def allocation(self, array: Array) -> np.ndarray:
        """Return a host copy of the bytes of the whole allocation behind `array`."""
        return allocation(array).copy()

    def kv_dtype(self, dtype: Any) -> str | None:
        """Return what `kv_dtype=` must say for a cache of this type: nothing where the array's type says it."""
        return None

    def synchronize(self) -> None:
        """Wait until everything enqueued has run."""

    def _upload(self, flat: np.ndarray) -> Array:
        return flat.copy()

    def _view(self, flat: Array, like: np.ndarray, offset: int) -> Array:
        view = np.ndarray(like.shape, like.dtype, buffer=flat, offset=offset, strides=like.strides)
        view.flags.writeable = like.flags.writeable
        return view


class CupyBackend(NumpyBackend):
    """CUDA memory, computed by the CUDA backend."""

    name = "cupy"
    is_cuda = True

    def __init__(self) -> None:
        import cupy

        self.cupy: Any = cupy

    def host(self, array: Array) -> np.ndarray:
        self.synchronize()
        dtype = np.dtype(array.dtype)
        if array.size == 0:
            return np.empty(array.shape, dtype)
        reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
        low = sum(r for r in reach if r < 0)
        high = sum(r for r in reach if r > 0) + dtype.itemsize
        flat = self.cupy.ndarray((high - low,), np.uint8, memptr=array.data + low).get()
        return np.array(np.ndarray(array.shape, dtype, buffer=flat, offset=-low, strides=array.strides))

    def allocation(self, array: Array) -> np.ndarray:
        self.synchronize()
        memory = array.data.mem
        pointer = self.cupy.cuda.MemoryPointer(memory, 0)
        flat: np.ndarray = self.cupy.ndarray((memory.size,), np.uint8, memptr=pointer).get()
        return flat

    def kv_dtype(self, dtype: Any) -> str | None:
        return dtype_name(dtype) if is_float8(dtype) else None

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()

    def _upload(self, flat: np.ndarray) -> Array:
        return self.cupy.asarray(flat)

    def _view(self, flat: Array, like: np.ndarray, offset: int) -> Array:
        # CuPy has no float8: such caches are uint8 there, and `kv_dtype=` says what they hold.
        dtype = np.dtype(np.uint8) if is_float8(like.dtype) else like.dtype
        return self.cupy.ndarray(like.shape, dtype, memptr=flat.data + offset, strides=like.strides)
