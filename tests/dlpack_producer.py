"""Arrays that offer nothing but DLPack, built with ctypes: a NumPy array in disguise, or a made-up CUDA array.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from backends import dtype_name

CPU, CUDA = 1, 2


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# (type code, bits) of DLPack 1.1
_TYPES = {
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "float8_e4m3": (10, 8),
    "float8_e5m2": (12, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
}

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class DLPackArray:
    """A NumPy array of which only shape, dtype and DLPack can be seen.

    ``strides=False`` leaves the strides out, as producers before DLPack 1.2 may for dense arrays; ``versioned`` answers
    with the capsule of DLPack 1; ``byte_offset`` is put between the pointer and the data; ``device`` and ``address``
    claim to be elsewhere.
    """

    def __init__(
        self,
        array: np.ndarray,
        *,
        versioned: bool = False,
        read_only: bool = False,
        strides: bool = True,
        byte_offset: int = 0,
        device: tuple[int, int] = (CPU, 0),
        address: int | None = None,
    ) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype
        self.ndim = array.ndim
        self.versioned = versioned
        self.exports = 0
        self.streams: list[Any] = []
        name = dtype_name(array.dtype) if array.dtype.kind in "fV" else array.dtype.name
        code, bits = _TYPES[name]
        start = array.__array_interface__["data"][0] if address is None else address
        self._device = device
        self._shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self._strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        tensor = _Tensor(
            start - byte_offset,
            *device,
            array.ndim,
            code,
            bits,
            1,
            self._shape,
            self._strides if strides else None,
            byte_offset,
        )
        self._managed: Any = (
            _ManagedVersioned(1, 0, None, None, 1 if read_only else 0, tensor)
            if versioned
            else _Managed(tensor, None, None)
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None) -> Any:
        # The struct is this object's own, so there is nothing for a deleter or a capsule destructor to do.
        self.exports += 1
        self.streams.append(stream)
        name = b"dltensor_versioned" if self.versioned and max_version is not None else b"dltensor"
        return _new_capsule(ctypes.addressof(self._managed), name, None)


class OldDLPackArray(DLPackArray):
    """A producer from before DLPack 1, which knows no `max_version`."""

    def __dlpack__(self, *, stream: Any = None) -> Any:  # type: ignore[override]
        return super().__dlpack__(stream=stream)
