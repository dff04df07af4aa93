# SPDX-License-Identifier: Apache-2.0
"""The operations on NumPy, CuPy and DLPack arrays.

Each function fills in defaults, allocates what the caller did not give, and calls the C ABI, which does all the
checking.  Dimensions: T query tokens of the batch, B sequences, Hq query heads, Hkv KV heads, D head dimension, N
blocks, S tokens a block.
"""

from __future__ import annotations

from typing import Any

from pagedattn import _core
from pagedattn._arguments import (
    array_list,
    gathered_dtype,
    gathered_shape,
    parts,
    shape_of,
    too_large,
)
from pagedattn._arrays import dtype_code, empty, empty_like, is_8bit
from pagedattn._errors import InvalidArgumentError


def paged_attention(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    query_start_loc: Any = None,
    max_query_len: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_dtype: Any = None,
    out: Any = None,
    return_lse: bool = False,
    lse: Any = None,
    workspace: Any = None,
    stream: Any = None,
    deterministic: bool = False,
    check: bool | None = None,
) -> Any:
    """Attention of query tokens over their sequences' paged keys and values.

    One call serves decode, speculative decode, chunked prefill, full prefill and any mix of them in one ragged batch.
    Query token ``r`` of a sequence with ``n`` query tokens and length ``L`` sits at position ``L - n + r``.

    Parameters
    ----------
    q : array [T, Hq, D]
        Queries, float32, float16, bfloat16 or float8 (e4m3, e5m2).  D is a multiple of 8, at most 256.  Hopper GPUs
        multiply prompts of float8 queries with D up to 128 in float8, which is faster, and weights rounded to it make
        results 2 to 3 % wrong.
    k_cache, v_cache : array [N, S, Hkv, D]
        The paged cache, of q's type, or float8 with a 16-bit q.  Any strides with a contiguous last dimension; Hq is a
        multiple of Hkv.
    block_tables : int32 array [B, max_blocks]
        Block of each run of S tokens.  Entries past ``ceil(seq_len / S)`` are never read.
    seq_lens : int32 array [B]
        Tokens in the cache of each sequence, its query tokens included.
    query_start_loc : int32 array [B + 1], optional
        First row of each sequence in q, and T.  Absent: one query token a sequence.
    max_query_len : int, optional
        Query tokens that no sequence has more of.  Where it is small (speculative decoding), the GPU runs one kernel
        instead of two.  A sequence that has more is an error where values are verified, see ``check``, and its rows
        of ``out`` and ``lse`` are left as they were where they are not.
    scale : float, optional
        Of the scores; ``D ** -0.5`` by default.
    causal : bool
        Row ``r`` sees the keys ``0 ... L - n + r``; otherwise all ``L``.
    window : int, optional
        Of the visible keys only the last ``window``.
    softcap : float
        Scores become ``softcap * tanh(score / softcap)``; 0 for none.
    alibi_slopes : float32 array [Hq], optional
        ``slope * (key position - query position)`` is added to each score.
    sinks : float32 array [Hq], optional
        ``exp(sink)`` is added to each softmax denominator.
    q_scale : float or float32 array [1] or [Hkv], optional
        Stored queries times this are the real ones, those of the heads of a KV head times its own; float8 queries only.
    k_scale, v_scale : float or float32 array [1] or [Hkv], optional
        Stored keys and values times these are the real ones; float8 caches only.
    kv_dtype : str or dtype, optional
        What uint8 or uint16 cache storage holds: "float8_e4m3", "float8_e5m2", "float16" or "bfloat16".  Queries in
        uint8 storage are of that type too.
    out : array [T, Hq, D], optional
        Where to write, float16 or bfloat16 with float8 queries, else of q's type; allocated like q, or as bfloat16, by
        default.  Must not overlap an input.
    return_lse : bool
        Return ``(out, lse)``.
    lse : float32 array [T, Hq], optional
        Where to write the natural log of the softmax denominators (sinks included).
    workspace : uint8 array, optional
        CUDA scratch of :func:`paged_attention_workspace_size` bytes, zero when first used.  With it and ``out`` a call
        allocates nothing and can be captured in a CUDA graph.
    stream : optional
        CUDA stream (CuPy, torch, or an int); torch's current one for torch tensors, else CuPy's, by default.  Arrays
        must stay alive until the stream has passed the call.
    deterministic : bool
        The bits of a sequence's result do not depend on the rest of the batch.
    check : bool, optional
        Verify lengths and block tables on the GPU too, which synchronises; by default as the environment variable
        ``PAGEDATTN_CHECK`` says.  On the CPU they are always verified.

    Returns
    -------
    array or (array, array)
        ``out``, or ``(out, lse)``.  A row that sees no key gives zeros and ``-inf`` (with sinks: the sink).

    Raises
    ------
    InvalidArgumentError
        An argument is wrong; nothing was written.
    UnsupportedError, DeviceError
        CUDA arrays without a CUDA build, device or driver.
    MemoryError
        There is no memory for ``out`` or for scratch, where they are not given.

    References
    ----------
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023;
    Dao, "FlashAttention-2", ICLR 2024.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> rng = np.random.default_rng(0)
    >>> k_cache, v_cache = rng.standard_normal((2, 8, 16, 2, 64), dtype=np.float32)
    >>> q = rng.standard_normal((2, 4, 64), dtype=np.float32)
    >>> block_tables = np.array([[5, 0], [3, 7]], np.int32)
    >>> seq_lens = np.array([20, 32], np.int32)
    >>> pagedattn.paged_attention(q, k_cache, v_cache, block_tables, seq_lens).shape
    (2, 4, 64)
    """
    operation = "paged_attention"
    if out is None:
        out = empty(tuple(q.shape), "bfloat16", q) if is_8bit(q) else empty_like(operation, "q", q)
    if return_lse and lse is None:
        lse = empty(shape_of(operation, "q", q, "T, num_q_heads, head_dim")[:2], "float32", q)
    _core.paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        alibi_slopes,
        sinks,
        q_scale,
        k_scale,
        v_scale,
        out,
        lse,
        workspace,
        max_query_len,
        scale,
        window,
        softcap,
        causal,
        0 if kv_dtype is None else dtype_code(operation, "kv_dtype", kv_dtype),
        deterministic,
        check,
        stream,
    )
    return (out, lse) if return_lse else out


def paged_attention_workspace_size(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    query_start_loc: Any = None,
    max_query_len: int | None = None,
    kv_dtype: Any = None,
    deterministic: bool = False,
) -> int:
    """Bytes of ``workspace`` with which :func:`paged_attention` allocates nothing for such arguments.

    The size depends on shapes, types and the device, not on the values.  0 for host arrays.

    Parameters
    ----------
    q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, max_query_len, kv_dtype, deterministic
        As they will be given to :func:`paged_attention`, which also says what it raises.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> cache = np.zeros((8, 16, 2, 64), np.float32)
    >>> pagedattn.paged_attention_workspace_size(
    ...     np.zeros((1, 4, 64), np.float32), cache, cache, np.zeros((1, 2), np.int32), np.ones(1, np.int32)
    ... )
    0
    """
    operation = "paged_attention"
    return _core.paged_attention_workspace_size(
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        max_query_len,
        0 if kv_dtype is None else dtype_code(operation, "kv_dtype", kv_dtype),
        deterministic,
    )


def merge_states(
    outs: Any,
    lses: Any,
    *,
    out: Any = None,
    lse: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Join partial attention results over disjoint sets of keys (cascade or context-parallel attention).

    Parameters
    ----------
    outs : sequence of arrays [T, H, D], or one array [P, T, H, D]
        The parts' outputs, float32, float16 or bfloat16.
    lses : sequence of float32 arrays [T, H], or one array [P, T, H]
        Their log-sum-exps.  A part whose lse is ``-inf`` does not count, whatever its output holds.
    out : array [T, H, D], optional
        Where to write the output, of the parts' type; must not overlap a part.
    lse : float32 array [T, H], optional
        Where to write the log-sum-exp; must not overlap a part.
    stream : optional
        CUDA stream; the current one by default.

    Returns
    -------
    (array, array)
        Output and log-sum-exp over all keys.

    Raises
    ------
    InvalidArgumentError
        An argument is wrong; nothing was written.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> outs = np.array([[[[1.0, 1.0]]], [[[3.0, 3.0]]]], np.float32)
    >>> lses = np.zeros((2, 1, 1), np.float32)
    >>> out, lse = pagedattn.merge_states(outs, lses)
    >>> out.ravel().tolist(), round(float(lse[0, 0]), 4)
    ([2.0, 2.0], 0.6931)
    """
    operation = "merge_states"
    out_parts = parts(operation, "outs", outs, 4)
    lse_parts = parts(operation, "lses", lses, 3)
    if out is None:
        out = empty_like(operation, "outs", out_parts[0])
    if lse is None:
        lse = empty(shape_of(operation, "outs[0]", out_parts[0], "T, num_heads, head_dim")[:2], "float32", out_parts[0])
    _core.merge_states(out_parts, lse_parts, out, lse, stream)
    return out, lse


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
    return k_out, v_out
