"""gather_kv: pages back to contiguous keys and values, bit for bit or dequantised.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_same_bytes
from backends import DTYPES, FLOAT8_E4M3, FLOAT8_E5M2, Array, NumpyBackend, is_float8
from batches import LAYOUTS, Batch, is_poison, make_batch, output, scale_for

SEQ_LENS = [37, 0, 130, 16, 1]


def caches(rng: np.random.Generator, dtype: Any, layout: str, block_size: int = 16) -> Batch:
    """Return a batch whose caches hold SEQ_LENS tokens; its queries are of no interest here."""
    q_dtype = np.float16 if is_float8(dtype) else dtype
    return make_batch(
        rng, SEQ_LENS, SEQ_LENS, dtype=q_dtype, kv_dtype=dtype, layout=layout, block_size=block_size, causal=False
    )


def on(backend: NumpyBackend, batch: Batch) -> tuple[list[Array], dict[str, Any]]:
    args = backend.arrays(batch.k_cache, batch.v_cache, batch.block_tables, batch.seq_lens)
    return list(args), {"kv_dtype": backend.kv_dtype(batch.k_cache.dtype)}


def expected_rows(batch: Batch, num_rows: int, dtype: Any, **options: Any) -> list[np.ndarray]:
    """Return the reference's k and v over poison."""
    results = []
    for cache, scale in ((batch.k_cache, options.get("k_scale")), (batch.v_cache, options.get("v_scale"))):
        out = output((num_rows, cache.shape[2], cache.shape[3]), dtype).view
        places = {name: options.get(name) for name in ("seq_starts", "out_start_loc")}
        reference.gather_kv(cache, batch.block_tables, batch.seq_lens, out, scale=scale, **places)
        results.append(out)
    return results


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 3])
def test_pages_come_back_bit_for_bit(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, layout: str, block_size: int
) -> None:
    batch = caches(rng, DTYPES[dtype], layout, block_size)
    args, options = on(backend, batch)
    total = sum(SEQ_LENS)
    k, v = pagedattn.gather_kv(*args, total_tokens=total, **options)
    for actual, expected in zip((k, v), expected_rows(batch, total, DTYPES[dtype]), strict=True):
        assert_same_bytes(backend.host(actual), expected)


def test_on_the_host_the_lengths_say_how_many_rows_there_are(rng: np.random.Generator) -> None:
    batch = caches(rng, np.float16, "NHD")
    args, options = on(NumpyBackend(), batch)
    k, v = pagedattn.gather_kv(*args, **options)
    for actual, expected in zip((k, v), expected_rows(batch, sum(SEQ_LENS), np.float16), strict=True):
        assert_same_bytes(actual, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3", "float8_e5m2"])
def test_storage_comes_back_as_the_type_that_it_holds(rng: np.random.Generator, dtype: str) -> None:
    batch = caches(rng, DTYPES[dtype], "NHD")
    args, _ = on(NumpyBackend(), batch)
    stored = [cache.view(f"u{cache.itemsize}") for cache in args[:2]]
    typed = pagedattn.gather_kv(*stored, *args[2:], kv_dtype=dtype, dtype=dtype)
    for actual, expected in zip(typed, expected_rows(batch, sum(SEQ_LENS), DTYPES[dtype]), strict=True):
        assert actual.dtype == DTYPES[dtype]
        assert_same_bytes(actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", [FLOAT8_E4M3, FLOAT8_E5M2])
@pytest.mark.parametrize("layout", ["NHD", "interleaved HND"])
def test_float8_pages_are_dequantised_exactly(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, kv_dtype: np.dtype[Any], layout: str
) -> None:
    batch = caches(rng, kv_dtype, layout)
    args, options = on(backend, batch)
    total = sum(SEQ_LENS)
    for scales in (scale_for(kv_dtype, rng, 2), {"k_scale": 0.25, "v_scale": 1.37}, {}):
        moved = {name: backend.array(s) if isinstance(s, np.ndarray) else s for name, s in scales.items()}
        # Numbers travel as float32.
        exact = {name: np.float32(s) for name, s in scales.items()}
        k, v = pagedattn.gather_kv(*args, total_tokens=total, dtype=dtype, **moved, **options)
        for actual, expected in zip((k, v), expected_rows(batch, total, DTYPES[dtype], **exact), strict=True):
            assert_same_bytes(backend.host(actual), expected)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3"])
def test_given_outputs_are_filled_and_other_rows_left_as_they_were(
    backend: NumpyBackend, rng: np.random.Generator, strided: bool, dtype: str
) -> None:
    batch = caches(rng, DTYPES[dtype], "NHD")
    starts, places = np.array([5, 0, 130, 0, 0], np.int32), np.array([3, 40, 40, 41, 60, 62], np.int32)
    args, options = on(backend, batch)
    moved = dict(zip(("seq_starts", "out_start_loc"), backend.arrays(starts, places), strict=True))
    poisoned = [output((70, 2, 64), DTYPES[dtype], strided=strided) for _ in range(2)]
    outs = [backend.array(p.view) for p in poisoned]
    result = pagedattn.gather_kv(*args, out=tuple(outs), **moved, **options)
    assert result[0] is outs[0]
    assert result[1] is outs[1]
    expected = expected_rows(batch, 70, DTYPES[dtype], seq_starts=starts, out_start_loc=places)
    assert is_poison(expected[0][35:41]).all()
    for actual, rows, before in zip(outs, expected, poisoned, strict=True):
        assert_same_bytes(backend.host(actual), rows)
        assert before.gaps_untouched(backend.allocation(actual))


def test_tokens_from_seq_starts_follow_each_other(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = caches(rng, np.float16, "HND")
    starts = np.array([36, 0, 64, 15, 1], np.int32)
    args, options = on(backend, batch)
    k, v = pagedattn.gather_kv(*args, seq_starts=backend.array(starts), total_tokens=68, **options)
    for actual, expected in zip((k, v), expected_rows(batch, 68, np.float16, seq_starts=starts), strict=True):
        assert_same_bytes(backend.host(actual), expected)


def test_table_entries_before_seq_starts_are_not_read(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = caches(rng, np.float16, "NHD")
    starts = np.array([32, 0, 100, 3, 0], np.int32)
    expected = expected_rows(batch, 5 + 30 + 13 + 1, np.float16, seq_starts=starts)
    batch.block_tables[0, :2] = -1
    batch.block_tables[2, :6] = 2**31 - 1
    args, options = on(backend, batch)
    k, v = pagedattn.gather_kv(*args, seq_starts=backend.array(starts), total_tokens=49, **options)
    assert_same_bytes(backend.host(k), expected[0])
    assert_same_bytes(backend.host(v), expected[1])


def test_gathering_no_tokens_gives_empty_results(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [0, 0])
    args, options = on(backend, batch)
    k, v = pagedattn.gather_kv(*args, total_tokens=0, **options)
    assert k.shape == v.shape == (0, 2, 64)


@pytest.mark.parametrize("num_seqs", [1, 2, 3, 16, 17, 32, 33, 300])
@pytest.mark.parametrize("total", [64, 1024, 1500])
@pytest.mark.parametrize("placed", [False, True])
def test_any_number_of_sequences_shares_few_rows_or_many(
    backend: NumpyBackend, rng: np.random.Generator, num_seqs: int, total: int, placed: bool
) -> None:
    # Lengths that add up to the rows, some of them 0, behind starts of their own: entries all along the tables.
    kept = np.diff(np.concatenate([[0], np.sort(rng.integers(0, total + 1, num_seqs - 1)), [total]]))
    starts = (rng.integers(0, 400, num_seqs) * (rng.random(num_seqs) < 0.5)).astype(np.int32)
    batch = make_batch(
        rng, (kept + starts).tolist(), [int(n > 0) for n in kept + starts], dtype=np.float16, block_size=8
    )
    places = {"seq_starts": starts}
    rows = total
    if placed:
        gaps = rng.integers(0, 3, num_seqs + 1)
        places["out_start_loc"] = (np.concatenate([[0], np.cumsum(kept)]) + np.cumsum(gaps)).astype(np.int32)
        rows = int(places["out_start_loc"][-1])
    expected = expected_rows(batch, rows, np.float16, **places)
    args, options = on(backend, batch)
    outs = tuple(backend.array(output((rows, 2, 64), np.float16).view) for _ in range(2))
    moved = {name: backend.array(array) for name, array in places.items()}
    pagedattn.gather_kv(*args, out=outs, **moved, **options)
    for actual, wanted in zip(outs, expected, strict=True):
        assert_same_bytes(backend.host(actual), wanted)


def test_many_tokens_come_back(backend: NumpyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [3000, 1, 2500], [1, 1, 1], dtype=np.float16, head_dim=128)
    args, options = on(backend, batch)
    k, v = pagedattn.gather_kv(*args, total_tokens=5501, **options)
    for actual, expected in zip((k, v), expected_rows(batch, 5501, np.float16), strict=True):
        assert_same_bytes(backend.host(actual), expected)


@pytest.mark.parametrize("layout", ["NHD", "interleaved NHD", "HND", "packed heads"])
def test_more_tokens_than_a_processor_s_caches_keep_come_back(
    backend: NumpyBackend, rng: np.random.Generator, layout: str
) -> None:
    batch = make_batch(
        rng,
        [1501, 0, 1000, 3],
        [1, 1, 1, 1],
        dtype=np.float16,
        num_q_heads=8,
        num_kv_heads=8,
        head_dim=128,
        layout=layout,
    )
    args, options = on(backend, batch)
    starts = np.array([5, 0, 0, 1], np.int32)
    k, v = pagedattn.gather_kv(*args, seq_starts=backend.array(starts), total_tokens=2498, **options)
    for actual, expected in zip((k, v), expected_rows(batch, 2498, np.float16, seq_starts=starts), strict=True):
        assert_same_bytes(backend.host(actual), expected)
