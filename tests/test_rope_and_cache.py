"""rope_and_cache: keys reach their slots rotated, values as they are, queries are rotated beside, nothing else changes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_close, assert_same_bytes, first
from backends import DTYPES, Array, NumpyBackend, is_float8
from batches import LAYOUTS, cache_views, is_poison, normal, poison
from test_reshape_and_cache import random_slots

NUM_TOKENS, MAX_POSITION = 29, 50


def table(rng: np.random.Generator, rotary_dim: int, dtype: Any) -> np.ndarray:
    """Return cosines and sines of random angles, so that no pair of dimensions stands for another."""
    angles = rng.uniform(-np.pi, np.pi, (MAX_POSITION, rotary_dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(dtype)


def assert_rotated(actual: np.ndarray, expected: np.ndarray, dtype: Any) -> None:
    """Check values in a cache's or a query's type against float64: half a unit in the last place, and some float32."""
    assert_close(actual, expected, dtype)
    unit = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}[np.dtype(dtype).name]
    bad = np.abs(actual.astype(np.float64) - expected) > unit * np.abs(expected) + 1e-6 + 2.0**-24
    assert not bad.any(), first(bad)


def run(backend: NumpyBackend, *host: np.ndarray, query: np.ndarray | None = None, **options: Any) -> tuple[Array, ...]:
    """Return the backend's caches and query_out; the host's arrays stay as they were."""
    moved = backend.arrays(*host)
    query_ = None if query is None else backend.array(query)
    out = None if query is None else backend.array(poison(query.shape, query.dtype))
    kv_dtype = backend.kv_dtype(host[2].dtype)
    result = pagedattn.rope_and_cache(*moved, query=query_, query_out=out, kv_dtype=kv_dtype, **options)
    assert result is out
    if query is not None:
        assert_same_bytes(backend.host(query_), query, "query")
    assert_same_bytes(backend.host(moved[0]), host[0], "key")
    return moved[2], moved[3], out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "num_q_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [
        ("float32", 4, 2, 64, 64),
        ("float16", 6, 3, 64, 32),
        ("bfloat16", 8, 2, 128, 128),
        ("bfloat16", 5, 1, 96, 48),
        ("float16", 2, 2, 10, 6),
        ("float32", 1, 1, 2, 2),
    ],
)
def test_keys_and_queries_are_rotated_and_values_are_not(
    backend: NumpyBackend,
    rng: np.random.Generator,
    dtype: str,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    layout: str,
    interleaved: bool,
) -> None:
    k_cache, v_cache = cache_views(9, 4, num_kv_heads, head_dim, DTYPES[dtype], layout)
    packed = normal(rng, (NUM_TOKENS + 3, num_q_heads + 2 * num_kv_heads, head_dim), DTYPES[dtype])
    query, key, value = np.split(packed, [num_q_heads, num_q_heads + num_kv_heads], axis=1)
    slots = random_slots(rng, NUM_TOKENS, 36)  # three tokens more than slots: padding of a graph
    positions = rng.integers(0, MAX_POSITION, NUM_TOKENS)
    cos_sin = table(rng, rotary_dim, DTYPES[dtype])
    host = (key, value, k_cache, v_cache, slots, positions, cos_sin)
    k, v, out = run(backend, *host, query=query, interleaved=interleaved)

    rotated = reference.rotate(key[:NUM_TOKENS], positions, cos_sin, interleaved=interleaved)
    stored, written = backend.host(k), slots >= 0
    blocks, offsets = slots[written] // 4, slots[written] % 4
    assert_rotated(stored[blocks, offsets], rotated[written], DTYPES[dtype])
    # Put back what was checked: then not one byte of the whole allocation may differ.
    k_cache[blocks, offsets] = stored[blocks, offsets]
    v_cache[blocks, offsets] = value[:NUM_TOKENS][written]
    for actual, expected in ((k, k_cache), (v, v_cache)):
        root = NumpyBackend().allocation(expected)
        assert_same_bytes(backend.allocation(actual)[: root.size], root)

    queries = backend.host(out)
    expected = reference.rotate(query[:NUM_TOKENS], positions, cos_sin, interleaved=interleaved)
    assert_rotated(queries[:NUM_TOKENS], expected, DTYPES[dtype])
    assert is_poison(queries[NUM_TOKENS:]).all()


@pytest.mark.parametrize("cos_sin_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("position_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positions_and_tables_of_every_type_are_taken(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, position_dtype: Any, cos_sin_dtype: str
) -> None:
    k_cache, v_cache = cache_views(8, 4, 2, 32, DTYPES[dtype], "NHD")
    key, value = normal(rng, (2, NUM_TOKENS, 2, 32), DTYPES[dtype])
    slots = rng.permutation(32)[:NUM_TOKENS].astype(np.int64)
    positions = rng.integers(0, MAX_POSITION, NUM_TOKENS).astype(position_dtype)
    cos_sin = table(rng, 32, DTYPES[cos_sin_dtype])
    k, _, _ = run(backend, key, value, k_cache, v_cache, slots, positions, cos_sin)
    stored = backend.host(k)[slots // 4, slots % 4]
    assert_rotated(stored, reference.rotate(key, positions, cos_sin), DTYPES[dtype])


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "8 bytes off"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float8_caches_get_rotated_keys_scaled_and_saturated(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, layout: str, kv_dtype: str
) -> None:
    assert is_float8(DTYPES[kv_dtype])
    k_cache, v_cache = cache_views(8, 4, 2, 32, DTYPES[kv_dtype], layout)
    key, value = normal(rng, (2, NUM_TOKENS, 2, 32), DTYPES[dtype], 100.0)
    slots = rng.permutation(32)[:NUM_TOKENS].astype(np.int64)
    positions = rng.integers(0, MAX_POSITION, NUM_TOKENS)
    cos_sin = table(rng, 16, np.float32)
    k_scale, v_scale = np.array([0.5, 0.03125], np.float32), 0.25
    moved_scale = backend.array(k_scale)
    k, v, _ = run(
        backend, key, value, k_cache, v_cache, slots, positions, cos_sin, k_scale=moved_scale, v_scale=v_scale
    )
    rotated = reference.rotate(key, positions, cos_sin)
    stored = backend.host(k).view(DTYPES[kv_dtype])[slots // 4, slots % 4]
    # Float32 rounds the products, which may be larger than what remains of them, and so may cross a tie of two codes.
    error = 2.0**-23 * np.abs(key).max(axis=-1, keepdims=True).astype(np.float64)
    low, high = (reference.quantise(rotated + e, k_scale, DTYPES[kv_dtype]) for e in (-error, error))
    number = stored.astype(np.float32)
    good = (low.astype(np.float32) <= number) & (number <= high.astype(np.float32))
    assert good.all(), first(~good)
    values = backend.host(v).view(DTYPES[kv_dtype])[slots // 4, slots % 4]
    assert_same_bytes(values, reference.quantise(value, v_scale, DTYPES[kv_dtype]))


def test_a_query_is_rotated_in_place_where_nothing_else_is_said(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    k_cache, v_cache = cache_views(8, 4, 1, 16, np.float32, "NHD")
    # Query, key and value are slices of one array, as a projection leaves them.
    packed = normal(rng, (NUM_TOKENS, 4, 16), np.float32)
    slots, positions = rng.permutation(32)[:NUM_TOKENS].astype(np.int64), rng.integers(0, MAX_POSITION, NUM_TOKENS)
    cos_sin = table(rng, 16, np.float32)
    query, key, value = packed[:, :2], packed[:, 2:3], packed[:, 3:]
    q, k, v, *rest = backend.arrays(query, key, value, k_cache, v_cache, slots, positions, cos_sin)
    result = pagedattn.rope_and_cache(k, v, *rest, query=q)
    assert result is q
    assert_rotated(backend.host(q), reference.rotate(query, positions, cos_sin), np.float32)
    assert_same_bytes(backend.host(k), key)
    assert_same_bytes(backend.host(v), value)


def test_a_position_of_zero_angle_leaves_the_bits_alone(backend: NumpyBackend, rng: np.random.Generator) -> None:
    k_cache, v_cache = cache_views(8, 4, 2, 64, np.float16, "NHD")
    key, value = normal(rng, (2, NUM_TOKENS, 2, 64), np.float16)
    slots = rng.permutation(32)[:NUM_TOKENS].astype(np.int64)
    cos_sin = np.concatenate([np.ones((1, 32)), np.zeros((1, 32))], axis=1).astype(np.float16)
    k, v, _ = run(backend, key, value, k_cache, v_cache, slots, np.zeros(NUM_TOKENS, np.int32), cos_sin)
    reference.reshape_and_cache(key, value, k_cache, v_cache, slots)
    assert_same_bytes(backend.host(k), k_cache)
    assert_same_bytes(backend.host(v), v_cache)


@pytest.mark.parametrize("num_tokens", [0, 1, 4000])
def test_any_number_of_tokens_is_served(backend: NumpyBackend, rng: np.random.Generator, num_tokens: int) -> None:
    k_cache, v_cache = cache_views(300, 16, 2, 64, np.float16, "interleaved NHD")
    key, value = normal(rng, (2, num_tokens, 2, 64), np.float16)
    slots = rng.permutation(4800)[:num_tokens].astype(np.int64)
    positions, cos_sin = rng.integers(0, MAX_POSITION, num_tokens), table(rng, 64, np.float16)
    k, v, _ = run(backend, key, value, k_cache, v_cache, slots, positions, cos_sin)
    rotated = reference.rotate(key, positions, cos_sin)
    if num_tokens:
        assert_rotated(backend.host(k)[slots // 16, slots % 16], rotated, np.float16)
        assert_same_bytes(backend.host(v)[slots // 16, slots % 16], value)
