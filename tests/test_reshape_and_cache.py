"""reshape_and_cache: new keys and values reach their slots, bit for bit, and nothing else changes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import as_bytes, assert_same_bytes, first
from backends import DTYPES, FLOAT8_E4M3, FLOAT8_E5M2, Array, NumpyBackend, is_float8
from batches import LAYOUTS, cache_views, normal


def run(
    backend: NumpyBackend,
    key: np.ndarray,
    value: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    slot_mapping: np.ndarray,
    **scales: Any,
) -> tuple[Array, Array]:
    """Return the backend's caches after the call; the host's stay as they were."""
    key_, value_, k, v, slots = backend.arrays(key, value, k_cache, v_cache, slot_mapping)
    moved = {name: backend.array(s) if isinstance(s, np.ndarray) else s for name, s in scales.items()}
    pagedattn.reshape_and_cache(key_, value_, k, v, slots, kv_dtype=backend.kv_dtype(k_cache.dtype), **moved)
    return k, v


def random_slots(rng: np.random.Generator, num_tokens: int, num_slots: int) -> np.ndarray:
    """Return distinct slots in random order, about a fifth of them negative: padding."""
    slots = rng.permutation(num_slots)[:num_tokens].astype(np.int64)
    padding = rng.choice(np.array([-1, -2, -(2**63)], np.int64), num_tokens)
    return np.where(rng.random(num_tokens) < 0.2, padding, slots)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("block_size", "num_kv_heads", "head_dim"), [(16, 2, 64), (1, 3, 8), (17, 1, 256), (3, 4, 5)])
def test_tokens_reach_their_slots_and_no_other_byte_changes(
    backend: NumpyBackend,
    rng: np.random.Generator,
    dtype: str,
    layout: str,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    num_blocks, num_tokens = 40 // block_size + 3, 33
    k_cache, v_cache = cache_views(num_blocks, block_size, num_kv_heads, head_dim, DTYPES[dtype], layout)
    packed = normal(rng, (num_tokens, 3 * num_kv_heads, head_dim), DTYPES[dtype])
    packed[0, 0, 0] = np.nan
    key, value = packed[:, num_kv_heads : 2 * num_kv_heads], packed[:, 2 * num_kv_heads :]
    slots = random_slots(rng, num_tokens, num_blocks * block_size)
    k, v = run(backend, key, value, k_cache, v_cache, slots)
    reference.reshape_and_cache(key, value, k_cache, v_cache, slots)
    for actual, expected in ((k, k_cache), (v, v_cache)):
        assert_same_bytes(backend.host(actual), expected)
        # The whole allocation: gaps of padded layouts and the other half of interleaved ones.
        owner = backend.allocation(actual)
        root = NumpyBackend().allocation(expected)
        assert_same_bytes(owner[: root.size], root)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_dtype", [FLOAT8_E4M3, FLOAT8_E5M2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float8_caches_get_the_nearest_value_with_ties_to_even(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, kv_dtype: np.dtype[Any], layout: str
) -> None:
    k_cache, v_cache = cache_views(5, 16, 2, 64, kv_dtype, layout)
    # All magnitudes from underflow to saturation; powers of two as scales divide exactly.
    exponents = rng.integers(-20, 17, (2, 60, 2, 64))
    key, value = (rng.standard_normal((2, 60, 2, 64)) * 2.0**exponents).clip(-60000, 60000).astype(DTYPES[dtype])
    slots = random_slots(rng, 60, 80)
    scales = {"k_scale": np.array([0.5, 4.0], np.float32), "v_scale": 2.0}
    k, v = run(backend, key, value, k_cache, v_cache, slots, **scales)
    reference.reshape_and_cache(key, value, k_cache, v_cache, slots, **scales)
    assert_same_bytes(backend.host(k), k_cache, "k_cache")
    assert_same_bytes(backend.host(v), v_cache, "v_cache")


@pytest.mark.parametrize("kv_dtype", [FLOAT8_E4M3, FLOAT8_E5M2])
def test_values_halfway_between_two_float8_values_round_to_even(backend: NumpyBackend, kv_dtype: np.dtype[Any]) -> None:
    codes = np.arange(128, dtype=np.uint8).view(kv_dtype).astype(np.float32)
    codes = codes[np.isfinite(codes)]
    halfway = (codes[:-1] + codes[1:]) / 2
    above, below = np.nextafter(halfway, np.float32(np.inf)), np.nextafter(halfway, np.float32(0))
    values = np.concatenate([halfway, -halfway, above, below, -above, -below])
    values = np.resize(values, (-(-values.size // 8), 1, 8)).astype(np.float32)
    k_cache, v_cache = cache_views(len(values), 1, 1, 8, kv_dtype, "NHD")
    slots = np.arange(len(values))
    k, _ = run(backend, values, values, k_cache, v_cache, slots)
    reference.reshape_and_cache(values, values, k_cache, v_cache, slots)
    assert_same_bytes(backend.host(k), k_cache)


@pytest.mark.parametrize("kv_dtype", [FLOAT8_E4M3, FLOAT8_E5M2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float8_caches_saturate_infinities_and_keep_nan(
    backend: NumpyBackend, dtype: str, kv_dtype: np.dtype[Any]
) -> None:
    largest = reference.LARGEST_FINITE[kv_dtype.name]
    specials = [np.inf, -np.inf, np.nan, 0.0, -0.0, largest, -largest, 65000.0]
    key = np.array(specials, np.float32).astype(DTYPES[dtype]).reshape(1, 1, 8)
    k_cache, v_cache = cache_views(1, 1, 1, 8, kv_dtype, "NHD")
    k, v = run(backend, key, key, k_cache, v_cache, np.zeros(1, np.int64))
    expected = [largest, -largest, np.nan, 0.0, -0.0, largest, -largest, largest]
    for cache in (k, v):
        stored = backend.host(cache).view(kv_dtype).astype(np.float32).reshape(8)
        np.testing.assert_array_equal(stored, expected)
        np.testing.assert_array_equal(np.signbit(stored[3:]), np.signbit(expected[3:]))


@pytest.mark.parametrize("kv_dtype", [FLOAT8_E4M3, FLOAT8_E5M2])
def test_any_scale_divides_to_the_nearest_value_up_to_its_own_rounding(
    backend: NumpyBackend, rng: np.random.Generator, kv_dtype: np.dtype[Any]
) -> None:
    k_cache, v_cache = cache_views(4, 16, 2, 64, kv_dtype, "NHD")
    key, value = normal(rng, (2, 64, 2, 64), np.float32, 10.0)
    slots = rng.permutation(64).astype(np.int64)
    k_scale, v_scale = np.array([0.37], np.float32), np.array([0.011, 3.3], np.float32)
    k, v = run(backend, key, value, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)
    for new, cache, scale in ((key, k, k_scale), (value, v, v_scale)):
        stored = backend.host(cache).view(kv_dtype).reshape(64, 2, 64)[slots]
        # One rounding of the quotient in float32 may move it across a tie.
        nearest = [reference.quantise(new * (1 + e), scale, kv_dtype) for e in (-2e-7, 0.0, 2e-7)]
        good = np.any([(as_bytes(stored) == as_bytes(n)).all(axis=-1) for n in nearest], axis=0)
        assert good.all(), first(~good)


def test_rows_past_the_slot_mapping_are_ignored(backend: NumpyBackend, rng: np.random.Generator) -> None:
    k_cache, v_cache = cache_views(3, 4, 1, 8, np.float16, "NHD")
    key, value = normal(rng, (2, 9, 1, 8), np.float16)
    slots = np.array([11, 0, 5], np.int64)
    k, v = run(backend, key, value, k_cache, v_cache, slots)
    reference.reshape_and_cache(key, value, k_cache, v_cache, slots)
    assert_same_bytes(backend.host(k), k_cache)
    assert_same_bytes(backend.host(v), v_cache)


def test_more_tokens_than_a_processor_s_caches_keep_reach_their_slots(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    k_cache, v_cache = cache_views(200, 16, 8, 128, np.float16, "interleaved NHD")
    key, value = normal(rng, (2, 2500, 8, 128), np.float16)
    slots = random_slots(rng, 2500, 3200)
    k, v = run(backend, key, value, k_cache, v_cache, slots)
    reference.reshape_and_cache(key, value, k_cache, v_cache, slots)
    for actual, expected in ((k, k_cache), (v, v_cache)):
        assert_same_bytes(backend.host(actual), expected)


@pytest.mark.parametrize("layout", ["NHD", "interleaved HND", "8 bytes off"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), [("bfloat16", "bfloat16"), ("float16", "float8_e4m3")])
@pytest.mark.parametrize("num_layers", [1, 3, 97])  # 97: more than one launch takes
def test_the_layers_of_a_model_are_written_in_one_call(
    backend: NumpyBackend, rng: np.random.Generator, num_layers: int, dtype: str, kv_dtype: str, layout: str
) -> None:
    caches = [cache_views(5, 4, 2, 16, DTYPES[kv_dtype], layout) for _ in range(num_layers)]
    packed = normal(rng, (num_layers, 15, 6, 16), DTYPES[dtype])
    keys, values = list(packed[:, :, 2:4]), list(packed[:, :, 4:])
    slots = random_slots(rng, 13, 20)  # two tokens are padding of a graph
    scales = {}
    if is_float8(DTYPES[kv_dtype]):
        scales = {name: 2.0 ** rng.integers(-3, 3, (num_layers, 2)) for name in ("k_scale", "v_scale")}
    flat = [array for pair in caches for array in pair]
    moved = backend.arrays(*keys, *values, *flat, slots)
    moved_keys, moved_values, moved_caches = (
        list(moved[:num_layers]),
        list(moved[num_layers : 2 * num_layers]),
        list(moved[2 * num_layers : -1]),
    )
    options = {name: backend.array(scale.astype(np.float32)) for name, scale in scales.items()}
    pagedattn.reshape_and_cache(
        moved_keys,
        moved_values,
        moved_caches[::2],
        moved_caches[1::2],
        moved[-1],
        kv_dtype=backend.kv_dtype(DTYPES[kv_dtype]),
        **options,
    )
    for layer, (k_cache, v_cache) in enumerate(caches):
        of_layer = {name: scale[layer] for name, scale in scales.items()}
        reference.reshape_and_cache(keys[layer], values[layer], k_cache, v_cache, slots, **of_layer)
    for actual, expected in zip(moved_caches, flat, strict=True):
        assert_same_bytes(backend.host(actual), expected)
        root = NumpyBackend().allocation(expected)
        assert_same_bytes(backend.allocation(actual)[: root.size], root)


def test_one_row_of_scales_serves_each_layer_and_one_scale_serves_all(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    keys = list(normal(rng, (2, 4, 2, 8), np.float32))
    for scale, of_layer in (
        (np.array([[2.0], [8.0]], np.float32), [2.0, 8.0]),
        (np.array([4.0], np.float32), [4.0, 4.0]),
        (0.25, [0.25, 0.25]),
    ):
        caches = [cache_views(2, 4, 2, 8, FLOAT8_E5M2, "NHD") for _ in range(2)]
        moved = backend.arrays(*keys, *(c for pair in caches for c in pair), np.arange(4))
        given = backend.array(scale) if isinstance(scale, np.ndarray) else scale
        kv_dtype = backend.kv_dtype(FLOAT8_E5M2)
        pagedattn.reshape_and_cache(
            moved[:2], moved[:2], moved[2:6:2], moved[3:6:2], moved[6], k_scale=given, kv_dtype=kv_dtype
        )
        for layer, (k_cache, v_cache) in enumerate(caches):
            reference.reshape_and_cache(
                keys[layer], keys[layer], k_cache, v_cache, np.arange(4), k_scale=of_layer[layer]
            )
            assert_same_bytes(backend.host(moved[2 + 2 * layer]), k_cache)
            assert_same_bytes(backend.host(moved[3 + 2 * layer]), v_cache)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_call_that_writes_nothing_changes_nothing(backend: NumpyBackend, num_tokens: int) -> None:
    k_cache, v_cache = cache_views(3, 4, 1, 8, np.float16, "NHD")
    key = np.ones((num_tokens, 1, 8), np.float16)
    k, v = run(backend, key, key, k_cache, v_cache, np.full(num_tokens, -1, np.int64))
    assert_same_bytes(backend.host(k), k_cache)
    assert_same_bytes(backend.host(v), v_cache)


def test_many_tokens_reach_their_slots(backend: NumpyBackend, rng: np.random.Generator) -> None:
    k_cache, v_cache = cache_views(300, 16, 4, 64, np.float16, "interleaved NHD")
    key, value = normal(rng, (2, 4000, 4, 64), np.float16)
    slots = random_slots(rng, 4000, 4800)
    k, v = run(backend, key, value, k_cache, v_cache, slots)
    reference.reshape_and_cache(key, value, k_cache, v_cache, slots)
    assert_same_bytes(backend.host(k), k_cache)
    assert_same_bytes(backend.host(v), v_cache)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "float8_e4m3", "float8_e5m2"])
def test_storage_arrays_with_kv_dtype_get_the_bits_of_typed_ones(rng: np.random.Generator, kv_dtype: str) -> None:
    dtype = DTYPES[kv_dtype]
    source = np.dtype(np.float32) if is_float8(dtype) else dtype
    storage = np.uint8 if is_float8(dtype) else np.uint16
    key, value = normal(rng, (2, 9, 2, 8), source)
    slots = random_slots(rng, 9, 12)
    k_cache, v_cache = cache_views(3, 4, 2, 8, dtype, "HND")
    k, v = run(NumpyBackend(), key, value, k_cache, v_cache, slots)
    k_raw, v_raw = NumpyBackend().arrays(k_cache, v_cache)
    raw = [new if is_float8(dtype) else new.view(storage) for new in (key, value)]
    pagedattn.reshape_and_cache(*raw, k_raw.view(storage), v_raw.view(storage), slots, kv_dtype=kv_dtype)
    assert_same_bytes(k_raw, k)
    assert_same_bytes(v_raw, v)


def test_what_was_written_is_what_attention_reads(backend: NumpyBackend, rng: np.random.Generator) -> None:
    k_cache, v_cache = cache_views(4, 4, 1, 8, np.float32, "HND")
    key, value = normal(rng, (2, 9, 1, 8), np.float32)
    table = np.array([[3, 0, 2]], np.int32)
    slots = (table[0, np.arange(9) // 4] * 4 + np.arange(9) % 4).astype(np.int64)
    k, v = run(backend, key, value, k_cache, v_cache, slots)
    q = normal(rng, (1, 2, 8), np.float32)
    q_, table_, lens = backend.arrays(q, table, np.array([9], np.int32))
    out = pagedattn.paged_attention(q_, k, v, table_, lens, scale=1.0)
    scores = np.einsum("hd,jd->hj", q[0].astype(np.float64), key[:, 0])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = (weights / weights.sum(axis=1, keepdims=True)) @ value[:, 0]
    np.testing.assert_allclose(backend.host(out)[0], expected, rtol=1e-4, atol=1e-5)
