"""Decode of many sequences, where neighbouring KV heads are read together (cuda/work_schedule.cuh).

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
from attention_check import check_batch
from backends import DTYPES, CupyBackend
from batches import TENSOR_CORE_KINDS, make_batch, scale_for
from pairwise import case_id, pairwise

pytestmark = pytest.mark.gpu

PAIRWISE = pairwise(
    {
        "kind": TENSOR_CORE_KINDS,
        "head_dim": [64, 72, 80, 96, 112, 128, 192, 256],
        "kv_heads": [2, 3, 4, 6, 8],
        # Query heads a KV head, and query tokens.
        "rows": [(1, 1), (4, 1), (5, 1), (16, 1), (17, 1), (4, 2), (4, 5), (3, 9), (8, 8)],
        "block_size": [8, 16, 24, 64],
        "layout": ["NHD", "HND", "one layer of many", "padded"],
        "lengths": ["short", "ragged", "one long"],
        "option": [None, "window", "softcap", "alibi", "sinks"],
        "deterministic": [False, True],
    }
)


def lengths(rng: np.random.Generator, kind: str) -> list[int]:
    """Return lengths of so many sequences that each multiprocessor has several."""
    if kind == "short":
        return [int(n) for n in rng.integers(0, 70, 300)]
    ragged = [int(n) for n in rng.integers(0, 700, 60)]
    return [*ragged, 5000, *ragged[:20]] if kind == "one long" else ragged


@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_heads_that_are_read_together_match_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any]
) -> None:
    group, query_len = case["rows"]
    kv_heads = case["kv_heads"]
    dtype, kv_dtype = (DTYPES[name] for name in case["kind"])
    seq_lens = lengths(rng, case["lengths"])
    # Rows of different numbers side by side.
    query_lens = [min(int(rng.integers(0, query_len + 1)), n) for n in seq_lens] if query_len > 1 else None
    options: dict[str, Any] = scale_for(kv_dtype, rng, kv_heads, dtype)
    if case["option"] == "window":
        options["window"] = 50
    elif case["option"] == "softcap":
        options["softcap"] = 1.5
    elif case["option"] == "alibi":
        options["alibi_slopes"] = rng.uniform(-0.02, 0.2, group * kv_heads).astype(np.float32)
    elif case["option"] == "sinks":
        options["sinks"] = rng.uniform(-2, 3, group * kv_heads).astype(np.float32)
    shape: dict[str, Any] = {
        "num_q_heads": group * kv_heads,
        "num_kv_heads": kv_heads,
        "block_size": case["block_size"],
    }
    shape |= {"head_dim": case["head_dim"], "layout": case["layout"], "dtype": dtype, "kv_dtype": kv_dtype}
    check_batch(cuda, make_batch(rng, seq_lens, query_lens, **shape, **options), deterministic=case["deterministic"])


@pytest.mark.parametrize("head_dim", [80, 96, 112, 192])
def test_four_heads_side_by_side_have_a_kernel_of_their_own(
    cuda: CupyBackend, rng: np.random.Generator, head_dim: int
) -> None:
    kind = ("float16", "float8_e4m3" if head_dim == 192 else "float16")
    dtype, kv_dtype = (DTYPES[name] for name in kind)
    shape: dict[str, Any] = {"num_kv_heads": 4, "head_dim": head_dim, "dtype": dtype, "kv_dtype": kv_dtype}
    scales: dict[str, Any] = scale_for(kv_dtype, rng, 4)
    few, many = [300] * 3, [int(n) for n in rng.integers(1, 300, 50)]
    for seq_lens, num_q_heads, layout, expected in (
        (many, 16, "NHD", "_4_heads"),
        (many, 64, "NHD", "_4_heads"),
        (few, 16, "NHD", ""),  # sequences that are divided among many
        (many, 68, "NHD", ""),  # too many rows
        (many, 16, "HND", ""),  # not side by side
    ):
        check_batch(cuda, make_batch(rng, seq_lens, num_q_heads=num_q_heads, layout=layout, **shape, **scales))
        if pagedattn.last_kernel().startswith("hopper"):
            assert pagedattn.last_kernel() == f"hopper_decode_{kind[1]}_d{head_dim}{expected}"
