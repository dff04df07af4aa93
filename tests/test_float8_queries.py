"""Float8 queries: over a float8 cache of their type, with scales of their own, in whatever storage.

Shapes and options are the business of the tests that take `TENSOR_CORE_KINDS`.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_close, assert_same_bytes
from attention_check import assert_result_close, check_batch, types
from backends import BFLOAT16, DTYPES, CupyBackend, NumpyBackend
from batches import Batch, make_batch, poison
from test_decode_kernels import PREAMBLE, run
from test_prefill_shapes import require_hopper

FLOAT8 = ["float8_e4m3", "float8_e5m2"]
# Decode, speculation and prefill share a call.
SEQ_LENS, QUERY_LENS = [300, 40, 700, 90], [200, 1, 4, 90]


def mixed_batch(rng: np.random.Generator, dtype: str, head_dim: int = 128, **options: Any) -> Batch:
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": head_dim, **types(rng, (dtype, dtype), 2)}
    return make_batch(rng, SEQ_LENS, QUERY_LENS, **{**shape, **options})


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("out_dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [56, 64, 96, 128, 192, 256])
def test_results_are_of_the_type_of_out(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, out_dtype: Any, head_dim: int
) -> None:
    check_batch(backend, mixed_batch(rng, dtype, head_dim), out_dtype=out_dtype)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_results_are_bfloat16_by_default(backend: NumpyBackend, rng: np.random.Generator, dtype: str) -> None:
    batch = mixed_batch(rng, dtype)
    args, options = batch.on(backend)
    out = backend.host(pagedattn.paged_attention(*args, **options))
    assert out.dtype == BFLOAT16
    assert_result_close(out, batch.reference()[0], BFLOAT16)


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("form", ["absent", "number", "one", "per head"])
def test_every_form_of_scale_of_queries_is_served(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, form: str
) -> None:
    scales: dict[str, Any] = {
        "absent": None,
        "number": 0.5,
        "one": np.array([1.7], np.float32),
        "per head": np.array([1.7, 0.01], np.float32),
    }
    check_batch(backend, mixed_batch(rng, dtype, q_scale=scales[form]))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("query_len", [1, 90])
def test_every_code_of_a_query_is_decoded_exactly(backend: NumpyBackend, dtype: str, query_len: int) -> None:
    # Query head h has code h in its first dimension, and a key of one value: the log-sum-exp is their product.
    codes = np.arange(256, dtype=np.uint8).view(DTYPES[dtype])
    codes = np.where(np.isfinite(codes.astype(np.float32)), codes, np.zeros(1, codes.dtype)).astype(codes.dtype)
    q = np.zeros((query_len, 256, 64), codes.dtype)
    q[..., 0] = codes
    k_cache = np.zeros((6, 16, 32, 64), codes.dtype)
    k_cache[..., 0] = 1
    tables, starts = np.arange(6, dtype=np.int32)[None], np.array([0, query_len], np.int32)
    args = backend.arrays(q, k_cache, k_cache.copy(), tables, np.array([query_len], np.int32))
    _, lse = pagedattn.paged_attention(
        *args,
        query_start_loc=backend.array(starts),
        window=1,
        scale=2.0**-6,
        kv_dtype=backend.kv_dtype(codes.dtype),
        return_lse=True,
    )
    expected = np.broadcast_to(codes.astype(np.float64) / 64, (query_len, 256))
    np.testing.assert_allclose(backend.host(lse), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_storage_arrays_give_the_bits_of_typed_arrays(rng: np.random.Generator, dtype: str) -> None:
    batch = mixed_batch(rng, dtype)
    (q, k, v, tables, lens), options = batch.on(NumpyBackend())
    typed = pagedattn.paged_attention(q, k, v, tables, lens, **options)
    q, k, v = (array.view(np.uint8) for array in (q, k, v))
    raw = pagedattn.paged_attention(q, k, v, tables, lens, kv_dtype=dtype, **options)
    assert raw.dtype == BFLOAT16
    assert_same_bytes(raw, typed)


def test_torch_queries_are_read_in_place(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    batch = mixed_batch(rng, "float8_e4m3")
    (q, k, v, tables, lens), options = batch.on(NumpyBackend())
    q, k, v = (torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn) for array in (q, k, v))
    tables, lens = map(torch.from_numpy, (tables, lens))
    options = {name: torch.from_numpy(value) for name, value in options.items()}
    out = pagedattn.paged_attention(q, k, v, tables, lens, **options)
    assert out.dtype == torch.bfloat16
    assert_close(out.float().numpy(), batch.reference()[0], BFLOAT16)


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("first", [1, 2, 4, 8])
def test_queries_may_begin_at_any_byte(backend: NumpyBackend, rng: np.random.Generator, dtype: str, first: int) -> None:
    batch = mixed_batch(rng, dtype, 64)
    wide = poison((*batch.q.shape[:2], 64 + first), batch.q.dtype)
    wide[..., first:] = batch.q
    batch.q = wide[..., first:]
    check_batch(backend, batch)


def test_scores_may_be_products_times_a_negative_number(backend: NumpyBackend, rng: np.random.Generator) -> None:
    # Scores are compared before they are scaled only where that keeps their order.  Such scales are refused where they
    # are read in advance, which those in CUDA memory are not.
    for q_scale in ([-0.5, 0.7], [0.0, 1.0]) if backend.is_cuda else ():
        check_batch(backend, mixed_batch(rng, "float8_e4m3", q_scale=np.array(q_scale, np.float32)))
    check_batch(backend, mixed_batch(rng, "float8_e4m3", scale=-0.1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize(
    ("head_dim", "kernel"),
    [
        (64, "products_{}_d64"),
        (80, "products_{}_d96"),
        (128, "products_{}_d128"),
        (160, "{}_d192"),
        (192, "products_{}_d192"),
        (256, "{}_d256"),
    ],
)
def test_on_hopper_prompts_are_multiplied_in_float8(
    cuda: CupyBackend, rng: np.random.Generator, head_dim: int, kernel: str, dtype: str
) -> None:
    require_hopper(cuda)
    check_batch(cuda, mixed_batch(rng, dtype, head_dim))
    assert pagedattn.last_kernel().split("+")[1] == "hopper_prefill_" + kernel.format(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [128, 192])
def test_sums_over_many_keys_lose_none(cuda: CupyBackend, rng: np.random.Generator, head_dim: int) -> None:
    # The tensor cores drop what is 2^13 below a sum, which all weights are, together, far above.
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": head_dim, **types(rng, ("float8_e4m3", "float8_e4m3"), 2)}
    batch = make_batch(rng, [20000], [100], scale=0.001, **shape)
    batch.v_cache[...] = (batch.v_cache.astype(np.float32) * 0.25 + 1).astype(batch.v_cache.dtype)
    args, options = batch.on(cuda)
    out = cuda.host(pagedattn.paged_attention(*args, **options)).astype(np.float64)
    expected = batch.reference()[0]
    assert np.linalg.norm(out - expected) <= 4e-3 * np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [128, 192])
@pytest.mark.parametrize("factor", [0.3, 0.6, 2.0])
def test_scores_of_float8_may_rise_towards_the_first_keys(
    cuda: CupyBackend, rng: np.random.Generator, factor: float, head_dim: int
) -> None:
    # Tiles come from the last to the first, and weights that outgrow a float8 are computed anew.  Groups of five leave
    # rows of a tile without a token.
    shape = {"num_q_heads": 10, "num_kv_heads": 2, "head_dim": head_dim}
    batch = make_batch(rng, [2000, 900], [100, 300], **shape, **types(rng, ("float8_e4m3", "float8_e4m3"), 2))
    common = rng.standard_normal(head_dim)
    batch.q = (batch.q.astype(np.float32) * 0.25 + common).astype(batch.q.dtype)
    for sequence, end in ((0, 1100), (1, 333)):
        tokens = np.arange(end)
        place = batch.block_tables[sequence, tokens // 16], tokens % 16
        keys = batch.k_cache[place].astype(np.float32) + factor * common
        batch.k_cache[place] = keys.astype(batch.k_cache.dtype)
    check_batch(cuda, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [128, 192])
def test_the_same_float8_queries_give_the_same_bits(cuda: CupyBackend, rng: np.random.Generator, head_dim: int) -> None:
    args, options = make_batch(
        rng,
        [3000, 700, 900, 9000],
        [500, 700, 1, 80],
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        **types(rng, ("float8_e4m3", "float8_e4m3"), 8),
    ).on(cuda)
    runs = [cuda.host(pagedattn.paged_attention(*args, **options)) for _ in range(10)]
    for other in runs[1:]:
        assert_same_bytes(other, runs[0])


GENERIC = (
    PREAMBLE
    + """
import test_float8_queries as queries
from backends import BFLOAT16

for dtype in queries.FLOAT8:
    for head_dim in (56, 64, 96, 128, 256):
        queries.test_results_are_of_the_type_of_out(cuda, rng, dtype, BFLOAT16, head_dim)
    for form in ("absent", "number", "per head"):
        queries.test_every_form_of_scale_of_queries_is_served(cuda, rng, dtype, form)
    queries.test_every_code_of_a_query_is_decoded_exactly(cuda, dtype, 90)
    assert pagedattn.last_kernel() == f"mma_{dtype}_d64_many_rows", pagedattn.last_kernel()
    queries.test_queries_may_begin_at_any_byte(cuda, rng, dtype, 1)
"""
)


@pytest.mark.gpu
def test_generic_kernels_serve_float8_queries_where_they_are_asked_for(cuda: CupyBackend) -> None:
    result = run(GENERIC, "sm_80")
    assert result.returncode == 0, result.stdout + result.stderr
