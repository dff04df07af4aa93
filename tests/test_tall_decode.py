"""Decode of 17 to 64 query rows a KV head, which Hopper kernels of their own serve at some head dimensions.

On other devices, and where two heads of few rows are read together, other kernels get the same batches.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
from attention_check import check_batch
from backends import DTYPES, CupyBackend
from batches import make_batch, naming_poisoned_blocks
from cuda_graphs import CapturedAttention
from pairwise import case_id, pairwise

pytestmark = pytest.mark.gpu

# On both sides of a tile, of a granule and of two, and one that is divided.
SEQ_LENS = [1, 63, 64, 65, 0, 127, 128, 129, 191, 256, 257, 700, 1500]
PAIRWISE = pairwise(
    {
        "dtype": ["float16", "bfloat16"],
        "head_dim": [40, 64, 120, 128, 200, 256],
        # Query heads a KV head, and the most query tokens.
        "rows": [(17, 1), (32, 1), (33, 1), (64, 1), (4, 5), (3, 9), (4, 16), (1, 64), (20, 3)],
        "num_kv_heads": [1, 3, 8],
        "block_size": [8, 16, 24, 64, 256],
        "layout": ["NHD", "HND", "one layer of many"],
        "option": [None, "window", "softcap", "alibi", "sinks", "all see all"],
        "lengths": ["some", "alone", "many"],
        "deterministic": [False, True],
    }
)


@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_every_pair_of_options_matches_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any]
) -> None:
    (group, query_len), kv_heads = case["rows"], case["num_kv_heads"]
    many = [int(n) for n in rng.integers(0, 300, 60)]
    seq_lens = {"some": SEQ_LENS, "alone": [1900], "many": many}[case["lengths"]]
    query_lens = [min(int(rng.integers(0, query_len)), n) for n in seq_lens] if query_len > 1 else None
    if query_lens is not None:
        query_lens[-1] = min(query_len, seq_lens[-1])
    every_option: dict[str | None, dict[str, Any]] = {
        None: {},
        "window": {"window": 50},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": rng.uniform(-0.02, 0.2, group * kv_heads).astype(np.float32)},
        "sinks": {"sinks": rng.uniform(-2, 3, group * kv_heads).astype(np.float32)},
        "all see all": {"causal": False},
    }
    options = every_option[case["option"]]
    shape = {name: case[name] for name in ("num_kv_heads", "head_dim", "block_size", "layout")}
    batch = make_batch(
        rng, seq_lens, query_lens, num_q_heads=group * kv_heads, dtype=DTYPES[case["dtype"]], **shape, **options
    )
    check_batch(cuda, batch, max_query_len=query_len, deterministic=case["deterministic"])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("block_size", "window"), [(8, 7), (16, 1), (16, 64), (64, 100), (256, 100)])
def test_keys_and_values_that_no_row_sees_may_be_anything(
    cuda: CupyBackend, rng: np.random.Generator, block_size: int, window: int, head_dim: int
) -> None:
    shape: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 1, "head_dim": head_dim, "block_size": block_size}
    batch = make_batch(rng, [3000, 700, 40, 12, 0], [9, 12, 16, 9, 0], window=window, dtype=np.float16, **shape)
    check_batch(cuda, naming_poisoned_blocks(rng, batch), max_query_len=16)


@pytest.mark.parametrize("mean", [500, 3500])
def test_heads_of_many_rows_in_step_match_the_reference(cuda: CupyBackend, rng: np.random.Generator, mean: int) -> None:
    seq_lens = [int(n) for n in rng.integers(mean // 2, 3 * mean // 2, 40)]
    shape: dict[str, Any] = {"num_q_heads": 12, "num_kv_heads": 4, "head_dim": 128, "dtype": DTYPES["bfloat16"]}
    query_lens = [int(n) for n in rng.integers(1, 17, 40)]
    check_batch(cuda, make_batch(rng, seq_lens, query_lens, **shape), max_query_len=16)


def test_a_graph_is_replayed_with_other_lengths(cuda: CupyBackend, rng: np.random.Generator) -> None:
    shape: dict[str, Any] = {"num_q_heads": 33, "num_kv_heads": 1, "head_dim": 128, "dtype": np.float16}

    def batch(longest: int) -> Any:
        seq_lens = [int(n) for n in rng.integers(0, longest, 40)]
        return make_batch(rng, seq_lens, block_size=128, **shape)

    captured = CapturedAttention(cuda, batch(3000))
    for longest in (1, 100, 3000, 700):
        captured.check(batch(longest))


@pytest.mark.parametrize(
    ("case", "seqs", "is_tall"),
    [
        ({"num_q_heads": 33, "num_kv_heads": 1}, 3, True),
        ({"num_q_heads": 17, "num_kv_heads": 1}, 300, True),
        ({"num_q_heads": 132, "num_kv_heads": 4}, 40, True),
        ({"num_q_heads": 68, "num_kv_heads": 4}, 3, True),
        ({"num_q_heads": 68, "num_kv_heads": 4}, 40, False),  # two heads are read together
        ({"num_q_heads": 64, "num_kv_heads": 4}, 3, False),  # rows enough for one warp
        ({"num_q_heads": 33, "num_kv_heads": 1, "head_dim": 96}, 3, False),
    ],
)
def test_tall_kernels_serve_what_they_are_for(
    cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any], seqs: int, is_tall: bool
) -> None:
    check_batch(cuda, make_batch(rng, [70] * seqs, dtype=np.float16, **{"head_dim": 128, **case}))
    if pagedattn.last_kernel().startswith("hopper"):
        assert pagedattn.last_kernel().endswith("_tall") == is_tall
