"""Every wrong argument of the operations on caches and of merge_states: its own clear error, and nothing written.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pagedattn
import pytest
from backends import FLOAT8_E4M3, NumpyBackend
from failing_calls import (
    Arguments,
    Bad,
    check_bad,
    copy_call,
    float8_reshape_call,
    gather_call,
    layers_call,
    merge_call,
    on,
    refuse,
    reshape_call,
    rope_call,
    swap_call,
)
from spoiling import HOST, cast, change, entry, every_other, item, no_unit_stride, one_row_for_all, put, read_only


def reshape(name: str, spoil: Any, argument: str, says: str, **more: Any) -> Bad:
    return Bad(name, spoil, argument, says, more.pop("start", reshape_call), "reshape_and_cache", **more)


RESHAPE = [
    reshape("key of two dimensions", change("key", lambda k: k[:, 0]), "key", r"got float32 \(5, 8\)"),
    reshape("key of float64", cast("key", np.float64), "key", "float64"),
    reshape("key with a last stride of 2", change("key", no_unit_stride), "key", "last stride of 2"),
    reshape("value of fewer tokens", change("value", lambda v: v[:4]), "value", r"got float32 \(4, 2, 8\)"),
    reshape("value of another type", cast("value", np.float16), "value", "float16"),
    reshape("value with a last stride of 2", change("value", no_unit_stride), "value", "last stride of 2"),
    reshape("k_cache of other heads", change("k_cache", lambda k: k[:, :, :1]), "k_cache", r"\(6, 4, 1, 8\)"),
    reshape("v_cache of other slots", change("v_cache", lambda v: v[:, :3]), "v_cache", r"\(6, 3, 2, 8\)"),
    reshape(
        "caches of another float type",
        lambda call: call.update({n: call[n].astype(np.float16) for n in ("k_cache", "v_cache")}),
        "k_cache",
        "float32.*got float16",
    ),
    reshape("read-only k_cache", change("k_cache", read_only), "k_cache", "writable", **HOST),
    reshape("read-only v_cache", change("v_cache", read_only), "v_cache", "writable", **HOST),
    reshape("k_cache with a stride of 0", change("k_cache", one_row_for_all), "k_cache", "share memory"),
    reshape(
        "v_cache that is k_cache", lambda call: call.update(v_cache=call["k_cache"]), "v_cache", "`k_cache`.*overlap"
    ),
    reshape(
        "key inside k_cache",
        lambda call: call.update(key=call["k_cache"].reshape(-1)[:80].reshape(5, 2, 8)),
        "k_cache",
        "`key`.*overlap",
    ),
    reshape(
        "value inside v_cache",
        lambda call: call.update(value=call["v_cache"].reshape(-1)[:80].reshape(5, 2, 8)),
        "v_cache",
        "`value`.*overlap",
    ),
    reshape("slot_mapping of int32", cast("slot_mapping", np.int32), "slot_mapping", "int64.*got int32"),
    reshape("slot_mapping of two dimensions", change("slot_mapping", lambda s: s[None]), "slot_mapping", r"\(1, 5\)"),
    reshape("slot_mapping with gaps", change("slot_mapping", every_other), "slot_mapping", "contiguous.*stride of 2"),
    reshape(
        "more slots than tokens", change("slot_mapping", lambda s: np.append(s, -1)), "slot_mapping", "got 6 slots"
    ),
    reshape("k_scale for a float32 cache", put("k_scale", 2.0), "k_scale", "float8"),
    reshape(
        "v_scale of wrong length",
        put("v_scale", np.ones(3, np.float32)),
        "v_scale",
        r"\(3,\)",
        start=float8_reshape_call,
    ),
    reshape("v_scale of 0", put("v_scale", 0.0), "v_scale", "positive.*got 0", start=float8_reshape_call),
    reshape(
        "k_scale of zeros",
        put("k_scale", np.zeros(2, np.float32)),
        "k_scale`[0]",
        "must be a positive finite number; got 0",
        start=float8_reshape_call,
        **HOST,
    ),
    reshape(
        "v_scale of zeros for one layer of one",
        put("v_scale", np.array([[1, 0]], np.float32)),
        "v_scale`[0, 1]",
        "must be a positive finite number; got 0",
        start=float8_reshape_call,
        **HOST,
    ),
    reshape("unknown kv_dtype", put("kv_dtype", "int8"), "kv_dtype", "got 'int8'"),
    reshape(
        "kv_dtype that contradicts the cache", put("kv_dtype", "float8_e5m2"), "k_cache", "float8_e5m2; got float32"
    ),
    reshape("None for slot_mapping", put("slot_mapping", None), "slot_mapping", "None|required"),
]
RESHAPE_INDICES = [
    reshape("slot beyond the cache", entry("slot_mapping", 2, 24), "slot_mapping`[2]", "24; got 24"),
    reshape("slot far beyond", entry("slot_mapping", 4, 2**62), "slot_mapping`[4]", f"got {2**62}"),
    reshape("one slot twice", entry("slot_mapping", 4, 3), "slot_mapping`[4]", r"slot 3.*`slot_mapping`\[0\]"),
]


def layers(name: str, spoil: Any, argument: str, says: str, **more: Any) -> Bad:
    return Bad(name, spoil, argument, says, layers_call, "reshape_and_cache", **more)


def float8_layers(call: Arguments) -> None:
    call.update({name: [cache.astype(FLOAT8_E4M3) for cache in call[name]] for name in ("k_cache", "v_cache")})


LAYERS = [
    layers("no layers", lambda call: call.update({name: [] for name in call}), "key", "at least one"),
    layers("fewer values than keys", change("value", lambda v: v[:2]), "value", "as many layers as `key`, 3; got 2"),
    layers("fewer k_caches than keys", change("k_cache", lambda k: k[0]), "k_cache", "3; got 1"),
    layers("fewer v_caches than keys", change("v_cache", lambda v: v[1:]), "v_cache", "3; got 2"),
    layers("a key of another shape", item("key", 1, lambda k: k[:4]), "key[1]", r"`key\[0\]`.*got float32 \(4, 2, 8\)"),
    layers("a value of other strides", item("value", 2, lambda v: v.copy(order="F")), "value[2]", "strides"),
    layers("a cache of another type", item("k_cache", 2, lambda k: k.astype(np.float16)), "k_cache[2]", "float16"),
    layers(
        "v_scale of zero in the last layer",
        lambda call: (
            float8_layers(call),
            call.update(v_scale=np.array([[1, 2], [3, 4], [5, 0]], np.float32)),
        ),
        "v_scale`[2, 1]",
        "must be a positive finite number; got 0",
        **HOST,
    ),
    layers(
        "k_scale of NaN, one a layer",
        lambda call: (float8_layers(call), call.update(k_scale=np.array([[1], [np.nan], [1]], np.float32))),
        "k_scale`[1, 0]",
        "must be a positive finite number; got -?nan",
        **HOST,
    ),
    layers("a read-only cache", item("v_cache", 1, read_only), "v_cache[1]", "writable", **HOST),
    layers("None among the keys", item("key", 1, lambda _: None), "key[1]", "None"),
    layers(
        "layers that share a cache",
        change("k_cache", lambda k: [k[0], k[1], k[0]]),
        "k_cache[2]",
        r"`k_cache\[0\]`.*overlap",
    ),
    layers(
        "a v_cache that is another layer's k_cache",
        lambda call: item("v_cache", 0, lambda _: call["k_cache"][2])(call),
        "v_cache[0]",
        r"`k_cache\[2\]`.*overlap",
    ),
    layers(
        "a key inside another layer's cache",
        lambda call: item("key", 2, lambda _: call["v_cache"][0].reshape(-1)[:80].reshape(5, 2, 8))(call),
        "v_cache[0]",
        r"`key\[2\]`.*overlap",
    ),
    layers(
        "scales of too few layers",
        lambda call: (
            call.update({n: [c.astype(FLOAT8_E4M3) for c in call[n]] for n in ("k_cache", "v_cache")}),
            call.update(k_scale=np.ones((2, 1), np.float32), kv_dtype="float8_e4m3"),
        ),
        "k_scale",
        r"num_layers.*\(2, 1\)",
    ),
]


def rope(name: str, spoil: Any, argument: str, says: str, **more: Any) -> Bad:
    return Bad(name, spoil, argument, says, rope_call, "rope_and_cache", **more)


ROPE = [
    rope("key of two dimensions", change("key", lambda k: k[:, 0]), "key", r"got float32 \(5, 8\)"),
    rope("value of another type", cast("value", np.float16), "value", "float16"),
    rope("k_cache of other heads", change("k_cache", lambda k: k[:, :, :1]), "k_cache", r"\(6, 4, 1, 8\)"),
    rope(
        "an odd head_dim",
        lambda call: call.update({n: call[n][..., :7].copy() for n in ("key", "value", "k_cache", "v_cache")}),
        "key",
        "even head_dim",
    ),
    rope("positions of float32", cast("positions", np.float32), "positions", "int32.*got float32"),
    rope("too few positions", change("positions", lambda p: p[:4]), "positions", r"\(5,\); got int64 \(4,\)"),
    rope("positions with gaps", change("positions", every_other), "positions", "contiguous.*stride of 2"),
    rope("None for positions", put("positions", None), "positions", "None|required"),
    rope("cos_sin of one dimension", change("cos_sin", np.ravel), "cos_sin", r"got float32 \(60,\)"),
    rope("cos_sin of an odd width", change("cos_sin", lambda c: c[:, :5]), "cos_sin", r"even.*\(10, 5\)"),
    rope(
        "cos_sin wider than a head", change("cos_sin", lambda c: np.tile(c, 2)), "cos_sin", r"head_dim = 8.*\(10, 12\)"
    ),
    rope("cos_sin without a column", change("cos_sin", lambda c: c[:, :0]), "cos_sin", r"2 \.\.\. head_dim"),
    rope("cos_sin of int32", cast("cos_sin", np.int32), "cos_sin", "float32.*got int32"),
    rope("query of another type", cast("query", np.float16), "query", "float16"),
    rope("query of other tokens", change("query", lambda q: q[:4]), "query", r"\(4, 4, 8\)"),
    rope("query_out of other heads", change("query_out", lambda q: q[:, :2]), "query_out", r"\(5, 2, 8\)"),
    rope("query_out without a query", put("query", None), "query_out", "absent"),
    rope("read-only query_out", change("query_out", read_only), "query_out", "writable", **HOST),
    rope(
        "query_out a token behind the query",
        lambda call: (
            call.update(query_out=np.zeros((6, 4, 8), np.float32))
            or call.update(query=call["query_out"][:5], query_out=call["query_out"][1:])
        ),
        "query_out",
        "`query`.*overlap",
    ),
    rope(
        "query_out that is the key",
        lambda call: call.update(query=call["key"], query_out=call["key"]),
        "query_out",
        "`key`",
    ),
    rope("v_cache that is k_cache", lambda call: call.update(v_cache=call["k_cache"]), "v_cache", "`k_cache`.*overlap"),
    rope("k_scale for a float32 cache", put("k_scale", 2.0), "k_scale", "float8"),
    rope("interleaved as a number", put("interleaved", 1), "interleaved", "True or False; got 1"),
]
ROPE_INDICES = [
    rope("slot beyond the cache", entry("slot_mapping", 2, 24), "slot_mapping`[2]", "24; got 24"),
    rope("one slot twice", entry("slot_mapping", 4, 3), "slot_mapping`[4]", r"slot 3.*`slot_mapping`\[0\]"),
    rope("negative position", entry("positions", 3, -1), "positions`[3]", "got -1"),
    rope("position beyond the table", entry("positions", 0, 10), "positions`[0]", "9; got 10"),
    rope("position of padding beyond the table", entry("positions", 1, 2**40), "positions`[1]", f"9; got {2**40}"),
]


def copy(name: str, spoil: Any, argument: str, says: str, **more: Any) -> Bad:
    return Bad(name, spoil, argument, says, copy_call, "copy_blocks", **more)


COPY = [
    copy("no caches", put("caches", []), "caches", "at least one"),
    copy("a cache of another shape", item("caches", 1, lambda c: c[:5]), "caches[1]", r"\(5, 4, 2, 8\)"),
    copy("a cache of another type", item("caches", 2, lambda c: c.astype(np.float16)), "caches[2]", "float16"),
    copy("a cache of other strides", item("caches", 1, lambda c: c.copy(order="F")), "caches[1]", "strides"),
    copy("a read-only cache", item("caches", 1, read_only), "caches[1]", "writable", **HOST),
    copy(
        "a cache with a stride of 0", change("caches", lambda c: [one_row_for_all(c[0])]), "caches[0]", "share memory"
    ),
    copy(
        "neighbouring caches that overlap",
        change("caches", lambda c: [c[0], c[0]]),
        "caches[1]",
        "`caches.0.`.*overlap",
    ),
    copy(
        "distant caches that overlap",
        change("caches", lambda c: [c[0], c[1], c[0]]),
        "caches[2]",
        "`caches.0.`.*overlap",
    ),
    copy("None among the caches", item("caches", 1, lambda _: None), "caches[1]", "None"),
    copy("no array for the mapping", put("block_mapping", [[0, 3]]), "block_mapping", "list"),
    copy("block_mapping of int32", cast("block_mapping", np.int32), "block_mapping", "int64.*got int32"),
    copy("block_mapping of triples", put("block_mapping", np.zeros((2, 3), np.int64)), "block_mapping", r"\(2, 3\)"),
    copy("flat block_mapping", change("block_mapping", np.ravel), "block_mapping", r"got int64 \(6,\)"),
    copy("block_mapping by columns", change("block_mapping", np.asfortranarray), "block_mapping", "stride"),
]
COPY_INDICES = [
    copy("negative source", entry("block_mapping", (1, 0), -1), "block_mapping`[1]", "source block -1.*6"),
    copy("source beyond the cache", entry("block_mapping", (1, 0), 6), "block_mapping`[1]", "source block 6.*6"),
    copy("negative destination", entry("block_mapping", (2, 1), -1), "block_mapping`[2]", "destination block -1.*6"),
    copy(
        "destination beyond the cache", entry("block_mapping", (0, 1), 2**40), "block_mapping`[0]", "1099511627776.*6"
    ),
    copy(
        "one destination twice",
        entry("block_mapping", (2, 1), 3),
        "block_mapping`[2]",
        r"block 3.*`block_mapping`\[0\]",
    ),
    copy(
        "a destination that is a source",
        entry("block_mapping", (0, 1), 1),
        "block_mapping`[0]",
        r"block 1.*`block_mapping`\[1\]",
    ),
    copy("a block onto itself", entry("block_mapping", (0, 1), 0), "block_mapping`[0]", "block 0"),
]


def swap(name: str, spoil: Any, argument: str, says: str, **more: Any) -> Bad:
    return Bad(name, spoil, argument, says, swap_call, "swap_blocks", **more)


SWAP = [
    swap("no caches", lambda call: call.update(src=[], dst=[]), "src", "at least one"),
    swap("fewer destinations than sources", change("dst", lambda d: d[:1]), "dst", "got 1"),
    swap("blocks of another shape", change("dst", lambda d: [c[:, :3] for c in d]), "dst[0]", r"\(4, 3, 2, 8\)"),
    swap("blocks of another type", change("dst", lambda d: [c.astype(np.float16) for c in d]), "dst[0]", "float16"),
    swap("one source of another type", item("src", 1, lambda c: c.astype(np.float16)), "src[1]", "float16"),
    swap("a read-only destination", item("dst", 1, read_only), "dst[1]", "writable", **HOST),
    swap(
        "a destination with a stride of 0",
        lambda call: call.update(src=call["src"][:1], dst=[one_row_for_all(call["dst"][0])]),
        "dst[0]",
        "share memory",
    ),
    swap(
        "a destination inside its source",
        lambda call: call.update(dst=[c[2:] for c in call["src"]]),
        "dst[",
        "`src.[01].`.*overlap",
    ),
    swap(
        "a destination inside another source",
        lambda call: call.update(dst=call["src"][::-1]),
        "dst[",
        "`src.[01].`.*overlap",
    ),
    swap("destinations that overlap", change("dst", lambda d: [d[0], d[0]]), "dst[1]", "`dst.0.`.*overlap"),
    swap(
        "a torch event that has never been recorded",
        put("event", SimpleNamespace(cuda_event=0)),
        "event",
        "from its first `record",
    ),
    swap("an event for host arrays", put("event", 3), "event", "host arrays", **HOST),
    swap("block_mapping of int32", cast("block_mapping", np.int32), "block_mapping", "int64.*got int32"),
    swap("block_mapping of triples", put("block_mapping", np.zeros((2, 3), np.int64)), "block_mapping", r"\(2, 3\)"),
    swap("negative source", entry("block_mapping", (1, 0), -1), "block_mapping`[1]", "source block -1.*6"),
    swap("source beyond the cache", entry("block_mapping", (1, 0), 6), "block_mapping`[1]", "source block 6.*6"),
    swap("negative destination", entry("block_mapping", (1, 1), -9), "block_mapping`[1]", "destination block -9.*4"),
    swap(
        "destination beyond the cache", entry("block_mapping", (0, 1), 4), "block_mapping`[0]", "destination block 4.*4"
    ),
    swap(
        "one destination twice",
        entry("block_mapping", (2, 1), 3),
        "block_mapping`[2]",
        r"block 3.*`block_mapping`\[0\]",
    ),
]


def gather(name: str, spoil: Any, argument: str, says: str, **more: Any) -> Bad:
    return Bad(name, spoil, argument, says, gather_call, "gather_kv", **more)


def float8_caches(call: Arguments) -> None:
    call.update({name: call[name].astype(FLOAT8_E4M3) for name in ("k_cache", "v_cache")})


GATHER = [
    gather("k_cache of three dimensions", change("k_cache", lambda k: k[0]), "k_cache", r"\(4, 2, 8\)"),
    gather("v_cache of another shape", change("v_cache", lambda v: v[:5]), "v_cache", r"\(5, 4, 2, 8\)"),
    gather("block_tables of int64", cast("block_tables", np.int64), "block_tables", "int32.*got int64"),
    gather("too few block_tables", change("block_tables", lambda t: t[:2]), "block_tables", r"\(2, 3\)"),
    gather("seq_lens of int64", cast("seq_lens", np.int64), "seq_lens", "int32.*got int64"),
    gather("seq_starts of int64", put("seq_starts", np.zeros(3, np.int64)), "seq_starts", "int32.*got int64"),
    gather("too few seq_starts", put("seq_starts", np.zeros(2, np.int32)), "seq_starts", r"\(3,\); got int32 \(2,\)"),
    gather("out_start_loc of int64", put("out_start_loc", np.zeros(4, np.int64)), "out_start_loc", "int32.*got int64"),
    gather(
        "out_start_loc without its end",
        put("out_start_loc", np.array([0, 8, 13], np.int32)),
        "out_start_loc",
        r"\(4,\); got int32 \(3,\)",
    ),
    gather("out of one array", change("out", lambda out: out[0]), "out", "pair"),
    gather("out of other heads", item("out", 0, lambda k: k[:, :1]), "out[0]", r"\(16, 1, 8\)"),
    gather("out of unequal rows", item("out", 1, lambda v: v[:15]), "out[1]", r"\(15, 2, 8\)"),
    gather(
        "out of a type that is not the cache's",
        change("out", lambda out: tuple(o.astype(np.float16) for o in out)),
        "out[0]",
        "float32.*got float16",
    ),
    gather(
        "out of unequal types",
        lambda call: (float8_caches(call), item("out", 1, lambda v: v.astype(np.float16))(call)),
        "out[1]",
        r"`out\[0\]`.*float32.*got float16",
    ),
    gather("read-only out", item("out", 1, read_only), "out[1]", "writable", **HOST),
    gather("out with a stride of 0", item("out", 0, one_row_for_all), "out[0]", "share memory"),
    gather("out with a last stride of 2", item("out", 0, no_unit_stride), "out[0]", "last stride of 2"),
    gather("one array for both outputs", change("out", lambda out: (out[0], out[0])), "out[1]", r"`out\[0\]`.*overlap"),
    gather(
        "out inside k_cache",
        lambda call: item("out", 0, lambda _: call["k_cache"].reshape(-1)[:256].reshape(16, 2, 8))(call),
        "out[0]",
        "`k_cache`.*overlap",
    ),
    gather("total_tokens beside out", put("total_tokens", 16), "total_tokens", "absent"),
    gather("negative total_tokens", lambda call: (call.pop("out"), call.update(total_tokens=-1)), "total_tokens", "-1"),
    gather(
        "unknown dtype",
        lambda call: (call.pop("out"), call.update(total_tokens=16, dtype="float9")),
        "dtype",
        "got 'float9'",
    ),
    gather(
        "dtype that is not the cache's",
        lambda call: (call.pop("out"), call.update(total_tokens=16, dtype="float16")),
        "dtype",
        "float32.*got float16",
    ),
    gather(
        "dtype of another float8",
        lambda call: (float8_caches(call), call.pop("out"), call.update(total_tokens=16, dtype="float8_e5m2")),
        "dtype",
        "float8_e4m3fn, or a wider one; got float8_e5m2",
        **HOST,
    ),
    gather(
        "float8 dtype of storage that nobody named",
        lambda call: (
            float8_caches(call),
            call.update({name: call[name].view(np.uint8) for name in ("k_cache", "v_cache")}),
            call.pop("out"),
            call.update(total_tokens=16, dtype="float8_e4m3"),
        ),
        "k_cache",
        "uint8 storage; name what it holds with `kv_dtype`",
        **HOST,
    ),
    gather(
        "k_scale with infinity",
        lambda call: (float8_caches(call), call.update(k_scale=np.array([1, np.inf], np.float32))),
        "k_scale`[1]",
        "must be a positive finite number; got inf",
        **HOST,
    ),
    gather("a list in out", item("out", 0, lambda k: k.tolist()), "out[0]", "got list"),
    gather("the type of an array for k_cache", put("k_cache", np.float32), "k_cache", "got type"),
    gather("scales for a plain copy", put("k_scale", 0.5), "k_scale", "float8"),
    gather(
        "k_scale of wrong length",
        lambda call: (float8_caches(call), call.update(k_scale=np.ones(3, np.float32))),
        "k_scale",
        r"\(3,\)",
    ),
]
GATHER_INDICES = [
    gather("negative length", entry("seq_lens", 1, -1), "seq_lens`[1", "got -1"),
    gather("length beyond the table", entry("seq_lens", 1, 13), "seq_lens`[1", "12; got 13"),
    gather("negative table entry", entry("block_tables", (0, 1), -1), "block_tables`[0, 1]", "got -1"),
    gather("table entry beyond the cache", entry("block_tables", (2, 0), 6), "block_tables`[2, 0]", "5; got 6"),
    gather("negative start", put("seq_starts", np.array([0, -1, 0], np.int32)), "seq_starts`[1", "got -1"),
    gather("start behind the end", put("seq_starts", np.array([0, 6, 0], np.int32)), "seq_starts`[1", "5; got 6"),
    gather(
        "negative output row", put("out_start_loc", np.array([-1, 8, 13, 16], np.int32)), "out_start_loc`[0", "got -1"
    ),
    gather(
        "output rows too close",
        put("out_start_loc", np.array([0, 7, 13, 16], np.int32)),
        "out_start_loc`[1",
        "8 tokens.*got 7",
    ),
    gather(
        "output rows past the end",
        put("out_start_loc", np.array([0, 8, 14, 17], np.int32)),
        "out_start_loc`[3",
        "16 rows.*got 17",
    ),
    gather("too few output rows", change("out", lambda out: tuple(o[:15] for o in out)), "out[0]", "16 rows; got 15"),
    gather(
        "too small a total_tokens",
        lambda call: (call.pop("out"), call.update(total_tokens=15)),
        "total_tokens",
        "16 rows; got 15",
    ),
]


def merge(name: str, spoil: Any, argument: str, says: str, **more: Any) -> Bad:
    return Bad(name, spoil, argument, says, merge_call, "merge_states", **more)


MERGE = [
    merge("no parts", lambda call: call.update(outs=[], lses=[]), "outs", "at least one"),
    merge("fewer lses than outs", change("lses", lambda lses: lses[:2]), "lses", "3; got 2"),
    merge("one array of too few dimensions", change("outs", lambda outs: outs[0]), "outs", r"\(4, 2, 8\)"),
    merge("the type of an array for outs", put("outs", np.float32), "outs", "got type"),
    merge("the type of an array for lses", put("lses", np.float32), "lses", "got type"),
    merge("the type of an array for a part", item("outs", 0, lambda _: np.float32), "outs[0]", "got type"),
    merge("a number for outs", put("outs", 3), "outs", "int"),
    merge("a part of another shape", item("outs", 1, lambda o: o[:3]), "outs[1]", r"\(3, 2, 8\)"),
    merge("a part of another type", item("outs", 2, lambda o: o.astype(np.float16)), "outs[2]", "float16"),
    merge("a part with a last stride of 2", item("outs", 0, no_unit_stride), "outs[0]", "last stride of 2"),
    merge("parts of float64", change("outs", lambda outs: [o.astype(np.float64) for o in outs]), "outs[0]", "float64"),
    merge("an lse of another shape", item("lses", 1, lambda lse: lse[:, :1]), "lses[1]", r"\(4, 1\)"),
    merge("an lse of float64", item("lses", 2, lambda lse: lse.astype(np.float64)), "lses[2]", "float32.*got float64"),
    merge("out of another shape", change("out", lambda o: o[:3]), "out", r"\(3, 2, 8\)"),
    merge("out that is a part", lambda call: call.update(out=call["outs"][1]), "out", "`outs.1.`.*overlap"),
    merge("lse that is a part's", lambda call: call.update(lse=call["lses"][2]), "lse", "`lses.2.`.*overlap"),
    merge(
        "lse inside out",
        lambda call: call.update(lse=call["out"].reshape(-1)[:8].reshape(4, 2)),
        "lse",
        "`out`.*overlap",
    ),
    merge("read-only out", change("out", read_only), "out", "writable", **HOST),
    merge("out with a stride of 0", change("out", one_row_for_all), "out", "share memory"),
    merge("a stream for host arrays", put("stream", 3), "stream", "host arrays; got 3", **HOST),
]


@pytest.mark.parametrize("bad", [*RESHAPE, *LAYERS, *ROPE, *COPY, *SWAP, *GATHER, *MERGE], ids=str)
def test_a_wrong_argument_is_refused_by_name_and_nothing_is_written(backend: NumpyBackend, bad: Bad) -> None:
    check_bad(backend, bad)


@pytest.mark.parametrize("bad", [*RESHAPE_INDICES, *ROPE_INDICES, *COPY_INDICES, *GATHER_INDICES], ids=str)
def test_a_wrong_index_value_is_refused_by_name_and_nothing_is_written(backend: NumpyBackend, bad: Bad) -> None:
    check_bad(backend, bad, **({"check": True} if backend.is_cuda else {}))


@pytest.mark.parametrize("check", [None, True, False])
def test_the_unspoilt_calls_pass(backend: NumpyBackend, check: bool | None) -> None:
    pagedattn.reshape_and_cache(**on(backend, reshape_call()), check=check)
    pagedattn.reshape_and_cache(**on(backend, float8_reshape_call()), check=check)
    pagedattn.reshape_and_cache(**on(backend, layers_call()), check=check)
    pagedattn.rope_and_cache(**on(backend, rope_call()), check=check)
    pagedattn.copy_blocks(**on(backend, copy_call()), check=check)
    pagedattn.swap_blocks(**on(backend, swap_call()))
    pagedattn.gather_kv(**on(backend, gather_call()), check=check)
    pagedattn.merge_states(**on(backend, merge_call()))


def test_lengths_whose_rows_exceed_all_memory_are_refused_before_anything_is_allocated() -> None:
    call = gather_call()
    del call["out"]
    call["seq_lens"][:] = 2**31 - 1
    refuse(NumpyBackend(), "gather_kv", call, "seq_lens`[0", "12; got 2147483647")


@pytest.mark.parametrize(
    ("changes", "argument", "error"),
    [
        ({"seq_lens": np.array([[20]], np.int32)}, "seq_lens", pagedattn.InvalidArgumentError),
        ({"seq_lens": np.array(20, np.int32)}, "seq_lens", pagedattn.InvalidArgumentError),
        ({"seq_lens": np.array(["a"])}, "seq_lens", pagedattn.InvalidArgumentError),
        ({"block_tables": np.array(3, np.int32)}, "block_tables", pagedattn.InvalidArgumentError),
        ({"seq_starts": np.array([-(2**31)], np.int32)}, "seq_starts", pagedattn.InvalidArgumentError),
        ({"seq_lens": [20]}, "`seq_lens` must be an int32 array on the host; got list", pagedattn.InvalidArgumentError),
        (
            {"dtype": "float16"},
            "`dtype` must be that of a cache of float32",
            pagedattn.InvalidArgumentError,
        ),
        ({"dtype": np.float64}, "`dtype` must be one of", pagedattn.InvalidArgumentError),
        ({"v_scale": 2.0}, "`v_scale` must be absent unless", pagedattn.InvalidArgumentError),
        ({"seq_starts": ["a"]}, "seq_starts", pagedattn.InvalidArgumentError),
        ({"total_tokens": 2.5}, "total_tokens", pagedattn.InvalidArgumentError),
        ({"total_tokens": 2**62}, "an output of shape", pagedattn.OutOfMemoryError),
        ({"total_tokens": 2**45}, "an output of shape", pagedattn.OutOfMemoryError),
    ],
)
def test_gather_kv_sizes_its_output_from_anything_without_losing_its_words(
    changes: dict[str, Any], argument: str, error: type[Exception]
) -> None:
    cache = np.zeros((4, 16, 2, 8), np.float32)
    call = {"block_tables": np.zeros((1, 2), np.int32), "seq_lens": np.array([20], np.int32), **changes}
    with pytest.raises(error, match=f"^gather_kv: .*{argument}"):
        pagedattn.gather_kv(cache, cache.copy(), **call)


def test_a_swap_looks_at_its_mapping_before_anything_else() -> None:
    cache = np.zeros((4, 16, 2, 8), np.float32)
    with pytest.raises(pagedattn.InvalidArgumentError, match=r"`block_mapping` must .*int64"):
        pagedattn.swap_blocks(cache, cache, cache.view(np.int32)[0, :1, 0, :2])
