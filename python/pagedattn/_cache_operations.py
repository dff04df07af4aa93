# SPDX-License-Identifier: Apache-2.0
"""What writes, copies, moves and reads the pages of a cache, on NumPy, CuPy and DLPack arrays.

Each function fills in defaults, allocates what the caller did not give, and calls the C ABI, which does all the
checking.  Dimensions: T new tokens, B sequences, Hq query heads, Hkv KV heads, D head dimension, N blocks, S tokens a
block.
"""

from __future__ import annotations

from typing import Any

from pagedattn import _core
from pagedattn._arguments import array_list, gathered_dtype, gathered_shape, too_large
from pagedattn._arrays import dtype_code, empty, empty_like
from pagedattn._errors import InvalidArgumentError


def reshape_and_cache(
    key: Any,
    value: Any,
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_dtype: Any = None,
    stream: Any = None,
    check: bool | None = None,
) -> None:
    """Write the keys and values of new tokens into their slots of the paged cache, of one layer or of many at once.

    Parameters
    ----------
    key, value : array [T', Hkv, D], or list of such arrays
        New keys and values, float32, float16 or bfloat16.  T' may exceed T (graph padding); rows past T are ignored.
        A list has an array a layer, of one shape, type and strides; up to 96 layers take one launch.
    k_cache, v_cache : array [N, S, Hkv, D], or list of such arrays
        The cache, of key's type, or float8: then ``x / scale`` is stored, rounded to nearest and saturated.
    slot_mapping : int64 array [T]
        Slot of each token, ``block * S + offset``, in every layer.  Negative: skipped.  No slot may stand twice.
    k_scale, v_scale : float or float32 array [1] or [Hkv], or [L, 1] or [L, Hkv] of L layers, optional
        Scales of a float8 cache.
    kv_dtype : str or dtype, optional
        What uint8 or uint16 cache storage holds.
    stream : optional
        CUDA stream; the current one by default.
    check : bool, optional
        Verify the slots on the GPU too (synchronises).  Unchecked, bad slots on the GPU are skipped.

    Raises
    ------
    InvalidArgumentError
        An argument is wrong; nothing was written.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> k_cache, v_cache = np.zeros((2, 4, 16, 2, 8), np.float32)
    >>> key = value = np.ones((3, 2, 8), np.float32)
    >>> pagedattn.reshape_and_cache(key, value, k_cache, v_cache, np.array([17, -1, 18]))
    >>> float(k_cache[1].sum())
    32.0
    """
    _core.reshape_and_cache(
        key,
        value,
        k_cache,
        v_cache,
        slot_mapping,
        k_scale,
        v_scale,
        0 if kv_dtype is None else dtype_code("reshape_and_cache", "kv_dtype", kv_dtype),
        check,
        stream,
    )


def rope_and_cache(
    key: Any,
    value: Any,
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    positions: Any,
    cos_sin: Any,
    *,
    query: Any = None,
    query_out: Any = None,
    interleaved: bool = False,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_dtype: Any = None,
    stream: Any = None,
    check: bool | None = None,
) -> Any:
    """Rotate keys by their positions on their way into the paged cache, and queries beside them: one launch.

    A pair ``(x, y)`` of dimensions becomes ``(x cos - y sin, y cos + x sin)`` in float32, and is rounded once, to the
    cache's or the query's type.  The key itself is not changed.

    Parameters
    ----------
    key, value : array [T', Hkv, D]
        New keys, before rotation, and values: float32, float16 or bfloat16, D even.  T' may exceed T (graph padding).
    k_cache, v_cache : array [N, S, Hkv, D]
        The cache, of key's type, or float8: then ``x / scale`` is stored, rounded to nearest and saturated.
    slot_mapping : int64 array [T]
        Slot of each token, ``block * S + offset``.  Negative: the key and value are skipped.  No slot may stand twice.
    positions : int64 or int32 array [T]
        Position of each token in its sequence, a row of ``cos_sin``, also where the slot is negative.
    cos_sin : array [max_position, R]
        R / 2 cosines, then R / 2 sines: float32, float16 or bfloat16.  R is even and at most D; the dimensions from R
        on are not rotated.
    query : array [T', Hq, D], optional
        Queries of key's type.
    query_out : array [T', Hq, D], optional
        Where to write the rotated queries, of which rows past T are left alone; ``query`` itself by default.
    interleaved : bool
        Dimensions ``2 i`` and ``2 i + 1`` make a pair (GPT-J); otherwise ``i`` and ``i + R / 2`` (GPT-NeoX, Llama).
    k_scale, v_scale : float or float32 array [1] or [Hkv], optional
        Scales of a float8 cache.
    kv_dtype : str or dtype, optional
        What uint8 or uint16 storage holds.
    stream : optional
        CUDA stream; the current one by default.
    check : bool, optional
        Verify slots and positions on the GPU too (synchronises).  Unchecked, tokens at a bad position on the GPU are
        left alone, and bad slots are skipped.

    Returns
    -------
    array or None
        ``query_out``, where there is a query.

    Raises
    ------
    InvalidArgumentError
        An argument is wrong; nothing was written.

    References
    ----------
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> k_cache, v_cache = np.zeros((2, 4, 16, 1, 2), np.float32)
    >>> key = value = np.ones((1, 1, 2), np.float32)
    >>> quarter_turns = np.array([[1, 0], [0, 1]], np.float32)  # cosine and sine of 0 and 90 degrees
    >>> pagedattn.rope_and_cache(key, value, k_cache, v_cache, np.array([17]), np.array([1]), quarter_turns)
    >>> k_cache[1, 1, 0].tolist(), v_cache[1, 1, 0].tolist()
    ([-1.0, 1.0], [1.0, 1.0])
    """
    if query_out is None:
        query_out = query
    _core.rope_and_cache(
        key,
        value,
        k_cache,
        v_cache,
        slot_mapping,
        positions,
        cos_sin,
        query,
        query_out,
        interleaved,
        k_scale,
        v_scale,
        0 if kv_dtype is None else dtype_code("rope_and_cache", "kv_dtype", kv_dtype),
        check,
        stream,
    )
    return query_out


def copy_blocks(caches: Any, block_mapping: Any, *, stream: Any = None, check: bool | None = None) -> None:
    """Copy whole blocks within caches: copy-on-write, for K and V of all layers in one launch.

    Parameters
    ----------
    caches : array [N, ...] or list of such arrays
        Caches of one shape, type and strides.
    block_mapping : int64 array [M, 2]
        (source, destination) pairs, on the caches' device.  A destination must not stand twice, nor be a source.
    stream : optional
        CUDA stream; the current one by default.
    check : bool, optional
        Verify the mapping on the GPU too (synchronises).  Unchecked, pairs out of range are skipped there.

    Raises
    ------
    InvalidArgumentError
        An argument is wrong; nothing was written.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> cache = np.arange(4 * 2, dtype=np.float32).reshape(4, 2, 1, 1)
    >>> pagedattn.copy_blocks(cache, np.array([[1, 3]]))
    >>> cache[3].ravel().tolist()
    [2.0, 3.0]
    """
    _core.copy_blocks(array_list("copy_blocks", "caches", caches), block_mapping, check, stream)


def swap_blocks(src: Any, dst: Any, block_mapping: Any, *, event: Any = None, stream: Any = None) -> None:
    """Copy whole blocks between host and device caches, or between two caches on one side.

    Parameters
    ----------
    src, dst : array [N, ...] or lists of such arrays
        Caches of one block shape and type; numbers of blocks may differ.
    block_mapping : int64 NumPy array [M, 2]
        (source, destination) pairs, in host memory; always verified.  It has been read when the call returns.
    event : optional
        CUDA event (CuPy, torch, or an int) that is recorded behind the copies, to wait for; absent for host arrays.
    stream : optional
        CUDA stream; the current one by default.  The copies are enqueued on it: host memory must stay alive until it
        has passed them, which that of a :class:`HostCache` does by itself.  Memory that is not page-locked is moved
        slower, a block at a time, and the call may wait for it (``last_kernel()`` then says
        ``cuda::swap_blocks_pageable``).

    Raises
    ------
    InvalidArgumentError
        An argument is wrong; nothing was written.

    See Also
    --------
    HostCache : page-locked blocks to swap with.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> device, host = np.ones((4, 2, 1, 1), np.float32), np.zeros((2, 2, 1, 1), np.float32)
    >>> pagedattn.swap_blocks(device, host, np.array([[3, 0]]))
    >>> host[:, 0, 0, 0].tolist()
    [1.0, 0.0]
    """
    sources = array_list("swap_blocks", "src", src)
    destinations = array_list("swap_blocks", "dst", dst)
    _core.swap_blocks(sources, destinations, block_mapping, event, stream)


def gather_kv(
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    seq_starts: Any = None,
    out_start_loc: Any = None,
    total_tokens: int | None = None,
    out: tuple[Any, Any] | None = None,
    dtype: Any = None,
    kv_dtype: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    stream: Any = None,
    check: bool | None = None,
) -> tuple[Any, Any]:
    """Copy pages back to contiguous keys and values, one sequence behind the other.

    Parameters
    ----------
    k_cache, v_cache : array [N, S, Hkv, D]
        The paged cache.
    block_tables : int32 array [B, max_blocks]
        Blocks of each sequence.
    seq_lens : int32 array [B]
        Tokens up to here are gathered.
    seq_starts : int32 array [B], optional
        Tokens from here on; 0 by default.
    out_start_loc : int32 array [B + 1], optional
        First output row of each sequence; by default they follow each other.
    total_tokens : int, optional
        Rows R of the output.  CUDA lengths are not read back, so there it or ``out`` is required.
    out : (array, array), optional
        Where to write, [R, Hkv, D] each; rows that no token fills stay as they are.
    dtype : str or dtype, optional
        Type of the output: the cache's by default, or a wider one to dequantise a float8 cache.
    kv_dtype : str or dtype, optional
        What uint8 or uint16 cache storage holds.
    k_scale, v_scale : float or float32 array [1] or [Hkv], optional
        Scales of a float8 cache that is dequantised.
    stream, check : optional
        As for :func:`paged_attention`.

    Returns
    -------
    (array, array)
        Keys and values, [R, Hkv, D].

    Raises
    ------
    InvalidArgumentError
        An argument is wrong; nothing was written.
    OutOfMemoryError
        There is no memory for the output.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> k_cache, v_cache = np.random.default_rng(0).standard_normal((2, 4, 16, 2, 8), dtype=np.float32)
    >>> k, v = pagedattn.gather_kv(k_cache, v_cache, np.array([[2, 0]], np.int32), np.array([20], np.int32))
    >>> k.shape, bool((k[16:] == k_cache[0, :4]).all())
    ((20, 2, 8), True)
    """
    operation = "gather_kv"
    if out is None:
        shape = gathered_shape(k_cache, block_tables, seq_lens, seq_starts, out_start_loc, total_tokens)
        name = None if dtype is None else gathered_dtype(dtype, k_cache, kv_dtype)
        try:
            if name is None:
                out = (
                    empty_like(operation, "k_cache", k_cache, shape),
                    empty_like(operation, "v_cache", v_cache, shape),
                )
            else:
                out = (empty(shape, name, k_cache), empty(shape, name, k_cache))
        except (MemoryError, ValueError) as error:
            raise too_large(operation, f"an output of shape {shape}") from error
    elif not isinstance(out, (tuple, list)) or len(out) != 2:
        raise InvalidArgumentError(f"{operation}: `out` must be a pair of arrays (k, v); got {type(out).__name__}")
    elif dtype is not None or total_tokens is not None:
        raise InvalidArgumentError(f"{operation}: `dtype` and `total_tokens` must be absent where `out` is given")
    k_out, v_out = out
    try:
        _core.gather_kv(
            k_cache,
            v_cache,
            block_tables,
            seq_lens,
            seq_starts,
            out_start_loc,
            k_scale,
            v_scale,
            k_out,
            v_out,
            0 if kv_dtype is None else dtype_code(operation, "kv_dtype", kv_dtype),
            check,
            stream,
        )
    except InvalidArgumentError as error:
        # The C ABI's names for what has others here: an output that was allocated is as long as was asked for.
        keys, values = ("out[0]", "out[1]") if total_tokens is None else ("total_tokens",) * 2
        message = str(error).replace("`k_out`", f"`{keys}`").replace("`v_out`", f"`{values}`")
        raise InvalidArgumentError(message) from None
    return k_out, v_out
