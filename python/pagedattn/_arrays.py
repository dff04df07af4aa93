# SPDX-License-Identifier: Apache-2.0
"""What differs between NumPy, CuPy, torch and other arrays: allocation, streams, and names of types."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from pagedattn import _core
from pagedattn._errors import InvalidArgumentError, UnsupportedError

# The C header's pa_dtype values.
_DTYPE_CODES = {
    "float32": 1,
    "float16": 2,
    "bfloat16": 3,
    "float8_e4m3": 4,
    "float8_e4m3fn": 4,
    "float8_e5m2": 5,
}
_ML_DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
_NAMES = {np.dtype(_ML_DTYPES.get(name, name)): name for name in _DTYPE_CODES}


def library_of(array: Any) -> str:
    """Name of the package that an array comes from: "numpy", "cupy", "torch", "jaxlib", ..."""
    return type(array).__module__.partition(".")[0]


def has_shape(array: Any) -> bool:
    """Whether something may be an array; False for the type of one, whose ``shape`` is not a shape."""
    return hasattr(array, "shape") and not isinstance(array, type)


def is_on_cuda(array: Any) -> bool:
    """Whether an array lies in CUDA memory; False for what is no array."""
    return _core.cuda_device(array) is not None


def numpy_dtype(array: Any) -> np.dtype[Any]:
    """NumPy's type for an array of any library; TypeError where it has none."""
    name = str(array.dtype).removeprefix("torch.")
    dtype: np.dtype[Any] = np.dtype(_ML_DTYPES.get(name, name) if library_of(array) == "torch" else array.dtype)
    return dtype


def dtype_name(operation: str, argument: str, dtype: Any) -> str:
    """Name of a float type given as a name, a NumPy dtype or a scalar type such as ``ml_dtypes.bfloat16``."""
    if isinstance(dtype, str):
        name = dtype
    else:
        # Compared as types: the `name` of ml_dtypes.float8_e4m3, which has infinities, is also that of the one here.
        try:
            name = _NAMES.get(np.dtype(dtype), "")
        except TypeError:
            name = ""
    if name not in _DTYPE_CODES:
        raise InvalidArgumentError(f"{operation}: `{argument}` must be one of {', '.join(_DTYPE_CODES)}; got {dtype!r}")
    return str(name)


def dtype_code(operation: str, argument: str, dtype: Any) -> int:
    """The C ABI's number of a float type."""
    return _DTYPE_CODES[dtype_name(operation, argument, dtype)]


def host_dtype(operation: str, argument: str, dtype: Any) -> np.dtype[Any]:
    """NumPy's type for a float type given as `dtype_name` takes it."""
    name = dtype_name(operation, argument, dtype)
    result: np.dtype[Any] = np.dtype(_ML_DTYPES.get(name, name))
    return result


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Uninitialised array of a named or NumPy type, of the library and on the device of ``like``.

    Libraries whose arrays are immutable or unknown here get a NumPy or CuPy array.
    """
    library = library_of(like)
    if library == "torch":
        torch = sys.modules["torch"]
        name = {"float8_e4m3": "float8_e4m3fn"}.get(dtype, dtype) if isinstance(dtype, str) else np.dtype(dtype).name
        return torch.empty(shape, dtype=getattr(torch, name), device=like.device)
    numpy_dtype = np.dtype(_ML_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    device = _core.cuda_device(like)
    if device is None:
        return np.empty(shape, numpy_dtype)
    try:
        import cupy
    except ImportError:
        raise UnsupportedError(
            f"results for CUDA arrays of {library} are CuPy arrays, and CuPy is not installed; install "
            "pagedattn[cu12] or pagedattn[cu13], or give the outputs"
        ) from None
    with cupy.cuda.Device(device):
        return cupy.empty(shape, numpy_dtype)


def empty_like(operation: str, argument: str, array: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Uninitialised dense array of the type of ``array`` and, unless another is given, its shape."""
    if not hasattr(array, "dtype") or not has_shape(array):
        raise InvalidArgumentError(f"{operation}: `{argument}` must be an array; got {type(array).__name__}")
    wanted = tuple(array.shape) if shape is None else shape
    if library_of(array) == "torch":
        return sys.modules["torch"].empty(wanted, dtype=array.dtype, device=array.device)
    return empty(wanted, getattr(array.dtype, "name", array.dtype) if is_foreign(array) else array.dtype, array)


def is_8bit(array: Any) -> bool:
    """Whether an array has elements of one byte; False for what is no array."""
    return getattr(getattr(array, "dtype", None), "itemsize", None) == 1 and has_shape(array)


def is_foreign(array: Any) -> bool:
    """Whether an array is of a library other than NumPy, CuPy and torch."""
    return library_of(array) not in ("numpy", "cupy", "torch")
