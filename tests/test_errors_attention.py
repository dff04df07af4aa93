"""Every wrong argument of paged_attention: its own clear error, and nothing written.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pagedattn
import pytest
from backends import NumpyBackend
from failing_calls import (
    Arguments,
    Bad,
    attention_call,
    check_bad,
    float8_attention_call,
    float8_queries_call,
    on,
)
from spoiling import (
    HOST,
    cast,
    change,
    entry,
    every_other,
    no_unit_stride,
    one_row_for_all,
    put,
    read_only,
    sliding,
    swapped_bytes,
)

POSITIVE = "must be a positive finite number; got "
FP8 = {"start": float8_attention_call}
FP8_Q = {"start": float8_queries_call}


def attention(name: str, spoil: Any, argument: str, says: str, **more: Any) -> Bad:
    return Bad(name, spoil, argument, says, more.pop("start", attention_call), "paged_attention", **more)


ATTENTION_ARRAYS = [
    attention("q of float64", cast("q", np.float64), "q", "float64", **HOST),
    attention("q of integers", cast("q", np.int32), "q", "int32"),
    attention("q of complex numbers", cast("q", np.complex64), "q", "complex64"),
    attention("q of swapped bytes", change("q", swapped_bytes), "q", "byte order", **HOST),
    attention("q without a head dimension", change("q", lambda q: q[:, 0]), "q", r"\(4, 8\)"),
    attention("q of four dimensions", change("q", lambda q: q[None]), "q", r"\(1, 4, 4, 8\)"),
    attention("q of six dimensions", change("q", lambda q: q[None, None, None]), "q", "6"),
    attention(
        "head_dim that is no multiple of 8", change("q", lambda q: q[..., :7]), "q", r"multiple of 8.*\(4, 4, 7\)"
    ),
    attention("head_dim above 256", put("q", np.zeros((4, 4, 264), np.float32)), "q", r"256; got .*\(4, 4, 264\)"),
    attention("head_dim of 0", put("q", np.zeros((4, 4, 0), np.float32)), "q", r"\(4, 4, 0\)"),
    attention("q with a last stride of 2", change("q", no_unit_stride), "q", "last stride of 2"),
    attention("q with a negative stride", change("q", lambda q: q[::-1]), "q", "negative strides"),
    attention("a list for q", change("q", lambda q: q.tolist()), "q", "list"),
    attention("None for q", put("q", None), "q", "None|required"),
    attention("query heads that KV heads do not divide", put("q", np.zeros((4, 3, 8), np.float32)), "q", "got 3"),
    attention("no query heads", put("q", np.zeros((4, 0, 8), np.float32)), "q", "got 0"),
    attention("k_cache of three dimensions", change("k_cache", lambda k: k[0]), "k_cache", r"got float32 \(4, 2, 8\)"),
    attention("k_cache of another head_dim", put("k_cache", np.zeros((6, 4, 2, 16), np.float32)), "k_cache", "16"),
    attention(
        "caches without slots",
        lambda call: call.update({n: np.zeros((6, 0, 2, 8), np.float32) for n in ("k_cache", "v_cache")}),
        "k_cache",
        r"\(6, 0, 2, 8\)",
    ),
    attention("k_cache of another float type", cast("k_cache", np.float16), "v_cache", "float16.*got float32"),
    attention("k_cache of integers", cast("k_cache", np.int32), "k_cache", "int32"),
    attention("k_cache of swapped bytes", change("k_cache", swapped_bytes), "k_cache", "byte order", **HOST),
    attention("k_cache with a last stride of 2", change("k_cache", no_unit_stride), "k_cache", "last stride of 2"),
    attention("None for k_cache", put("k_cache", None), "k_cache", "None|required"),
    attention("v_cache of fewer blocks", change("v_cache", lambda v: v[:5]), "v_cache", r"got float32 \(5, 4, 2, 8\)"),
    attention("v_cache of other heads", change("v_cache", lambda v: v[:, :, :1]), "v_cache", r"\(6, 4, 1, 8\)"),
    attention("v_cache of another type", cast("v_cache", np.float16), "v_cache", "float16"),
    attention("v_cache with a last stride of 2", change("v_cache", no_unit_stride), "v_cache", "last stride of 2"),
    attention("block_tables of int64", cast("block_tables", np.int64), "block_tables", r"int32.*got int64 \(3, 3\)"),
    attention("block_tables of floats", cast("block_tables", np.float32), "block_tables", "int32.*got float32"),
    attention(
        "block_tables of swapped bytes", change("block_tables", swapped_bytes), "block_tables", "byte order", **HOST
    ),
    attention("flat block_tables", change("block_tables", np.ravel), "block_tables", r"got int32 \(9,\)"),
    attention(
        "too few block_tables",
        change("block_tables", lambda t: t[:2]),
        "block_tables",
        r"\(num_seqs, max_blocks\) = \(3, 3\); got int32 \(2, 3\)",
    ),
    attention("block_tables by columns", change("block_tables", np.asfortranarray), "block_tables", "last stride"),
    attention("seq_lens of int64", cast("seq_lens", np.int64), "seq_lens", "int32.*got int64"),
    attention("seq_lens of bools", cast("seq_lens", np.bool_), "seq_lens", "bool"),
    attention(
        "seq_lens of two dimensions", change("seq_lens", lambda n: n[:, None]), "seq_lens", r"got int32 \(3, 1\)"
    ),
    attention("seq_lens with gaps", change("seq_lens", every_other), "seq_lens", "contiguous.*stride of 2"),
    attention("a list for seq_lens", change("seq_lens", lambda n: n.tolist()), "seq_lens", "list"),
    attention("query_start_loc of int64", cast("query_start_loc", np.int64), "query_start_loc", "int32.*got int64"),
    attention(
        "query_start_loc without T",
        change("query_start_loc", lambda s: s[:3]),
        "query_start_loc",
        r"\(num_seqs \+ 1,\) = \(4,\); got int32 \(3,\)",
    ),
    attention("no query_start_loc with T != B", put("query_start_loc", None), "query_start_loc", "T = 4"),
]

ATTENTION_OPTIONS = [
    attention("window of 0", put("window", 0), "window", "got 0"),
    attention("negative window", put("window", -4), "window", "got -4"),
    attention("fractional window", put("window", 2.5), "window", "got 2.5"),
    attention("max_query_len of 0", put("max_query_len", 0), "max_query_len", "got 0"),
    attention("negative max_query_len", put("max_query_len", -1), "max_query_len", "got -1"),
    attention("negative softcap", put("softcap", -1.0), "softcap", "got -1"),
    attention("softcap of NaN", put("softcap", np.nan), "softcap", "got -?nan"),
    attention("infinite softcap", put("softcap", np.inf), "softcap", "got inf"),
    attention("softcap in words", put("softcap", "big"), "softcap", "got 'big'"),
    attention("softcap that float32 has no place for", put("softcap", 1e-46), "softcap", "float32.*got 1e-46"),
    attention("softcap that float32 cannot divide by", put("softcap", 1e-40), "softcap", "float32.*got 1e-40"),
    attention("scale of NaN", put("scale", np.nan), "scale", "finite.*got nan"),
    attention("infinite scale", put("scale", np.inf), "scale", "finite.*got inf"),
    attention("scale beyond float32", put("scale", 1e300), "scale", r"got 1e\+300"),
    attention("scale that float32 has no place for", put("scale", 1e-50), "scale", "float32.*got 1e-50"),
    attention("scale of few bits", put("scale", -1e-40), "scale", "float32.*got -1e-40"),
    attention("scale in words", put("scale", "big"), "scale", "got 'big'"),
    attention("scale as text", put("scale", "0.5"), "scale", "got '0.5'"),
    attention("scale beyond float64", put("scale", 10**400), "scale", "finite"),
    attention("causal of None", put("causal", None), "causal", "True or False; got None"),
    attention("deterministic of 1", put("deterministic", 1), "deterministic", "True or False; got 1"),
    attention("return_lse in words", put("return_lse", "x"), "return_lse", "True or False; got 'x'"),
    attention("return_lse of 1.5", put("return_lse", 1.5), "return_lse", "True or False; got 1.5"),
    attention("return_lse of an array", put("return_lse", np.zeros(2)), "return_lse", "True or False; got"),
    attention("the type of an array for q", put("q", np.float32), "q", "must be.*got type"),
    attention(
        "the type of an array for q without out",
        lambda call: (call.pop("out"), call.update(q=np.float32)),
        "q",
        "must be an array; got type",
    ),
    attention(
        "q of a list beside out and return_lse",
        lambda call: call.update(q=[1.0], out=call["out"], return_lse=True, lse=None),
        "q",
        "got list",
    ),
    attention("alibi_slopes of float64", put("alibi_slopes", np.ones(4)), "alibi_slopes", "float32.*got float64"),
    attention(
        "too few alibi_slopes",
        put("alibi_slopes", np.ones(2, np.float32)),
        "alibi_slopes",
        r"\(num_q_heads,\) = \(4,\); got float32 \(2,\)",
    ),
    attention("sinks of q's 16-bit type", put("sinks", np.ones(4, np.float16)), "sinks", "float32.*got float16"),
    attention("sinks of two dimensions", put("sinks", np.ones((1, 4), np.float32)), "sinks", r"got float32 \(1, 4\)"),
    attention("a number for sinks", put("sinks", 1.0), "sinks", "float"),
    attention("k_scale for a float32 cache", put("k_scale", 0.5), "k_scale", "float8"),
    attention("v_scale array for a float32 cache", put("v_scale", np.ones(1, np.float32)), "v_scale", "float8"),
    attention(
        "k_scale of wrong length",
        put("k_scale", np.ones(3, np.float32)),
        "k_scale",
        r"\(num_kv_heads,\) = \(2,\).*got float32 \(3,\)",
        **FP8,
    ),
    attention("v_scale of two dimensions", put("v_scale", np.ones((1, 2), np.float32)), "v_scale", r"\(1, 2\)", **FP8),
    attention("k_scale of float64", put("k_scale", np.ones(2)), "k_scale", "float32.*got float64", **FP8),
    attention("k_scale of 0", put("k_scale", 0.0), "k_scale", "positive.*got 0", **FP8),
    attention("negative v_scale", put("v_scale", -1.0), "v_scale", "positive.*got -1", **FP8),
    attention("k_scale of NaN", put("k_scale", np.nan), "k_scale", "positive.*got -?nan", **FP8),
    attention("infinite k_scale", put("k_scale", np.inf), "k_scale", "finite.*got inf", **FP8),
    attention("k_scale beyond float64", put("k_scale", 10**400), "k_scale", "finite", **FP8),
    attention(
        "k_scale of zeros", put("k_scale", np.zeros(2, np.float32)), "k_scale`[0]", POSITIVE + "0", **FP8, **HOST
    ),
    attention(
        "k_scale of one NaN", put("k_scale", np.array([np.nan], np.float32)), "k_scale`[0]", POSITIVE, **FP8, **HOST
    ),
    attention(
        "v_scale with a negative number",
        put("v_scale", np.array([1, -1], np.float32)),
        "v_scale`[1]",
        POSITIVE + "-1",
        **FP8,
        **HOST,
    ),
    attention(
        "v_scale of infinity without dimensions",
        put("v_scale", np.array(np.inf, np.float32)),
        "v_scale`",
        POSITIVE + "inf",
        **FP8,
        **HOST,
    ),
    attention("complex v_scale", put("v_scale", 1j), "v_scale", "number.*got 1j", **FP8),
    attention("float8 cache with float32 q", cast("q", np.float32), "k_cache", "16-bit.*got float8_e4m3", **FP8),
    attention(
        "float16 cache with bfloat16 q",
        lambda call: call.update(
            {n: call[n].astype(np.float16) for n in ("k_cache", "v_cache")}
            | {n: call[n].astype(ml_dtypes.bfloat16) for n in ("q", "out")}
        ),
        "k_cache",
        "bfloat16.*got float16",
    ),
    attention("unknown kv_dtype", put("kv_dtype", "float9"), "kv_dtype", "got 'float9'"),
    attention("kv_dtype of integers", put("kv_dtype", np.int8), "kv_dtype", "int8"),
    attention("kv_dtype that contradicts the cache", put("kv_dtype", "float16"), "k_cache", "float16; got float32"),
    attention(
        "8-bit storage without kv_dtype",
        lambda call: call.update({n: call[n].view(np.uint8) for n in ("k_cache", "v_cache")}),
        "k_cache",
        "uint8.*`kv_dtype`",
        **FP8,
        **HOST,
    ),
    attention(
        "16-bit storage without kv_dtype",
        lambda call: call.update({n: call[n].astype(np.float16).view(np.uint16) for n in ("k_cache", "v_cache")}),
        "k_cache",
        "uint16.*`kv_dtype`",
    ),
    attention(
        "8-bit storage said to be 16-bit",
        lambda call: call.update({n: call[n].view(np.uint8) for n in ("k_cache", "v_cache")}, kv_dtype="float16"),
        "k_cache",
        "uint8",
        **FP8,
    ),
    attention(
        "float8_e4m3 with infinities",
        lambda call: call.update({n: call[n].view(ml_dtypes.float8_e4m3) for n in ("k_cache", "v_cache")}),
        "k_cache",
        "got float8_e4m3$",
        **FP8,
        **HOST,
    ),
    attention(
        "float8_e4m3fnuz",
        lambda call: call.update({n: call[n].view(ml_dtypes.float8_e4m3fnuz) for n in ("k_cache", "v_cache")}),
        "k_cache",
        "e4m3fnuz",
        **FP8,
        **HOST,
    ),
    attention(
        "kv_dtype of float8_e4m3 with infinities",
        lambda call: call.update(
            {n: call[n].view(np.uint8) for n in ("k_cache", "v_cache")}, kv_dtype=ml_dtypes.float8_e4m3
        ),
        "kv_dtype",
        "float8_e4m3",
        **FP8,
    ),
    attention(
        "float8 of two kinds",
        change("v_cache", lambda v: v.view(ml_dtypes.float8_e5m2)),
        "v_cache",
        "float8_e5m2",
        **FP8,
        **HOST,
    ),
    attention("a stream for host arrays", put("stream", 7), "stream", "host arrays; got 7", **HOST),
]

FLOAT8_QUERIES = [
    attention(
        "float8 q over a cache of its type's sibling",
        lambda call: call.update({n: call[n].view(ml_dtypes.float8_e5m2) for n in ("k_cache", "v_cache")}),
        "k_cache",
        "of the type of `q`, float8_e4m3; got float8_e5m2",
        **FP8_Q,
        **HOST,
    ),
    attention(
        "float8 q over a 16-bit cache",
        lambda call: call.update({n: call[n].astype(np.float16) for n in ("k_cache", "v_cache")}),
        "k_cache",
        "of the type of `q`, float8_e4m3; got float16",
        **FP8_Q,
        **HOST,
    ),
    attention(
        "float8 q with another kv_dtype",
        put("kv_dtype", "float8_e5m2"),
        "q",
        "`kv_dtype` float8_e5m2; got float8_e4m3",
        **FP8_Q,
        **HOST,
    ),
    attention(
        "8-bit q without kv_dtype", change("q", lambda q: q.view(np.uint8)), "q", "uint8.*`kv_dtype`", **FP8_Q, **HOST
    ),
    attention(
        "8-bit q over a 16-bit cache",
        lambda call: call.update(
            {n: call[n].astype(np.float16) for n in ("k_cache", "v_cache")},
            q=call["q"].view(np.uint8),
            kv_dtype="float16",
        ),
        "q",
        "`kv_dtype` float16; got uint8",
        **FP8_Q,
    ),
    attention("float32 out of float8 q", cast("out", np.float32), "out", "float16 or bfloat16.*got float32", **FP8_Q),
    attention("float8 out", lambda call: call.update(out=call["q"].copy()), "out", "float16", **FP8_Q),
    attention("q_scale of a float32 q", put("q_scale", 0.5), "q_scale", "float8 queries.*float32"),
    attention("q_scale of a 16-bit q", put("q_scale", np.ones(2, np.float32)), "q_scale", "got .*float16", **FP8),
    attention(
        "q_scale of wrong length",
        put("q_scale", np.ones(4, np.float32)),
        "q_scale",
        r"\(num_kv_heads,\) = \(2,\).*got float32 \(4,\)",
        **FP8_Q,
    ),
    attention("q_scale of float64", put("q_scale", np.ones(2)), "q_scale", "float32.*got float64", **FP8_Q),
    attention("q_scale of 0", put("q_scale", 0.0), "q_scale", "positive.*got 0", **FP8_Q),
    attention(
        "q_scale with NaN",
        put("q_scale", np.array([1, np.nan], np.float32)),
        "q_scale`[1]",
        POSITIVE,
        **FP8_Q,
        **HOST,
    ),
    attention(
        "lse inside q_scale",
        lambda call: (
            call.update(both=np.ones(18, np.float32)),
            call.update(q_scale=call["both"][:2], lse=call.pop("both")[1:17].reshape(4, 4)),
        ),
        "lse",
        "`q_scale`.*overlap",
        **FP8_Q,
    ),
]

ATTENTION_OUTPUTS = [
    attention("out of another shape", change("out", lambda out: out[:3]), "out", r"got float32 \(3, 4, 8\)"),
    attention("out of another type", cast("out", np.float16), "out", "float16"),
    attention("read-only out", change("out", read_only), "out", "writable; got a read-only array", **HOST),
    attention("out with a last stride of 2", change("out", no_unit_stride), "out", "last stride of 2"),
    attention("out with a stride of 0", change("out", one_row_for_all), "out", "share memory"),
    attention("out with rows that overlap", change("out", sliding), "out", "share memory"),
    attention("out with a negative stride", change("out", lambda out: out[::-1]), "out", "negative strides"),
    attention("out that is q", lambda call: call.update(out=call["q"]), "out", "`q`.*overlap"),
    attention(
        "out that is half q",
        lambda call: (
            call.update(both=np.zeros((6, 4, 8), np.float32)),
            call.update(q=call["both"][:4], out=call.pop("both")[2:]),
        ),
        "out",
        "`q`.*overlap",
    ),
    attention(
        "out that shares one element a row with q",
        lambda call: (
            call.update(both=np.zeros((4, 4, 15), np.float32)),
            call.update(q=call["both"][..., :8], out=call.pop("both")[..., 7:]),
        ),
        "out",
        "`q`.*overlap",
    ),
    attention(
        "out inside k_cache",
        lambda call: call.update(out=call["k_cache"].reshape(-1)[64 : 64 + 128].reshape(4, 4, 8)),
        "out",
        "`k_cache`.*overlap",
    ),
    attention(
        "out inside v_cache",
        lambda call: call.update(out=call["v_cache"].reshape(-1)[64 : 64 + 128].reshape(4, 4, 8)),
        "out",
        "`v_cache`.*overlap",
    ),
    attention("lse of float64", cast("lse", np.float64), "lse", "float32.*got float64"),
    attention("lse of another shape", change("lse", lambda lse: lse.T[:2]), "lse", r"got float32 \(2, 4\)"),
    attention("read-only lse", change("lse", read_only), "lse", "writable; got a read-only array", **HOST),
    attention("lse with a stride of 0", change("lse", one_row_for_all), "lse", "share memory"),
    attention(
        "lse inside out",
        lambda call: call.update(lse=call["out"].reshape(-1)[:16].reshape(4, 4)),
        "lse",
        "`out`.*overlap",
    ),
    attention(
        "lse over seq_lens",
        lambda call: (
            call.update(both=np.array([8, 5, 3] + 16 * [0], np.int32)),
            call.update(seq_lens=call["both"][:3], lse=call.pop("both")[2:18].view(np.float32).reshape(4, 4)),
        ),
        "lse",
        "`seq_lens`.*overlap",
    ),
    attention("workspace of floats", put("workspace", np.zeros(64, np.float32)), "workspace", "uint8.*got float32"),
]

ATTENTION_INDICES = [
    attention("negative length", entry("seq_lens", 1, -1), r"seq_lens`[1", "got -1"),
    attention("length beyond the table", entry("seq_lens", 0, 13), r"seq_lens`[0", "12; got 13"),
    attention("length beyond any table", entry("seq_lens", 2, 2**31 - 1), r"seq_lens`[2", "got 2147483647"),
    attention("negative table entry", entry("block_tables", (0, 1), -1), r"block_tables`[0, 1]", "got -1"),
    attention("table entry beyond the cache", entry("block_tables", (1, 1), 6), r"block_tables`[1, 1]", "5; got 6"),
    attention("table entry far beyond", entry("block_tables", (1, 0), 2**31 - 1), r"block_tables`[1, 0]", "2147483647"),
    attention("too small a max_query_len", put("max_query_len", 2), r"query_start_loc`[1", "max_query_len` = 2; got 3"),
    attention("query_start_loc that starts at 1", entry("query_start_loc", 0, 1), "query_start_loc", "got 1"),
    attention("query_start_loc that falls", entry("query_start_loc", 1, 5), "query_start_loc", "got 4"),
    attention("negative query_start_loc", entry("query_start_loc", 1, -1), "query_start_loc", "got -1"),
    attention("query_start_loc that ends before T", entry("query_start_loc", 3, 3), "query_start_loc", "got 3"),
    attention("query_start_loc that ends past T", entry("query_start_loc", 3, 9), "query_start_loc", "T = 4; got 9"),
    attention("more query tokens than tokens", entry("seq_lens", 0, 2), "seq_lens`[0", "3 query tokens; got 2"),
]


@pytest.mark.parametrize("bad", [*ATTENTION_ARRAYS, *ATTENTION_OPTIONS, *FLOAT8_QUERIES, *ATTENTION_OUTPUTS], ids=str)
def test_a_wrong_argument_is_refused_by_name_and_nothing_is_written(backend: NumpyBackend, bad: Bad) -> None:
    check_bad(backend, bad)


@pytest.mark.parametrize("bad", ATTENTION_INDICES, ids=str)
def test_a_wrong_index_value_is_refused_by_name_and_nothing_is_written(backend: NumpyBackend, bad: Bad) -> None:
    check_bad(backend, bad, **({"check": True} if backend.is_cuda else {}))


@pytest.mark.parametrize("start", [attention_call, float8_attention_call, float8_queries_call])
@pytest.mark.parametrize("check", [None, True, False])
def test_the_unspoilt_call_passes(backend: NumpyBackend, start: Callable[[], Arguments], check: bool | None) -> None:
    call = on(backend, start())
    pagedattn.paged_attention(**call, check=check)
    assert np.isfinite(backend.host(call["out"]).astype(np.float32)).all()
    assert np.isfinite(backend.host(call["lse"])).all()


def test_a_scale_of_0_or_below_is_as_good_as_any(backend: NumpyBackend) -> None:
    call = on(backend, attention_call())
    for scale in (0.0, -0.5, np.finfo(np.float32).tiny):
        pagedattn.paged_attention(**call, scale=scale)


@pytest.mark.parametrize("wanted", [True, np.True_])
def test_a_flag_may_be_numpys(backend: NumpyBackend, wanted: Any) -> None:
    assert len(pagedattn.paged_attention(**on(backend, attention_call()), return_lse=wanted)) == 2


@pytest.mark.parametrize(
    ("number", "got"), [(0, "0"), (-3, "-3"), ("two", "'two'"), (1.5, "1.5"), (4097, "4097"), (2**70, str(2**70))]
)
def test_the_number_of_threads_must_be_from_1_to_4096(number: Any, got: str) -> None:
    before = pagedattn.get_num_threads()
    with pytest.raises(pagedattn.InvalidArgumentError, match=rf"set_num_threads: `num_threads` must be .*got {got}"):
        pagedattn.set_num_threads(number)
    assert pagedattn.get_num_threads() == before
