"""`max_query_len`: the most query tokens that a sequence has, for those who know it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_close, assert_lse_close, assert_same_bytes
from attention_check import check_batch
from backends import CupyBackend, NumpyBackend
from batches import make_batch, poison

SEQ_LENS = [700, 40, 5, 3000, 64, 1, 200]
KINDS = [(np.float32, 64), (np.float16, 64), (np.float16, 128)]


@pytest.mark.parametrize("max_query_len", [5, 6, 1000], ids=["the most", "more", "more than all tokens"])
@pytest.mark.parametrize(("dtype", "head_dim"), KINDS)
def test_results_are_the_same_with_a_bound(
    backend: NumpyBackend, rng: np.random.Generator, dtype: Any, head_dim: int, max_query_len: int
) -> None:
    query_lens = [5, 0, 3, 1, 5, 1, 4]
    batch = make_batch(rng, SEQ_LENS, query_lens, num_q_heads=8, head_dim=head_dim, dtype=dtype)
    check_batch(backend, batch, max_query_len=max_query_len)


def test_a_bound_is_no_news_where_every_sequence_has_one_query_token(
    backend: NumpyBackend, rng: np.random.Generator
) -> None:
    check_batch(backend, make_batch(rng, SEQ_LENS), max_query_len=1)
    check_batch(backend, make_batch(rng, SEQ_LENS), max_query_len=7)


@pytest.mark.gpu
def test_a_small_bound_needs_one_kernel_where_two_are_needed_without(
    cuda: CupyBackend, rng: np.random.Generator
) -> None:
    batch = make_batch(rng, [30, 300] * 20, [4] * 40, num_q_heads=8, num_kv_heads=4, dtype=np.float16)
    args, options = batch.on(cuda)
    names = []
    for bound in ({}, {"max_query_len": 4}):
        pagedattn.paged_attention(*args, **options, **bound)
        names.append(pagedattn.last_kernel())
    pagedattn.paged_attention(args[0][:40], *args[1:])  # decode
    assert names[1] == pagedattn.last_kernel() != names[0]


@pytest.mark.gpu
def test_prompts_of_one_length_need_one_kernel(cuda: CupyBackend, rng: np.random.Generator) -> None:
    shape: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 4, "dtype": np.float16}
    batch = make_batch(rng, [130, 300, 90], [90] * 3, **shape)
    check_batch(cuda, batch, max_query_len=90)
    names = [pagedattn.last_kernel()]
    check_batch(cuda, batch)
    names.append(pagedattn.last_kernel())
    check_batch(cuda, make_batch(rng, [300], [90], **shape))
    names.append(pagedattn.last_kernel())
    assert names[0] == names[2]
    assert names[0] in names[1].split("+")
    assert names[0] != names[1]


@pytest.mark.gpu
def test_padding_of_prompts_of_one_length_may_stand_in_for_shorter_ones(
    cuda: CupyBackend, rng: np.random.Generator
) -> None:
    # As in a captured graph: more rows in q than the starts say, and sequences of a few rows or none among the others.
    query_lens = [90, 1, 0, 7]
    batch = make_batch(rng, [130, 300, 20, 70], query_lens, num_q_heads=8, num_kv_heads=4, dtype=np.float16)
    args, options = batch.on(cuda)
    padded = cuda.cupy.zeros((360, *batch.q.shape[1:]), np.float16)
    padded[: len(batch.q)] = args[0]
    out = pagedattn.paged_attention(padded, *args[1:], **options, max_query_len=90, check=False)
    assert_close(cuda.host(out)[: len(batch.q)], batch.reference()[0], np.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("dtype", "head_dim"), KINDS)
@pytest.mark.parametrize("num_q_heads", [4, 40], ids=["few rows", "many rows"])
def test_a_sequence_beyond_the_bound_is_left_out_and_the_others_are_not(
    cuda: CupyBackend, rng: np.random.Generator, dtype: Any, head_dim: int, num_q_heads: int, deterministic: bool
) -> None:
    # The workspace has room for the partial results of one row, and what lies behind it stays as it is.
    query_lens = [1, 1, 0, 70, 1, 1, 2]
    shape: dict[str, Any] = {"num_q_heads": num_q_heads, "head_dim": head_dim, "dtype": dtype}
    batch = make_batch(rng, SEQ_LENS, query_lens, **shape)
    args, options = batch.on(cuda)
    options |= {"max_query_len": 1, "deterministic": deterministic}
    size = pagedattn.paged_attention_workspace_size(*args, **options)
    memory = cuda.cupy.zeros(size + 4096, np.uint8)
    memory[size:] = 0x5A
    out, lse = cuda.arrays(poison(batch.q.shape, dtype), poison(batch.q.shape[:2], np.float32))
    pagedattn.paged_attention(*args, out=out, lse=lse, workspace=memory[:size], check=False, **options)
    assert (memory[size:] == 0x5A).all()
    expected, expected_lse = batch.reference()
    starts = batch.query_start_loc
    assert starts is not None
    for seq, query_len in enumerate(query_lens):
        rows = slice(starts[seq], starts[seq + 1])
        if query_len <= 1:
            assert_close(cuda.host(out)[rows], expected[rows], dtype)
            assert_lse_close(cuda.host(lse)[rows], expected_lse[rows])
        else:
            assert_same_bytes(cuda.host(out)[rows], poison(batch.q.shape, dtype)[rows])
            assert_same_bytes(cuda.host(lse)[rows], poison(batch.q.shape[:2], np.float32)[rows])


@pytest.mark.gpu
def test_the_workspace_of_a_bounded_call_is_no_larger_than_that_of_any(
    cuda: CupyBackend, rng: np.random.Generator
) -> None:
    batch = make_batch(rng, SEQ_LENS, [2] * 5 + [1, 2], dtype=np.float16)
    args, options = batch.on(cuda)
    sizes = [
        pagedattn.paged_attention_workspace_size(*args, **options, **bound)
        for bound in ({"max_query_len": 1}, {"max_query_len": 2}, {"max_query_len": 20}, {})
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
