# SPDX-License-Identifier: Apache-2.0
"""What the operations check in Python: lists of arrays, and how large an output must be.

Everything about arrays themselves is checked behind the C ABI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pagedattn import _core
from pagedattn._arrays import dtype_name, has_shape, host_dtype, is_8bit, is_on_cuda, numpy_dtype
from pagedattn._errors import InvalidArgumentError, OutOfMemoryError


def array_list(operation: str, argument: str, arrays: Any) -> list[Any] | tuple[Any, ...]:
    """Return an array as a list of one, and a list or tuple of at least one array as it is."""
    if has_shape(arrays):
        return [arrays]
    if not isinstance(arrays, (list, tuple)):
        raise InvalidArgumentError(
            f"{operation}: `{argument}` must be an array or a list of arrays; got {type(arrays).__name__}"
        )
    if not arrays:
        raise InvalidArgumentError(f"{operation}: `{argument}` must have at least one array; got none")
    return arrays


def parts(operation: str, argument: str, given: Any, stacked_ndim: int) -> list[Any]:
    """Return a sequence of arrays, or one stacked array, as a list of at least one part."""
    if has_shape(given):
        if len(given.shape) != stacked_ndim:
            raise InvalidArgumentError(
                f"{operation}: `{argument}` must be a sequence of arrays or one array of {stacked_ndim} dimensions; "
                f"got shape {tuple(given.shape)}"
            )
        listed = [given[i] for i in range(given.shape[0])]
    elif isinstance(given, (list, tuple, Sequence)):  # in this order: a list is known at once, a Sequence searched for
        listed = list(given)
    else:
        raise InvalidArgumentError(
            f"{operation}: `{argument}` must be a sequence of arrays or one stacked array; got {type(given).__name__}"
        )
    if not listed:
        raise InvalidArgumentError(f"{operation}: `{argument}` must have at least one part; got none")
    return listed


def shape_of(operation: str, argument: str, array: Any, dims: str) -> tuple[int, ...]:
    """Return an array's shape, which must have as many dimensions as `dims` names: "T, Hq, D"."""
    shape = tuple(array.shape) if has_shape(array) else None
    if shape is None or len(shape) != dims.count(",") + 1:
        got = type(array).__name__ if shape is None else shape
        raise InvalidArgumentError(f"{operation}: `{argument}` must have shape ({dims}); got {got}")
    return tuple(int(size) for size in shape)


def gathered_shape(
    k_cache: Any, block_tables: Any, seq_lens: Any, seq_starts: Any, out_start_loc: Any, total_tokens: Any
) -> tuple[int, int, int]:
    """Shape [R, Hkv, D] of what `gather_kv` returns, from host lengths or from `total_tokens`."""
    operation = "gather_kv"
    _, block_size, num_kv_heads, head_dim = shape_of(
        operation, "k_cache", k_cache, "num_blocks, block_size, num_kv_heads, head_dim"
    )
    _, max_blocks = shape_of(operation, "block_tables", block_tables, "num_seqs, max_blocks")
    if total_tokens is not None:
        return _core.whole_number(operation, "total_tokens", total_tokens, 0), num_kv_heads, head_dim
    if is_on_cuda(seq_lens):
        raise InvalidArgumentError(
            f"{operation}: `out` or `total_tokens` must be given for CUDA arrays, whose lengths are not read back; got "
            "none"
        )
    if out_start_loc is not None:
        starts = _host_integers(operation, "out_start_loc", out_start_loc)
        rows = int(starts[-1]) if len(starts) else 0
    else:
        # Lengths and starts out of range will be refused by name, which must not fail for want of memory first.
        lengths = np.clip(_host_integers(operation, "seq_lens", seq_lens), 0, max_blocks * block_size)
        rows = int(lengths.sum())
        if seq_starts is not None:
            rows -= int(np.maximum(_host_integers(operation, "seq_starts", seq_starts), 0).sum())
    return max(0, rows), num_kv_heads, head_dim


def _host_integers(operation: str, argument: str, array: Any) -> np.ndarray:
    """Return a one-dimensional host array of any library as int64."""
    if not isinstance(array, np.ndarray):
        if not hasattr(array, "__dlpack__") or is_on_cuda(array):
            raise InvalidArgumentError(
                f"{operation}: `{argument}` must be an int32 array on the host; got {type(array).__name__}"
            )
        array = np.from_dlpack(array)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"{operation}: `{argument}` must be int32 of one dimension; got {array.dtype} {array.shape}"
        )
    integers: np.ndarray = array.astype(np.int64)
    return integers


def gathered_dtype(dtype: Any, k_cache: Any, kv_dtype: Any) -> str:
    """Name of the type that `gather_kv` is asked for: the cache's, or a wider one if that is float8."""
    operation = "gather_kv"
    name = dtype_name(operation, "dtype", dtype)
    wanted = host_dtype(operation, "dtype", name)
    if is_8bit(k_cache) and wanted.itemsize > 1:
        return name
    stored = numpy_dtype(k_cache) if kv_dtype is None else host_dtype(operation, "kv_dtype", kv_dtype)
    # Storage that nobody named is refused behind the C ABI, in better words.
    if wanted != stored and stored != np.uint8:
        or_wider = ", or a wider one" if is_8bit(k_cache) else ""
        raise InvalidArgumentError(f"{operation}: `dtype` must be that of a cache of {stored}{or_wider}; got {name}")
    return name


def too_large(operation: str, what: str) -> OutOfMemoryError:
    """Return the error of memory that could not be allocated."""
    return OutOfMemoryError(f"{operation}: {what} could not be allocated")
