"""The Hopper kernel for few sequences, whose blocks hand parts of results on to each other.

On other devices the generic kernels get the same batches.

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
from batches import make_batch, poison
from cuda_graphs import CapturedAttention, workspace_for
from pairwise import case_id

pytestmark = pytest.mark.gpu

HEADS: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
LENGTHS = {
    "alone": [[n] for n in (0, 1, 15, 16, 17, 128, 129, 1000, 2049, 9000)],
    "some": [[5, 0, 700], [128] * 8, [3000, 17, 1, 0, 16], [1, 6000], [0, 0]],
    "many": [[100 + 37 * i for i in range(32)], [4000] + [40] * 31, [40] * 31 + [4000]],
}
OPTIONS: list[dict[str, Any]] = [
    {"window": 7},
    {"window": 300},
    {"softcap": 2.0},
    {"alibi_slopes": 0.1},
    {"sinks": 1.0},
    {"causal": False},
    {"block_size": 8},
    {"block_size": 24},
    {"block_size": 64},
    {"layout": "HND"},
    {"layout": "one layer of many"},
    {"query_lens": [2, 1, 2]},
    {"query_lens": [0, 2, 1]},
    {"num_q_heads": 8},
    {"num_q_heads": 40},
    {"num_q_heads": 64},
    {"num_q_heads": 32, "num_kv_heads": 16},
]


def is_its_own(kernel: str) -> bool:
    return not kernel.startswith("hopper") or kernel.endswith("_few_sequences")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", LENGTHS)
def test_few_sequences_of_any_lengths_match_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, name: str, dtype: str
) -> None:
    for seq_lens in LENGTHS[name]:
        check_batch(cuda, make_batch(rng, seq_lens, dtype=DTYPES[dtype], **HEADS))
        assert is_its_own(pagedattn.last_kernel()) or len(seq_lens) > 16


@pytest.mark.parametrize("seq_lens", [[2000], [1500, 40, 300]], ids=["alone", "three"])
@pytest.mark.parametrize("case", OPTIONS, ids=case_id)
def test_every_option_holds_for_few_sequences(
    cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any], seq_lens: list[int]
) -> None:
    case = {**HEADS, **case}
    query_lens = case.pop("query_lens", None)
    a_head_each = {name: case[name] for name in ("alibi_slopes", "sinks") if name in case}
    case |= {name: np.full(case["num_q_heads"], value, np.float32) for name, value in a_head_each.items()}
    lens = None if query_lens is None else query_lens[-len(seq_lens) :]
    check_batch(cuda, make_batch(rng, seq_lens, lens, dtype=np.float16, **case), max_query_len=2)


@pytest.mark.parametrize("count", [1, 3])
def test_a_graph_of_few_sequences_is_replayed_with_other_lengths(
    cuda: CupyBackend, rng: np.random.Generator, count: int
) -> None:
    def batch(most: int) -> Any:
        return make_batch(rng, [int(n) for n in rng.integers(0, most + 1, count)], dtype=np.float16, **HEADS)

    captured = CapturedAttention(cuda, batch(100))
    for most in (300, 0, 20, 200, 1, 150):
        captured.check(batch(most))


@pytest.mark.parametrize("seq_lens", [[9000], [6000, 30, 500]], ids=["alone", "three"])
def test_fifty_runs_on_one_workspace_give_the_same_bits(
    cuda: CupyBackend, rng: np.random.Generator, seq_lens: list[int]
) -> None:
    batch = make_batch(rng, seq_lens, dtype=DTYPES["bfloat16"], **HEADS)
    other = make_batch(rng, [300] * 40, dtype=DTYPES["bfloat16"], **HEADS)
    calls = [batch.on(cuda), other.on(cuda)]
    workspace = workspace_for(cuda, calls)
    runs: list[tuple[Array, ...]] = [
        cuda.arrays(poison(batch.q.shape, batch.q.dtype), poison(batch.q.shape[:2], np.float32)) for _ in range(50)
    ]
    cuda.synchronize()
    for i, (out, lse) in enumerate(runs):
        if i % 5 == 4:  # of another kernel, which leaves partial results behind
            pagedattn.paged_attention(*calls[1][0], workspace=workspace, **calls[1][1])
        pagedattn.paged_attention(*calls[0][0], out=out, lse=lse, workspace=workspace, **calls[0][1])
    first = [cuda.host(array) for array in runs[0]]
    for run in runs[1:]:
        for array, expected, what in zip(run, first, ("out", "lse"), strict=True):
            assert_same_bytes(cuda.host(array), expected, what)
