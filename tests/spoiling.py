"""Ways to spoil one argument of a call.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from failing_calls import Arguments

HOST: dict[str, Any] = {"host_only": True}  # CuPy has no such array


def change(argument: str, function: Callable[[Any], Any]) -> Callable[[Arguments], Any]:
    """Return what replaces one argument by a function of it."""
    return lambda call: call.update({argument: function(call[argument])})


def put(argument: str, value: Any) -> Callable[[Arguments], Any]:
    return lambda call: call.update({argument: value})


def cast(argument: str, dtype: Any) -> Callable[[Arguments], Any]:
    return change(argument, lambda array: array.astype(dtype))


def entry(argument: str, index: Any, value: int) -> Callable[[Arguments], Any]:
    """Return what sets one element of an index array."""
    return lambda call: call[argument].__setitem__(index, value)


def item(argument: str, index: int, function: Callable[[Any], Any]) -> Callable[[Arguments], Any]:
    """Return what replaces one array of a list or pair."""

    def spoil(call: Arguments) -> None:
        arrays = list(call[argument])
        arrays[index] = function(arrays[index])
        call[argument] = type(call[argument])(arrays)

    return spoil


def no_unit_stride(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=-1)[..., ::2]


def every_other(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=0)[::2]


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def swapped_bytes(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder())


def one_row_for_all(array: np.ndarray) -> np.ndarray:
    return np.ndarray(array.shape, array.dtype, buffer=array, strides=(0, *array.strides[1:]))


def sliding(array: np.ndarray) -> np.ndarray:
    """Rows that overlap by all but one element."""
    return np.ndarray(array.shape, array.dtype, buffer=array, strides=(array.itemsize, *array.strides[1:]))
