# SPDX-License-Identifier: Apache-2.0
"""Caches in host memory, as the CPU backend reads them fastest."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np

from pagedattn import _core
from pagedattn._arguments import too_large
from pagedattn._arrays import host_dtype
from pagedattn._units import show_bytes

_HUGE_PAGE = 2 << 20


class KVCache:
    """Keys and values of all layers in host memory, laid out for the CPU.

    Any arrays serve as caches; these are the ones that are read fastest.  The memory lies on huge pages where the
    system has them, since blocks in shuffled order on small pages miss the processor's translation buffers, and the K
    and the V of a block lie side by side.  Slots are zeros at first, and a page takes memory once something is written
    to it.

    Parameters
    ----------
    num_blocks, block_size, num_kv_heads, head_dim : int
        Shape of each cache.
    dtype : str or NumPy type
        ``float32``, ``float16``, ``bfloat16``, ``float8_e4m3`` or ``float8_e5m2``.
    num_layers : int
        Layers, each with caches of its own.

    Attributes
    ----------
    k_caches, v_caches : list of NumPy arrays [num_blocks, block_size, num_kv_heads, head_dim]
        One a layer.  A block is contiguous; from one block to the next are two.
    nbytes : int
        Of all arrays.

    Raises
    ------
    InvalidArgumentError
        A size is no whole number of at least 1, or the type is none of these.
    OutOfMemoryError
        There is not as much memory.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> cache = pagedattn.KVCache(4, 16, 2, 8, "float32", num_layers=2)
    >>> tokens = np.ones((3, 2, 8), np.float32)
    >>> pagedattn.reshape_and_cache([tokens] * 2, [tokens] * 2, cache.k_caches, cache.v_caches, np.arange(3))
    >>> float(cache.k_caches[1].sum()), cache.nbytes
    (48.0, 16384)
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: Any, *, num_layers: int = 1
    ) -> None:
        given = {
            "num_blocks": num_blocks,
            "block_size": block_size,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "num_layers": num_layers,
        }
        blocks, *block, layers = (_core.whole_number("KVCache", name, value, 1) for name, value in given.items())
        element = host_dtype("KVCache", "dtype", dtype)
        shape = (layers, blocks, 2, *block)
        self.nbytes = math.prod(shape) * element.itemsize
        memory = _huge_pages(self.nbytes).view(element).reshape(shape)
        self.k_caches: list[np.ndarray] = [memory[layer, :, 0] for layer in range(layers)]
        self.v_caches: list[np.ndarray] = [memory[layer, :, 1] for layer in range(layers)]

    def __repr__(self) -> str:
        blocks, size, heads, dim = self.k_caches[0].shape
        return (
            f"KVCache({len(self.k_caches)} layers of {blocks} blocks of {size} tokens, {heads} heads of {dim}, "
            f"{self.k_caches[0].dtype}, {self.nbytes} bytes)"
        )


def _huge_pages(num_bytes: int) -> np.ndarray:
    """Zeros that begin at the border of a huge page; freed with the last array that looks into them."""
    try:
        # Private: memory to be shared with other processes has huge pages only where the system was told so.
        pages = -(-num_bytes // _HUGE_PAGE) + 1
        mapping = mmap.mmap(-1, pages * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise too_large("KVCache", show_bytes(num_bytes)) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    start = -memory.ctypes.data % _HUGE_PAGE
    return memory[start : start + num_bytes]
