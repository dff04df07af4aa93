"""The same input gives the same bits; with deterministic=True whatever else is in the batch.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pagedattn
import pytest
from accuracy import assert_same_bytes
from backends import DTYPES, CupyBackend, NumpyBackend
from batches import Batch, make_batch

# (length, query tokens): long and short decode, speculation, chunk and prefill.
SEQUENCES = [(3000, 1), (17, 1), (900, 5), (700, 64), (130, 130), (1, 1), (64, 1)]


def mixed_batch(rng: np.random.Generator, dtype: str, kv_dtype: str) -> Batch:
    seq_lens, query_lens = map(list, zip(*SEQUENCES, strict=True))
    return make_batch(
        rng, seq_lens, query_lens, num_q_heads=8, num_kv_heads=2, dtype=DTYPES[dtype], kv_dtype=DTYPES[kv_dtype]
    )


def subset(batch: Batch, chosen: list[int]) -> Batch:
    """Return the batch of some of the sequences, in the order given."""
    assert batch.query_start_loc is not None
    starts = batch.query_start_loc
    lens = np.diff(starts)[chosen]
    rows = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in chosen])
    return replace(
        batch,
        q=batch.q[rows],
        block_tables=batch.block_tables[chosen],
        seq_lens=batch.seq_lens[chosen],
        query_start_loc=np.concatenate([[0], np.cumsum(lens)]).astype(np.int32),
    )


def results(backend: NumpyBackend, batch: Batch, **more: bool) -> tuple[np.ndarray, np.ndarray]:
    args, options = batch.on(backend)
    out, lse = pagedattn.paged_attention(*args, return_lse=True, **options, **more)
    return backend.host(out), backend.host(lse)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float8_e4m3")]
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_call_gives_the_same_bits_every_time(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, kv_dtype: str, deterministic: bool
) -> None:
    batch = mixed_batch(rng, dtype, kv_dtype)
    out, lse = results(backend, batch, deterministic=deterministic)
    for _ in range(4):
        again, lse_again = results(backend, batch, deterministic=deterministic)
        assert_same_bytes(again, out)
        assert_same_bytes(lse_again, lse)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("bfloat16", "bfloat16"), ("float16", "float8_e4m3")])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "query_len"), [(8, 2, 16), (64, 1, 1), (32, 8, 1)])
def test_sums_of_two_parts_have_the_same_bits_whichever_comes_first(
    cuda: CupyBackend,
    rng: np.random.Generator,
    dtype: str,
    kv_dtype: str,
    num_q_heads: int,
    num_kv_heads: int,
    query_len: int,
) -> None:
    # Lengths such that about as many items as there are multiprocessors are shared by two of these.
    seq_lens = [int(n) for n in rng.integers(700, 1500, 120 // min(num_kv_heads, 2))]
    batch = make_batch(
        rng,
        seq_lens,
        [query_len] * len(seq_lens),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        dtype=DTYPES[dtype],
        kv_dtype=DTYPES[kv_dtype],
    )
    out, lse = results(cuda, batch)
    for _ in range(20):
        again, lse_again = results(cuda, batch)
        assert_same_bytes(again, out)
        assert_same_bytes(lse_again, lse)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float8_e4m3")]
)
def test_deterministic_results_do_not_depend_on_the_rest_of_the_batch(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, kv_dtype: str
) -> None:
    batch = mixed_batch(rng, dtype, kv_dtype)
    assert batch.query_start_loc is not None
    starts = batch.query_start_loc
    out, lse = results(backend, batch, deterministic=True)
    for b in range(len(SEQUENCES)):
        others = [int(i) for i in rng.permutation([i for i in range(len(SEQUENCES)) if i != b])[: rng.integers(4)]]
        place = int(rng.integers(len(others) + 1))
        chosen = [*others[:place], b, *others[place:]]
        smaller = subset(batch, chosen)
        assert smaller.query_start_loc is not None
        rows = slice(smaller.query_start_loc[place], smaller.query_start_loc[place + 1])
        again, lse_again = results(backend, smaller, deterministic=True)
        assert_same_bytes(again[rows], out[starts[b] : starts[b + 1]], f"sequence {b} among {chosen}")
        assert_same_bytes(lse_again[rows], lse[starts[b] : starts[b + 1]], f"lse of sequence {b} among {chosen}")


def test_deterministic_results_do_not_depend_on_the_number_of_threads(rng: np.random.Generator) -> None:
    batch = mixed_batch(rng, "float32", "float32")
    threads = pagedattn.get_num_threads()
    try:
        pagedattn.set_num_threads(1)
        out, lse = results(NumpyBackend(), batch, deterministic=True)
        for num_threads in (2, 3, 7):
            pagedattn.set_num_threads(num_threads)
            again, lse_again = results(NumpyBackend(), batch, deterministic=True)
            assert_same_bytes(again, out)
            assert_same_bytes(lse_again, lse)
    finally:
        pagedattn.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("bfloat16", "bfloat16"), ("float16", "float8_e5m2")])
def test_an_infinite_value_of_a_head_leaves_the_bits_of_other_heads_to_themselves(
    rng: np.random.Generator, dtype: str, kv_dtype: str
) -> None:
    """A head that tile registers cannot compute is computed again; heads that share its work item were, too."""
    heads, length = 8, 256
    cache = pagedattn.KVCache(length // 16, 16, heads, 64, kv_dtype)
    k_cache, v_cache = cache.k_caches[0], cache.v_caches[0]
    for array in (k_cache, v_cache):
        array[...] = rng.standard_normal(array.shape, np.float32).astype(array.dtype)
    q = rng.standard_normal((1, 4 * heads, 64), np.float32).astype(DTYPES[dtype])
    tables, lens = rng.permutation(length // 16).astype(np.int32)[None], np.array([length], np.int32)

    def attend(num_threads: int) -> np.ndarray:
        pagedattn.set_num_threads(num_threads)
        return pagedattn.paged_attention(q, k_cache, v_cache, tables, lens, deterministic=True)

    threads = pagedattn.get_num_threads()
    try:
        others = np.arange(4 * heads) // 4 != 5
        finite = attend(1)
        v_cache[3, 2, 5, 7] = np.inf
        out = attend(1)
        assert np.isinf(out[0, ~others, 7].astype(np.float32)).all()
        assert np.isfinite(out[0, ~others, 8:].astype(np.float32)).all()
        assert_same_bytes(out[:, others], finite[:, others])
        for num_threads in (2, 3, 7):
            assert_same_bytes(attend(num_threads), out)
    finally:
        pagedattn.set_num_threads(threads)


def test_huge_queries_of_a_neighbour_do_not_change_the_bits_of_a_deterministic_prompt(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    # Tiles are filled with the queries of the next sequence, whose scores grow by far more from key to key.
    shape = {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 128, "dtype": DTYPES["bfloat16"]}
    batch = make_batch(rng, [2000, 2000], [100, 100], **shape)
    q = batch.q.astype(np.float32)
    q[90:100] *= 8
    q[100:] *= 1000
    batch.q = q.astype(batch.q.dtype)
    whole, _ = results(backend, batch, deterministic=True)
    alone, _ = results(backend, subset(batch, [0]), deterministic=True)
    assert_same_bytes(alone, whole[:100])
