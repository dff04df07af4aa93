"""Valid calls of every operation, to be spoilt one argument at a time, and the check that a refused call did nothing.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pagedattn
import pytest
from backends import FLOAT8_E4M3, NumpyBackend, is_float8

Arguments = dict[str, Any]


def attention_call() -> Arguments:
    """Three sequences of 8, 5 and 3 tokens with 3, 1 and 0 query tokens; 6 blocks of 4."""
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((4, 4, 8), np.float32),
        "k_cache": rng.standard_normal((6, 4, 2, 8), np.float32),
        "v_cache": rng.standard_normal((6, 4, 2, 8), np.float32),
        "block_tables": np.array([[5, 0, -1], [3, 2, 77], [4, -1, -1]], np.int32),
        "seq_lens": np.array([8, 5, 3], np.int32),
        "query_start_loc": np.array([0, 3, 4, 4], np.int32),
        "out": np.full((4, 4, 8), np.nan, np.float32),
        "lse": np.full((4, 4), np.nan, np.float32),
    }


def float8_attention_call() -> Arguments:
    call = attention_call()
    for name in ("q", "out"):
        call[name] = call[name].astype(np.float16)
    for name in ("k_cache", "v_cache"):
        call[name] = call[name].astype(FLOAT8_E4M3)
    return call


def float8_queries_call() -> Arguments:
    call = float8_attention_call()
    return {**call, "q": call["q"].astype(FLOAT8_E4M3)}


def reshape_call() -> Arguments:
    rng = np.random.default_rng(0)
    return {
        "key": rng.standard_normal((5, 2, 8), np.float32),
        "value": rng.standard_normal((5, 2, 8), np.float32),
        "k_cache": rng.standard_normal((6, 4, 2, 8), np.float32),
        "v_cache": rng.standard_normal((6, 4, 2, 8), np.float32),
        "slot_mapping": np.array([3, -1, 23, 0, 7], np.int64),
    }


def float8_reshape_call() -> Arguments:
    call = reshape_call()
    for name in ("k_cache", "v_cache"):
        call[name] = call[name].astype(FLOAT8_E4M3)
    return call


def layers_call() -> Arguments:
    """Three layers of `reshape_call`."""
    calls = [reshape_call() for _ in range(3)]
    names = ("key", "value", "k_cache", "v_cache")
    return {**{name: [call[name] for call in calls] for name in names}, "slot_mapping": calls[0]["slot_mapping"]}


def rope_call() -> Arguments:
    rng = np.random.default_rng(0)
    return {
        **reshape_call(),
        "positions": np.array([0, 6, 2, 9, 9], np.int64),
        "cos_sin": rng.standard_normal((10, 6), np.float32),
        "query": rng.standard_normal((5, 4, 8), np.float32),
        "query_out": np.full((5, 4, 8), np.nan, np.float32),
    }


def copy_call() -> Arguments:
    rng = np.random.default_rng(0)
    return {
        "caches": [rng.standard_normal((6, 4, 2, 8), np.float32) for _ in range(3)],
        "block_mapping": np.array([[0, 3], [1, 4], [1, 5]], np.int64),
    }


def swap_call() -> Arguments:
    rng = np.random.default_rng(0)
    return {
        "src": [rng.standard_normal((6, 4, 2, 8), np.float32) for _ in range(2)],
        "dst": [rng.standard_normal((4, 4, 2, 8), np.float32) for _ in range(2)],
        "block_mapping": np.array([[0, 3], [5, 1], [5, 2]], np.int64),
    }


def gather_call() -> Arguments:
    call = {name: value for name, value in attention_call().items() if name[0] in "kvbs"}
    return {**call, "out": (np.full((16, 2, 8), np.nan, np.float32), np.full((16, 2, 8), np.nan, np.float32))}


def merge_call() -> Arguments:
    rng = np.random.default_rng(0)
    return {
        "outs": [rng.standard_normal((4, 2, 8), np.float32) for _ in range(3)],
        "lses": [rng.standard_normal((4, 2), np.float32) for _ in range(3)],
        "out": np.full((4, 2, 8), np.nan, np.float32),
        "lse": np.full((4, 2), np.nan, np.float32),
    }


@dataclass
class Bad:
    """One way to spoil a call: what to change, the argument that the message must name, and what it must say."""

    name: str
    spoil: Callable[[Arguments], Any]
    argument: str
    says: str
    start: Callable[[], Arguments]
    operation: str
    host_only: bool = False  # CuPy has no such array

    def __str__(self) -> str:
        return f"{self.operation}: {self.name}"


def on(backend: NumpyBackend, call: Arguments) -> Arguments:
    """Return the call with its arrays on the backend; arrays that share memory go on sharing it."""
    flat: list[np.ndarray] = []
    for name, value in call.items():
        if name == "block_mapping" and "src" in call:
            continue  # always the host's
        flat += [array for array in (value if isinstance(value, (list, tuple)) else [value]) if _is_array(array)]
    moved = dict(zip(map(id, flat), backend.arrays(*flat), strict=True))

    def move(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(move(item) for item in value)
        return moved.get(id(value), value)

    result = {name: move(value) for name, value in call.items()}
    cache = call.get("k_cache")
    if backend.is_cuda and isinstance(cache, np.ndarray) and is_float8(cache.dtype):
        result.setdefault("kv_dtype", backend.kv_dtype(cache.dtype))
    return result


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def everything(backend: NumpyBackend, call: Arguments) -> list[np.ndarray]:
    """Return the bytes of every allocation that the call can reach."""
    arrays: list[Any] = []
    for value in call.values():
        arrays += value if isinstance(value, (list, tuple)) else [value]
    device = [a for a in arrays if type(a).__module__.startswith("cupy")]
    host = [a for a in arrays if _is_array(a)]
    return [NumpyBackend().allocation(a) for a in host] + [backend.allocation(a) for a in device]


def refuse(
    backend: NumpyBackend,
    operation: str,
    call: Arguments,
    argument: str,
    says: str,
    error: type[Exception] = pagedattn.InvalidArgumentError,
) -> None:
    """Check that the call raises, that the message names operation and argument, and that no byte has changed."""
    before = everything(backend, call)
    with pytest.raises(error) as raised:
        getattr(pagedattn, operation)(**call)
    backend.synchronize()
    message = str(raised.value)
    assert message.startswith(f"{operation}: "), message
    assert f"`{argument}" in message, message
    assert re.search(says, message), message
    for old, new in zip(before, everything(backend, call), strict=True):
        np.testing.assert_array_equal(new, old)


def check_bad(backend: NumpyBackend, bad: Bad, **options: Any) -> None:
    """Check that a spoilt call is refused as it should be."""
    if bad.host_only and backend.is_cuda:
        pytest.skip("CuPy has no such array")
    call = bad.start()
    bad.spoil(call)
    refuse(backend, bad.operation, on(backend, {**call, **options}), bad.argument, bad.says)
