"""Decode where each KV head, or each pair of them, has a line of work of its own (cuda/head_lines.cuh).

Which it is follows from the mean of the lengths.  Sequences are too many for the kernel for few sequences.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_same_bytes
from attention_check import check_batch
from backends import DTYPES, Array, CupyBackend
from batches import Batch, make_batch, poison, scale_for
from cuda_graphs import CapturedAttention, workspace_for
from pairwise import case_id

pytestmark = pytest.mark.gpu

HEADS: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 4, "head_dim": 128}
OPTIONS: list[dict[str, Any]] = [
    {"window": 500},
    {"softcap": 2.0},
    {"alibi_slopes": 0.1},
    {"sinks": 1.0},
    {"causal": False},
    {"block_size": 8},
    {"block_size": 24},
    {"layout": "HND"},
    {"query_lens": [2, 0, 5, 1]},
    {"num_q_heads": 4},
    {"num_q_heads": 64},
    {"num_q_heads": 20},
    {"num_q_heads": 12, "num_kv_heads": 6},
    {"num_q_heads": 16, "num_kv_heads": 16},
]


def middle(rng: np.random.Generator, count: int = 40) -> list[int]:
    """Return lengths for which each KV head has a line, one of them far above their mean."""
    return [*(int(n) for n in rng.integers(300, 1400, count - 2)), 0, 9000]


# From more tokens in the mean than this, a pair has a line.
LONG = {128: 3072, 192: 1536, 256: 768}


def long_batch(rng: np.random.Generator, count: int = 60, **more: Any) -> Batch:
    """Return a batch for which each pair of KV heads has a line; most blocks are the same for all sequences."""
    shape = {**HEADS, "num_kv_heads": 8, **more}
    least = LONG[shape["head_dim"]]
    seq_lens = [int(n) for n in rng.integers(least + 80, least + 230, count - 3)]
    return make_batch(rng, [*seq_lens, least + 130, least + 130, 7000], shared_prefix=least // 16 - 2, **shape)


@pytest.mark.parametrize(
    ("kind", "head_dim"),
    [
        (("float16", "float16"), 128),
        (("bfloat16", "bfloat16"), 128),
        (("bfloat16", "float8_e4m3"), 128),
        (("bfloat16", "bfloat16"), 192),
        (("float16", "float16"), 256),
        (("bfloat16", "float8_e4m3"), 256),
        (("float16", "float8_e5m2"), 256),
    ],
)
def test_sequences_of_middle_length_match_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, kind: tuple[str, str], head_dim: int
) -> None:
    dtype, kv_dtype = (DTYPES[name] for name in kind)
    scales: dict[str, Any] = scale_for(kv_dtype, rng, HEADS["num_kv_heads"], dtype)
    seq_lens = [n + 500 for n in middle(rng)]
    shape: dict[str, Any] = {**HEADS, "head_dim": head_dim}
    check_batch(cuda, make_batch(rng, seq_lens, dtype=dtype, kv_dtype=kv_dtype, **shape, **scales))


@pytest.mark.parametrize("head_dim", [128, 192, 256])
@pytest.mark.parametrize("group", [2, 8])  # 10 and 40 rows at most
@pytest.mark.parametrize("deterministic", [False, True])
def test_several_query_tokens_match_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, head_dim: int, group: int, deterministic: bool
) -> None:
    seq_lens = middle(rng)
    query_lens = [min(n, (2, 0, 5, 1)[i % 4]) for i, n in enumerate(seq_lens)]
    shape: dict[str, Any] = {"num_q_heads": 4 * group, "num_kv_heads": 4, "head_dim": head_dim}
    batch = make_batch(rng, seq_lens, query_lens, dtype=DTYPES["bfloat16"], **shape)
    check_batch(cuda, batch, max_query_len=5, deterministic=deterministic)


def test_short_sequences_of_many_rows_of_256_columns_match_the_reference(
    cuda: CupyBackend, rng: np.random.Generator
) -> None:
    seq_lens = [*(int(n) for n in rng.integers(40, 200, 60)), 0, 3, 5000]
    query_lens = [min(n, 5) for n in seq_lens]
    shape: dict[str, Any] = {"num_q_heads": 64, "num_kv_heads": 8, "head_dim": 256}
    check_batch(cuda, make_batch(rng, seq_lens, query_lens, dtype=np.float16, **shape), max_query_len=5)


@pytest.mark.parametrize("case", OPTIONS, ids=case_id)
def test_every_option_holds_for_heads_in_step(
    cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any]
) -> None:
    case = {**HEADS, **case}
    seq_lens = middle(rng)
    query_lens = case.pop("query_lens", None)
    a_head_each = {name: case[name] for name in ("alibi_slopes", "sinks") if name in case}
    case |= {name: np.full(case["num_q_heads"], value, np.float32) for name, value in a_head_each.items()}
    lens = None if query_lens is None else [min(n, query_lens[i % 4]) for i, n in enumerate(seq_lens)]
    check_batch(cuda, make_batch(rng, seq_lens, lens, dtype=np.float16, **case), max_query_len=5)


@pytest.mark.parametrize("head_dim", LONG)
@pytest.mark.parametrize(("group", "deterministic"), [(1, False), (4, True), (9, False)])
def test_long_sequences_match_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, head_dim: int, group: int, deterministic: bool
) -> None:
    batch = long_batch(rng, dtype=np.float16, num_q_heads=8 * group, head_dim=head_dim)
    check_batch(cuda, batch, deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_a_graph_is_replayed_with_lengths_that_change_the_lines(
    cuda: CupyBackend, rng: np.random.Generator, head_dim: int
) -> None:
    def batch(mean: int) -> Batch:
        seq_lens = [int(n) for n in rng.integers(mean // 2, 3 * mean // 2, 60)]
        return make_batch(rng, seq_lens, dtype=np.float16, block_size=128, **{**HEADS, "head_dim": head_dim})

    captured = CapturedAttention(cuda, batch(1000))
    for mean in (100, 600, 2, 900, 380, 1000):
        captured.check(batch(mean))


def test_runs_on_one_workspace_give_the_same_bits(cuda: CupyBackend, rng: np.random.Generator) -> None:
    bfloat16 = {"dtype": DTYPES["bfloat16"]}
    batches = [make_batch(rng, middle(rng), **HEADS, **bfloat16), long_batch(rng, **bfloat16)]
    batches.append(make_batch(rng, [100] * 300, **HEADS, **bfloat16))
    calls = [batch.on(cuda) for batch in batches]
    workspace = workspace_for(cuda, calls)
    runs: list[list[tuple[Array, ...]]] = [
        [cuda.arrays(poison(b.q.shape, b.q.dtype), poison(b.q.shape[:2], np.float32)) for _ in range(10)]
        for b in batches
    ]
    cuda.synchronize()
    for i in range(10):
        for (args, options), outputs in zip(calls, runs, strict=True):
            out, lse = outputs[i]
            pagedattn.paged_attention(*args, out=out, lse=lse, workspace=workspace, **options)
    for outputs in runs:
        first = [cuda.host(array) for array in outputs[0]]
        for run in outputs[1:]:
            for array, expected, what in zip(run, first, ("out", "lse"), strict=True):
                assert_same_bytes(cuda.host(array), expected, what)
