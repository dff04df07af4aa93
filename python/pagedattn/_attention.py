# SPDX-License-Identifier: Apache-2.0
"""Attention, on NumPy, CuPy and DLPack arrays.

Each function fills in defaults, allocates what the caller did not give, and calls the C ABI, which does all the
checking.  Dimensions: T query tokens of the batch, B sequences, Hq query heads, Hkv KV heads, D head dimension, N
blocks, S tokens a block.
"""

from __future__ import annotations

from typing import Any

from pagedattn import _core
from pagedattn._arguments import parts, shape_of
from pagedattn._arrays import dtype_code, empty, empty_like, is_8bit


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
        multiply prompts of float8 queries with D up to 128 or of 192 in float8, which is faster, and weights rounded to
        it make results 2 to 3 % wrong.
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
        Query tokens that no sequence has more of.  Where it is small (speculative decoding), or what all of them have
        (prompts of one length), the GPU runs one kernel instead of two.  A sequence that has more is an error where
        values are verified, see ``check``, and its rows of ``out`` and ``lse`` are left as they were where they are
        not.
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
    if return_lse is not False:
        return_lse = _core.flag(operation, "return_lse", return_lse)
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
