# SPDX-License-Identifier: Apache-2.0
"""Blocks in host memory, to swap the blocks of device caches with."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import numpy as np

from pagedattn import _core
from pagedattn._arguments import array_list, too_large
from pagedattn._arrays import has_shape, numpy_dtype
from pagedattn._errors import InvalidArgumentError
from pagedattn._units import show_bytes

_ALIGNMENT = 256  # bytes, of each cache: accesses of neighbouring threads then begin at a line of the bus


class HostCache:
    """Host blocks for device caches: an array for each cache, page-locked where the caches lie in CUDA memory.

    :func:`swap_blocks` moves page-locked blocks by the device alone, at the bus's rate, while the host goes on.  The
    memory is freed when the cache is closed or forgotten and no array looks into it any more, and then not before every
    swap that uses it has ended: freeing waits for those.  It knows nothing of other copies, nor of swaps captured in a
    CUDA graph.

    Parameters
    ----------
    caches : array [N, ...] or list of such arrays
        The device caches, K and V of all layers.  For NumPy arrays the blocks lie in ordinary memory.
    num_blocks : int
        Blocks of each host array, as in ``BlockManager(num_host_blocks=...)``.

    Attributes
    ----------
    caches : list of NumPy arrays [num_blocks, ...]
        One for each cache, of its type and block shape, contiguous; their contents are undefined at first.
    num_blocks : int
    nbytes : int
        Of all arrays.
    page_locked : bool

    Raises
    ------
    InvalidArgumentError
        A cache is no array, or of a type that NumPy cannot hold.
    OutOfMemoryError
        There is not as much memory, or not as much that can be locked.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> k_cache, v_cache = np.ones((2, 4, 16, 2, 8), np.float32)
    >>> with pagedattn.HostCache([k_cache, v_cache], num_blocks=3) as host:
    ...     pagedattn.swap_blocks([k_cache, v_cache], host.caches, np.array([[2, 0]]))
    ...     host.caches[0].shape, float(host.caches[1][0].sum())
    ((3, 16, 2, 8), 256.0)
    """

    def __init__(self, caches: Any, num_blocks: int) -> None:
        like = array_list("HostCache", "caches", caches)
        self.num_blocks = _core.whole_number("HostCache", "num_blocks", num_blocks, 1)
        layouts = [_layout(cache, self.num_blocks, index) for index, cache in enumerate(like)]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in layouts]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        device = _core.cuda_device(like[0])
        self.page_locked = device is not None
        self.nbytes = sum(sizes)
        memory = _allocate(starts[-1], device)
        self.caches: list[np.ndarray] = [
            memory[start : start + size].view(dtype).reshape(shape)
            for start, size, (shape, dtype) in zip(starts[:-1], sizes, layouts, strict=True)
        ]

    def close(self) -> None:
        """Let go of the memory, which is freed if no array looks into it; waits for swaps that use it."""
        self.caches = []

    def __enter__(self) -> HostCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "page-locked" if self.page_locked else "ordinary"
        return f"HostCache({len(self.caches)} caches of {self.num_blocks} blocks, {self.nbytes} bytes, {kind} memory)"


def _layout(cache: Any, num_blocks: int, index: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the host array of a cache."""
    name = f"caches[{index}]"
    shape = cache.shape if has_shape(cache) else None
    if not shape:
        got = type(cache).__name__ if shape is None else "no dimension"
        raise InvalidArgumentError(f"HostCache: `{name}` must be an array of shape (num_blocks, ...); got {got}")
    try:
        dtype = numpy_dtype(cache)
    except TypeError as error:
        raise InvalidArgumentError(
            f"HostCache: `{name}` must be of a type that NumPy knows; got {cache.dtype}"
        ) from error
    if dtype.hasobject or dtype.itemsize == 0:  # references cannot be moved as bytes
        raise InvalidArgumentError(f"HostCache: `{name}` must be of a type of plain bytes; got {dtype}")
    return (num_blocks, *(int(extent) for extent in shape[1:])), dtype


def _allocate(num_bytes: int, device: int | None) -> np.ndarray:
    try:
        if device is None or num_bytes == 0:
            return np.empty(num_bytes, np.uint8)
        return _core.host_memory(num_bytes, device)
    except (MemoryError, ValueError, OverflowError) as error:
        raise too_large("HostCache", f"{show_bytes(num_bytes)} of host memory") from error
