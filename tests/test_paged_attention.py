"""paged_attention against the float64 reference: every pair of options, and the contract's cases one by one.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_close, assert_lse_close, assert_same_bytes
from attention_check import check_batch
from backends import BFLOAT16, DTYPES, Array, NumpyBackend, is_float8
from batches import LAYOUTS, TENSOR_CORE_KINDS, Batch, is_poison, make_batch, normal, poison, scale_for
from pairwise import case_id, pairwise

# Decode, speculative decode, chunk, full prefill, a sequence without new tokens and an empty one.
MIXED_SEQ_LENS = [37, 130, 70, 33, 20, 0, 1]
MIXED_QUERY_LENS = [1, 4, 40, 33, 0, 0, 1]


PAIRWISE = pairwise(
    {
        "dtypes": [("float32", "float32"), *TENSOR_CORE_KINDS],
        "head_dim": [8, 64, 72, 80, 128, 192, 256],
        "block_size": [1, 3, 8, 16, 17, 128],
        "group": [1, 3, 4, 5, 7, 8, 16],
        "layout": LAYOUTS,
        "mask": ["causal", "full"],
        "window": [None, 1, 5, 24],
        "softcap": [0.0, 1.5],
        "alibi": [False, True],
        "sinks": [False, True],
        "packed_q": [False, True],
        "strided_out": [False, True],
        "num_kv_heads": [1, 2],
        "scale": [None, 0.3],
    }
)


@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_every_pair_of_options_matches_the_reference(
    backend: NumpyBackend, rng: np.random.Generator, case: dict[str, Any]
) -> None:
    dtype, kv_dtype = (DTYPES[name] for name in case["dtypes"])
    num_kv_heads, num_q_heads = case["num_kv_heads"], case["num_kv_heads"] * case["group"]
    options: dict[str, Any] = {
        "causal": case["mask"] == "causal",
        "window": case["window"],
        "softcap": case["softcap"],
        "scale": case["scale"],
        **scale_for(kv_dtype, rng, num_kv_heads, dtype),
    }
    if case["alibi"]:
        options["alibi_slopes"] = rng.uniform(-0.2, 0.4, num_q_heads).astype(np.float32)
    if case["sinks"]:
        options["sinks"] = rng.uniform(-2, 3, num_q_heads).astype(np.float32)
    batch = make_batch(
        rng,
        MIXED_SEQ_LENS,
        MIXED_QUERY_LENS,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=case["head_dim"],
        block_size=case["block_size"],
        dtype=dtype,
        kv_dtype=kv_dtype,
        layout=case["layout"],
        packed_q=case["packed_q"],
        **options,
    )
    check_batch(backend, batch, strided_out=case["strided_out"])


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim_that_is_a_multiple_of_8_up_to_256_is_served(
    backend: NumpyBackend, rng: np.random.Generator, head_dim: int
) -> None:
    dtype = list(DTYPES.values())[int(rng.integers(3))]
    check_batch(backend, make_batch(rng, [19, 40], [1, 9], head_dim=head_dim, block_size=8, dtype=dtype))


@pytest.mark.parametrize("block_size", [1, 2, 4, 5, 8, 12, 16, 24, 32, 48, 64, 100, 256, 300])
def test_any_block_size_is_served(backend: NumpyBackend, rng: np.random.Generator, block_size: int) -> None:
    check_batch(backend, make_batch(rng, [500, 1, 256], [1, 1, 60], block_size=block_size, dtype=np.float16))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 2, 4, 6, 8, 9, 12, 13, 16, 17, 32, 71])
def test_decode_of_any_group_size_matches_the_reference(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, group: int
) -> None:
    batch = make_batch(
        rng, [1, 15, 16, 17, 200, 333], num_q_heads=group, num_kv_heads=1, head_dim=128, dtype=DTYPES[dtype]
    )
    check_batch(backend, batch)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_full_prefill_longer_than_any_tile_matches_the_reference(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, head_dim: int
) -> None:
    lens = [300, 129, 64]
    batch = make_batch(rng, lens, lens, num_q_heads=4, num_kv_heads=1, head_dim=head_dim, dtype=DTYPES[dtype])
    check_batch(backend, batch)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float16", "float8_e4m3")]
)
@pytest.mark.parametrize("query_len", [1, 3])
def test_one_long_sequence_matches_the_reference(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, kv_dtype: str, query_len: int
) -> None:
    # Long enough that the GPU splits it over all multiprocessors and merges the parts.
    batch = make_batch(
        rng,
        [16_411],
        [query_len],
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=128,
        dtype=DTYPES[dtype],
        kv_dtype=DTYPES[kv_dtype],
        layout="interleaved NHD",
    )
    check_batch(backend, batch)


def test_a_sequence_in_hundreds_of_parts_matches_the_reference(backend: NumpyBackend, rng: np.random.Generator) -> None:
    # A single KV head: each of the GPU's blocks has a part, more of them than the block that joins them can list.
    batch = make_batch(rng, [60_011], [1], num_q_heads=4, num_kv_heads=1, head_dim=64, dtype=np.float16)
    check_batch(backend, batch)


def test_many_short_sequences_beside_a_long_one_match_the_reference(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    seq_lens = [int(n) for n in rng.integers(0, 60, 300)] + [5000]
    query_lens = [int(rng.integers(0, min(n, 3) + 1)) for n in seq_lens]
    batch = make_batch(rng, seq_lens, query_lens, num_q_heads=6, num_kv_heads=2, dtype=np.float16, block_size=8)
    check_batch(backend, batch)


def test_sequences_may_share_blocks(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [70, 90, 65, 64], [1, 20, 1, 2], shared_prefix=3, dtype=np.float16)
    assert (batch.block_tables[:, :3] == batch.block_tables[0, :3]).all()
    check_batch(backend, batch)


def test_without_query_start_loc_each_sequence_has_one_query_token(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    batch = make_batch(rng, [5, 80, 17, 0])
    check_batch(backend, batch)
    args, options = batch.on(backend)
    implied = backend.host(pagedattn.paged_attention(*args, **options))
    starts = backend.array(np.arange(5, dtype=np.int32))
    given = backend.host(pagedattn.paged_attention(*args, query_start_loc=starts, **options))
    assert_same_bytes(implied, given)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_that_sees_no_key_gives_zeros_and_minus_infinity(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, causal: bool
) -> None:
    batch = make_batch(rng, [0, 9, 0, 0], [1, 1, 0, 2], dtype=DTYPES[dtype], causal=causal)
    args, keywords = batch.on(backend)
    out, lse = backend.arrays(poison(batch.q.shape, batch.q.dtype), poison((4, 4), np.float32))
    pagedattn.paged_attention(*args, out=out, lse=lse, **keywords)
    empty = [0, 2, 3]
    np.testing.assert_array_equal(backend.host(out)[empty].astype(np.float32), 0)
    np.testing.assert_array_equal(backend.host(lse)[empty], -np.inf)
    check_batch(backend, batch)


def test_a_row_that_sees_no_key_but_a_sink_gives_zeros_and_the_sink(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    # The log-sum-exp includes sinks: merging such a part with others must not lose them.
    sinks = np.array([1.0, -3.0, 0.0, 50.0], np.float32)
    batch = make_batch(rng, [0, 9, 0], [1, 1, 2], dtype=np.float16, sinks=sinks)
    args, keywords = batch.on(backend)
    out, lse = pagedattn.paged_attention(*args, return_lse=True, **keywords)
    np.testing.assert_array_equal(backend.host(out)[[0, 2, 3]].astype(np.float32), 0)
    np.testing.assert_allclose(backend.host(lse)[[0, 2, 3]], np.stack([sinks] * 3), rtol=1e-6, atol=1e-6)
    check_batch(backend, batch)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_empty_batch_gives_empty_results(backend: NumpyBackend, rng: np.random.Generator, dtype: str) -> None:
    batch = make_batch(rng, [], [], dtype=DTYPES[dtype])
    args, options = batch.on(backend)
    out, lse = pagedattn.paged_attention(*args, return_lse=True, **options)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def test_a_batch_of_sequences_without_query_tokens_gives_empty_results(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    args, options = make_batch(rng, [40, 3], [0, 0]).on(backend)
    assert pagedattn.paged_attention(*args, **options).shape == (0, 4, 64)


def test_results_are_new_arrays_of_the_type_of_q_where_none_are_given(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    batch = make_batch(rng, [9, 40], [2, 3], dtype=BFLOAT16)
    expected, expected_lse = batch.reference()
    args, options = batch.on(backend)
    out = pagedattn.paged_attention(*args, **options)
    assert type(out) is type(args[0])
    assert out.dtype == args[0].dtype
    assert_close(backend.host(out), expected, BFLOAT16)
    out, lse = pagedattn.paged_attention(*args, return_lse=True, **options)
    assert type(lse) is type(args[0])
    assert_close(backend.host(out), expected, BFLOAT16)
    assert_lse_close(backend.host(lse), expected_lse)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_as_long_as_the_sequence_changes_nothing(
    backend: NumpyBackend, rng: np.random.Generator, causal: bool
) -> None:
    batch = make_batch(rng, [50, 21], [30, 21], causal=causal)
    args, options = batch.on(backend)
    without = backend.host(pagedattn.paged_attention(*args, **options))
    for window in (50, 51, 2**40):
        result = backend.host(pagedattn.paged_attention(*args, window=window, **options))
        assert_close(result, without.astype(np.float64), np.float32)


def test_a_window_of_one_gives_the_token_s_own_value(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [33, 20], [33, 3], num_q_heads=2, num_kv_heads=2, window=1)
    args, options = batch.on(backend)
    result = backend.host(pagedattn.paged_attention(*args, **options))
    positions = [(0, p) for p in range(33)] + [(1, p) for p in (17, 18, 19)]
    expected = np.stack([batch.v_cache[batch.block_tables[b, p // 16], p % 16] for b, p in positions])
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("window", [1, 16, 100, 1000])
@pytest.mark.parametrize("query_len", [1, 5, 100])
def test_table_entries_before_the_window_are_not_read(
    backend: NumpyBackend, rng: np.random.Generator, window: int, query_len: int
) -> None:
    batch = make_batch(rng, [3000, 700], [query_len, 1], window=window, dtype=np.float16)
    if window + query_len < 700:
        assert not (0 <= batch.block_tables[0, 0] < len(batch.k_cache))
    check_batch(backend, batch)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_scores_far_beyond_the_range_of_exp_stay_finite(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str
) -> None:
    # Scores reach ±3000, so softmax picks single keys.
    batch = make_batch(rng, [64, 40], [1, 20], dtype=DTYPES[dtype], head_dim=64, scale=100.0)
    expected, expected_lse = batch.reference()
    args, options = batch.on(backend)
    out, lse = pagedattn.paged_attention(*args, return_lse=True, **options)
    result, result_lse = backend.host(out).astype(np.float64), backend.host(lse)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result_lse, expected_lse, rtol=1e-5)
    # Float32 scores of 3000 carry an absolute error of about 10⁻³, which becomes a relative one in the weights.
    assert np.linalg.norm(result - expected) <= 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-3])
def test_any_finite_scale_is_served(backend: NumpyBackend, rng: np.random.Generator, scale: float) -> None:
    check_batch(backend, make_batch(rng, [40, 9], [5, 9], scale=scale))


def test_a_softcap_far_above_the_scores_changes_nothing_to_speak_of(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    batch = make_batch(rng, [40, 9], [5, 9], softcap=1e4)
    expected, _ = batch.reference()
    check_batch(backend, batch)
    batch.options = {}
    np.testing.assert_allclose(batch.reference()[0], expected, rtol=1e-4, atol=1e-5)


def test_steep_alibi_slopes_leave_the_newest_key_alone(backend: NumpyBackend, rng: np.random.Generator) -> None:
    slopes = np.full(4, 1e3, np.float32)
    batch = make_batch(rng, [300, 70], [1, 70], alibi_slopes=slopes)
    check_batch(backend, batch)


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_of_keys_ahead_of_the_query_raises_their_scores(
    backend: NumpyBackend, rng: np.random.Generator, causal: bool
) -> None:
    slopes = np.array([0.5, 0.25, 0.0, -0.25], np.float32)
    check_batch(backend, make_batch(rng, [40], [25], alibi_slopes=slopes, causal=causal))


def test_a_sink_of_minus_infinity_changes_nothing(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 300], [5, 1])
    args, options = batch.on(backend)
    sinks = backend.array(np.full(4, -np.inf, np.float32))
    out, lse = pagedattn.paged_attention(*args, sinks=sinks, return_lse=True, **options)
    expected, expected_lse = batch.reference()
    assert_close(backend.host(out), expected, np.float32)
    assert_lse_close(backend.host(lse), expected_lse)


def test_a_sink_far_above_the_scores_takes_nearly_all_weight(backend: NumpyBackend, rng: np.random.Generator) -> None:
    check_batch(backend, make_batch(rng, [40, 300], [5, 1], sinks=np.array([30, 60, 0, -50], np.float32)))


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["absent", "number", "one", "per head"])
def test_every_form_of_scale_of_a_float8_cache_is_served(
    backend: NumpyBackend, rng: np.random.Generator, kv_dtype: str, dtype: str, form: str
) -> None:
    scales: dict[str, Any] = {
        "absent": {},
        "number": {"k_scale": 0.5, "v_scale": 1.7},
        "one": {"k_scale": np.array([0.5], np.float32), "v_scale": np.array([1.7], np.float32)},
        "per head": {"k_scale": np.array([0.5, 1.5], np.float32), "v_scale": np.array([1.7, 0.01], np.float32)},
    }[form]
    batch = make_batch(rng, [40, 300], [5, 1], dtype=DTYPES[dtype], kv_dtype=DTYPES[kv_dtype], head_dim=128, **scales)
    check_batch(backend, batch)


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3", "float8_e5m2"])
def test_every_float8_code_is_decoded_exactly(backend: NumpyBackend, kv_dtype: str) -> None:
    # One visible key: the output is its value.  All finite codes, subnormal ones included.
    codes = np.arange(256, dtype=np.uint8).view(DTYPES[kv_dtype])
    codes = np.where(np.isfinite(codes.astype(np.float32)), codes, np.zeros(1, DTYPES[kv_dtype])).astype(
        DTYPES[kv_dtype]
    )
    v_cache = codes.reshape(1, 1, 1, 256)
    q, k_cache = np.zeros((1, 1, 256), BFLOAT16), np.zeros((1, 1, 1, 256), DTYPES[kv_dtype])
    args = backend.arrays(q, k_cache, v_cache, np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    out = pagedattn.paged_attention(*args, kv_dtype=backend.kv_dtype(v_cache.dtype))
    np.testing.assert_array_equal(backend.host(out)[0, 0].astype(np.float32), codes.astype(np.float32))


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_float8_code_is_exact_for_several_rows(backend: NumpyBackend, dtype: str, kv_dtype: str) -> None:
    # One visible key of each head: its log-sum-exp is a code of the keys, its result all codes of the values.
    codes = np.arange(256, dtype=np.uint8).view(DTYPES[kv_dtype])
    codes = np.where(np.isfinite(codes.astype(np.float32)), codes, np.zeros(1, codes.dtype)).astype(codes.dtype)
    k_cache, v_cache = np.zeros((1, 1, 256, 256), codes.dtype), np.broadcast_to(codes, (1, 1, 256, 256)).copy()
    k_cache[..., 5] = codes
    q = np.zeros((1, 8 * 256, 256), DTYPES[dtype])
    q[..., 5] = 1
    args = backend.arrays(q, k_cache, v_cache, np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    kind = backend.kv_dtype(codes.dtype)
    out, lse = pagedattn.paged_attention(*args, scale=0.125, kv_dtype=kind, return_lse=True)
    expected = np.repeat(codes.astype(np.float64), 8) / 8
    np.testing.assert_allclose(backend.host(lse)[0], expected, rtol=1e-6, atol=1e-12)
    result, wanted = backend.host(out)[0].astype(np.float32), np.tile(codes.astype(np.float32), (2048, 1))
    # GPUs multiply and subtract at once, which leaves the rounding of the largest score, in units of log 2, in its
    # weight: from 8192 on half of a unit in float16's last place.
    exact = (np.abs(expected) < 8192 * np.log(2)) | (type(backend) is NumpyBackend)
    np.testing.assert_array_equal(result[exact], wanted[exact])
    np.testing.assert_allclose(result[~exact], wanted[~exact], rtol=2.0**-11)


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("query_len", [1, 200])
def test_queries_of_zeros_beside_others_over_a_cache_of_a_tiny_scale_are_no_nan(
    backend: NumpyBackend, rng: np.random.Generator, query_len: int, kv_dtype: str
) -> None:
    # Rows are brought to about 1 before they become float16; what that takes away from zeros left nothing of a scale.
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": BFLOAT16, "kv_dtype": DTYPES[kv_dtype]}
    batch = make_batch(rng, [300], [query_len], **shape, k_scale=1e-7, v_scale=0.5)
    batch.q[2::4] = batch.q[3::4] = 0
    batch.q[:, 1::4] = 0
    check_batch(backend, batch)


@pytest.mark.parametrize("query_len", [1, 2, 5, 40])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "spread", "scale"),
    [
        ("bfloat16", "bfloat16", 1e4, None),
        ("bfloat16", "bfloat16", 1e8, None),
        ("float16", "float16", 1e4, None),
        ("float32", "float32", 1e8, None),
        ("bfloat16", "float8_e4m3", 50, 1e6),
        ("float16", "float8_e5m2", 100, 1e6),
    ],
)
def test_scores_of_any_size_that_float32_holds_give_no_nan(
    rng: np.random.Generator, dtype: str, kv_dtype: str, spread: float, scale: float | None, query_len: int
) -> None:
    # From 2^24 on the rounding of a score is more than 1, and a weight that it went into 0 or infinite.
    options = {} if scale is None else {"scale": scale}
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "dtype": DTYPES[dtype], "kv_dtype": DTYPES[kv_dtype]}
    batch = make_batch(rng, [150], [query_len], **shape, spread=spread, **options)
    written = ~is_poison(batch.v_cache)
    batch.v_cache[written] = normal(rng, batch.v_cache.shape, batch.v_cache.dtype)[written]
    check_batch(NumpyBackend(), batch)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "float8_e4m3", "float8_e5m2"])
def test_storage_arrays_with_kv_dtype_give_the_bits_of_typed_arrays(rng: np.random.Generator, kv_dtype: str) -> None:
    dtype = BFLOAT16 if is_float8(DTYPES[kv_dtype]) else DTYPES[kv_dtype]
    batch = make_batch(rng, [40, 9], [5, 9], dtype=dtype, kv_dtype=DTYPES[kv_dtype])
    q, k, v, tables, lens = batch.on(NumpyBackend())[0]
    storage = np.uint8 if is_float8(k.dtype) else np.uint16
    starts = batch.query_start_loc
    typed = pagedattn.paged_attention(q, k, v, tables, lens, query_start_loc=starts)
    raw = pagedattn.paged_attention(
        q, k.view(storage), v.view(storage), tables, lens, query_start_loc=starts, kv_dtype=kv_dtype
    )
    assert raw.dtype == q.dtype
    assert_same_bytes(raw, typed)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_arrays_need_only_the_alignment_of_their_elements(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str
) -> None:
    batch = make_batch(rng, [40, 90, 16], [5, 1, 16], dtype=DTYPES[dtype])

    def one_element_off(array: np.ndarray) -> np.ndarray:
        shifted = poison((*array.shape[:-1], array.shape[-1] + 1), array.dtype)[..., 1:]
        shifted[...] = array
        return shifted

    batch.q, batch.k_cache, batch.v_cache = map(one_element_off, (batch.q, batch.k_cache, batch.v_cache))
    expected, _ = batch.reference()
    args, options = batch.on(backend)
    out = backend.array(one_element_off(poison(batch.q.shape, batch.q.dtype)))
    pagedattn.paged_attention(*args, out=out, **options)
    assert_close(backend.host(out), expected, batch.q.dtype)


def test_table_rows_may_be_further_apart_than_they_are_long(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 90, 16], [5, 1, 16])
    wide = np.full((3, batch.block_tables.shape[1] + 5), -1, np.int32)
    wide[:, : batch.block_tables.shape[1]] = batch.block_tables
    batch.block_tables = wide[:, : batch.block_tables.shape[1]]
    check_batch(backend, batch)


def test_out_may_be_a_slice_of_the_buffer_that_q_is_a_slice_of(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 90, 16], [5, 1, 16])
    packed = poison((22, 8, 64), np.float32)
    packed[:, :4] = batch.q
    expected, _ = batch.reference()
    _, *rest = batch.on(backend)[0]
    q, out = backend.arrays(packed[:, :4], packed[:, 4:])
    pagedattn.paged_attention(q, *rest, query_start_loc=backend.array(_starts(batch)), out=out)
    assert_close(backend.host(out), expected, np.float32)
    assert_same_bytes(backend.host(q), batch.q)


def test_where_the_blocks_lie_does_not_change_a_bit(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 700, 16], [5, 1, 16], dtype=np.float16)
    args, options = batch.on(backend)
    one = backend.host(pagedattn.paged_attention(*args, **options))
    order = rng.permutation(len(batch.k_cache))
    for name in ("k_cache", "v_cache"):
        moved = np.empty_like(getattr(batch, name))
        moved[order] = getattr(batch, name)
        setattr(batch, name, moved)
    named = (batch.block_tables >= 0) & (batch.block_tables < len(order))
    batch.block_tables = np.where(named, order[np.where(named, batch.block_tables, 0)], batch.block_tables)
    batch.block_tables = batch.block_tables.astype(np.int32)
    args, options = batch.on(backend)
    other = backend.host(pagedattn.paged_attention(*args, **options))
    assert_same_bytes(one, other)


def test_attention_over_disjoint_keys_merges_to_attention_over_all(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    # Cascade attention: a shared prefix without the causal mask, each sequence's own tokens with it.
    batch = make_batch(rng, [64, 80, 51], [4, 16, 1], shared_prefix=2)
    expected, expected_lse = batch.reference()
    (q, k, v, _, _), options = batch.on(backend)
    starts, lens, tables = _starts(batch), batch.seq_lens, batch.block_tables
    prefix_args = backend.arrays(tables[:, :2], np.full(3, 32, np.int32))
    suffix_args = backend.arrays(tables[:, 2:], lens - 32)
    prefix = pagedattn.paged_attention(q, k, v, *prefix_args, causal=False, return_lse=True, **options)
    suffix = pagedattn.paged_attention(q, k, v, *suffix_args, return_lse=True, **options)
    out, lse = pagedattn.merge_states([prefix[0], suffix[0]], [prefix[1], suffix[1]])
    assert len(starts) == 4
    assert_close(backend.host(out), expected, np.float32)
    assert_lse_close(backend.host(lse), expected_lse)


# Rows of a KV head that read the cache directly, in panels of up to 6, and one more; of one token and of several.
@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", [("float32", "float32"), *TENSOR_CORE_KINDS], ids="-".join)
def test_any_few_rows_match_the_reference_on_the_cpu(
    rng: np.random.Generator, kind: tuple[str, str], tokens: int
) -> None:
    dtype, kv_dtype = (DTYPES[name] for name in kind)
    choices: list[dict[str, Any]] = [{}, {"window": 3}, {"window": 50}, {"softcap": 7.0}, {"causal": False}]
    for group in range(1, 18 // tokens + 1):
        shape: dict[str, Any] = {
            "num_q_heads": 2 * group,
            "num_kv_heads": 2,
            "head_dim": int(rng.choice([40, 64, 128])),
        }
        seq_lens = [tokens, 61, 64, int(rng.integers(65, 400))]
        shape |= {"dtype": dtype, "kv_dtype": kv_dtype, **scale_for(kv_dtype, rng, 2, dtype)}
        batch = make_batch(rng, seq_lens, [tokens] * 4, **shape, **choices[rng.integers(len(choices))])
        check_batch(NumpyBackend(), batch, deterministic=bool(rng.integers(2)))


# Keys that lie evenly in groups of 16, of 8, and not at all; windows that begin anywhere in a block.
@pytest.mark.parametrize("block_size", [1, 7, 8, 16, 24, 48, 128])
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved NHD", "padded", "odd rows"])
@pytest.mark.parametrize(
    "kind", [("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3"), ("float16", "float8_e5m2")], ids="-".join
)
def test_few_rows_are_served_from_any_blocks_on_the_cpu(
    rng: np.random.Generator, kind: tuple[str, str], block_size: int, layout: str
) -> None:
    dtype, kv_dtype = (DTYPES[name] for name in kind)
    for tokens in (1, 4):
        batch = make_batch(
            rng,
            [int(rng.integers(96, 200)), 300, 257],
            [tokens] * 3,
            num_q_heads=int(rng.choice([3, 12, 15])),
            num_kv_heads=3,
            head_dim=int(rng.choice([32, 64, 96, 256])),
            block_size=block_size,
            layout=layout,
            dtype=dtype,
            kv_dtype=kv_dtype,
            window=[None, int(rng.integers(1, 200))][int(rng.integers(2))],
            **scale_for(kv_dtype, rng, 3, dtype),
        )
        check_batch(NumpyBackend(), batch)


# Prompts, chunks and single tokens in one batch: more rows than one tile, and head sizes of whole and broken vectors.
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128])
@pytest.mark.parametrize("group", [1, 5, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_prompts_on_the_cpu_match_the_reference_beside_chunks_and_decodes(
    rng: np.random.Generator, dtype: str, group: int, head_dim: int
) -> None:
    choices: list[dict[str, Any]] = [{}, {"window": 33}, {"softcap": 7.0}, {"causal": False}, {"scale": -0.1}]
    batch = make_batch(
        rng,
        [203, 150, 16, 70],
        [203, 33, 1, 16],
        num_q_heads=2 * group,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        **choices[rng.integers(len(choices))],
    )
    expected, expected_lse = batch.reference()
    args, options = batch.on(NumpyBackend())
    out, lse = pagedattn.paged_attention(*args, **options, return_lse=True)
    assert_close(out, expected, DTYPES[dtype])
    assert_lse_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_no_number_reaches_on_the_cpu_only_the_rows_that_see_it(
    rng: np.random.Generator, dtype: str, bad: float
) -> None:
    batch = make_batch(rng, [150], [150], dtype=DTYPES[dtype])
    expected, _ = batch.reference()
    batch.v_cache[batch.block_tables[0, 100 // 16], 100 % 16] = bad
    args, options = batch.on(NumpyBackend())
    result = pagedattn.paged_attention(*args, **options)
    assert_close(result[:100], expected[:100], DTYPES[dtype])
    assert not np.isfinite(result[100:].astype(np.float32)).any()


@pytest.mark.parametrize(
    "kind",
    [
        ("float32", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float8_e5m2"),
        ("float16", "float8_e5m2"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_an_infinite_value_reaches_on_the_cpu_only_its_dimension(
    rng: np.random.Generator, group: int, kind: tuple[str, str]
) -> None:
    dtype, kv_dtype = kind
    shape: dict[str, Any] = {"num_q_heads": 2 * group, "num_kv_heads": 2, "head_dim": 64}
    batch = make_batch(rng, [150, 130], **shape, dtype=DTYPES[dtype], kv_dtype=DTYPES[kv_dtype])
    expected, _ = batch.reference()
    batch.v_cache[batch.block_tables[0, 100 // 16], 100 % 16, 1, 6] = np.inf
    args, options = batch.on(NumpyBackend())
    result = pagedattn.paged_attention(*args, **options).astype(np.float64)
    assert np.isposinf(result[0, group:, 6]).all()
    result[0, group:, 6] = expected[0, group:, 6]
    assert_close(result.astype(DTYPES[dtype]), expected, DTYPES[dtype])


def test_a_nan_in_one_sequence_stays_in_that_sequence(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 90, 16], [5, 1, 16], dtype=np.float16)
    expected, _ = batch.reference()
    batch.v_cache[batch.block_tables[1, 0], 3] = np.nan
    args, options = batch.on(backend)
    result = backend.host(pagedattn.paged_attention(*args, **options))
    assert np.isnan(result[5]).all()
    rest = np.delete(np.arange(22), 5)
    assert_close(result[rest], expected[rest], np.float16)


def test_inputs_may_be_read_only(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 90, 16], [5, 1, 16], alibi_slopes=np.ones(4, np.float32))
    expected, _ = batch.reference()
    args, options = batch.on(NumpyBackend())
    for array in (*args, options["query_start_loc"], options["alibi_slopes"]):
        array.flags.writeable = False
    assert_close(pagedattn.paged_attention(*args, **options), expected, np.float32)


def test_reference_and_operation_disagree_if_one_key_is_left_out(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    # The bars can fail: dropping one of 300 keys is well outside them.
    batch = make_batch(rng, [300], dtype=np.float16)
    args, options = batch.on(backend)
    result = backend.host(pagedattn.paged_attention(*args, **options))
    shorter = reference.paged_attention(
        batch.q, batch.k_cache, batch.v_cache, batch.block_tables, batch.seq_lens - 1, **batch.options
    )[0]
    with pytest.raises(AssertionError):
        assert_close(result, shorter, np.float16)


def _starts(batch: Batch) -> np.ndarray:
    assert batch.query_start_loc is not None
    return batch.query_start_loc


def test_scores_use_the_whole_of_q_and_k(backend: NumpyBackend, rng: np.random.Generator) -> None:
    # One-hot keys tell which component of q a kernel skipped or swapped.
    dim = 72
    q = normal(rng, (1, 1, dim), np.float32)
    keys = (10 * np.eye(dim, dtype=np.float32)).reshape(9, 8, 1, dim)
    values = np.eye(dim, dtype=np.float32).reshape(9, 8, 1, dim)
    args: tuple[Array, ...] = backend.arrays(
        q, keys, values, np.arange(9, dtype=np.int32)[None], np.array([dim], np.int32)
    )
    weights = np.exp(q[0, 0].astype(np.float64))
    result = backend.host(pagedattn.paged_attention(*args, scale=0.1))
    assert_close(result, (weights / weights.sum())[None, None], np.float32)


def test_infinite_keys_whose_scores_are_minus_infinity_get_no_weight_in_a_prompt(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    # The first rows see no other keys in the tiles before, and must find those behind.
    shape = {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 128, "dtype": DTYPES["bfloat16"]}
    batch = make_batch(rng, [384], [129], **shape)
    batch.q[..., 0] = np.abs(batch.q[..., 0].astype(np.float32)) + 0.5
    blocks = batch.block_tables[0, 128 // 16 : 256 // 16]
    batch.k_cache[blocks, :, :, 0] = -np.inf
    check_batch(backend, batch)
