"""Which kernels serve decode: those for Hopper where they can, the generic ones elsewhere and where they are asked for.

PAGEDATTN_CUDA_ARCH is read once a process, so each value gets a process of its own.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pagedattn
import pytest
from attention_check import check_batch
from backends import DTYPES, CupyBackend
from batches import make_batch
from pairwise import case_id

pytestmark = pytest.mark.gpu

HOPPER = "hopper_decode_"
SERVED: list[dict[str, Any]] = [
    {"num_q_heads": 8},
    {"num_q_heads": 2},
    {"num_q_heads": 32},
    {"num_q_heads": 33, "num_kv_heads": 1},
    {"num_q_heads": 64, "num_kv_heads": 1},
    {"query_lens": [4, 3, 1]},
    {"head_dim": 8},
    {"head_dim": 72},
    {"head_dim": 80},
    {"head_dim": 256},
    {"block_size": 8},
    {"block_size": 24},
    {"block_size": 256},
    {"layout": "HND"},
    {"layout": "interleaved NHD"},
    {"layout": "padded"},
    {"layout": "one layer of many"},
    {"kv_dtype": "float8_e4m3"},
    {"kv_dtype": "float8_e5m2", "dtype": "bfloat16", "head_dim": 64},
    {"window": 7},
    {"softcap": 2.0},
    {"alibi_slopes": 0.1, "sinks": 1.0},
]
NOT_SERVED: list[dict[str, Any]] = [
    {"block_size": 3},
    {"block_size": 12},
    {"dtype": "float32"},
    {"layout": "odd rows"},
    {"num_q_heads": 193, "num_kv_heads": 1},
]


def kernel_of(cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any]) -> str:
    """Return the kernel that a small batch of such a shape runs, whose result is checked."""
    case = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": "float16", **case}
    case |= {name: DTYPES[case[name]] for name in ("dtype", "kv_dtype") if name in case}
    a_head_each = {name: case[name] for name in ("alibi_slopes", "sinks") if name in case}
    case |= {name: np.full(case["num_q_heads"], value, np.float32) for name, value in a_head_each.items()}
    query_lens = case.pop("query_lens", None)
    check_batch(cuda, make_batch(rng, [40, 7, 300], query_lens, **case))
    kernel = pagedattn.last_kernel()
    listed = {entry for name, _, entry in pagedattn.config()["kernels"] if name == "paged_attention"}
    assert kernel.split("+")[0] in listed
    return kernel


def require_hopper(cuda: CupyBackend) -> None:
    if cuda.cupy.cuda.Device().compute_capability != "90":
        pytest.skip("this device is not of compute capability 9.0")
    if os.environ.get("PAGEDATTN_CUDA_ARCH"):
        pytest.skip("PAGEDATTN_CUDA_ARCH is set")


@pytest.mark.parametrize("case", SERVED, ids=case_id)
def test_on_hopper_its_own_kernels_serve(cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any]) -> None:
    require_hopper(cuda)
    assert kernel_of(cuda, rng, case).startswith(HOPPER)


@pytest.mark.parametrize("case", NOT_SERVED, ids=case_id)
def test_on_hopper_generic_kernels_serve_the_rest(
    cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any]
) -> None:
    require_hopper(cuda)
    assert not kernel_of(cuda, rng, case).startswith("hopper_")


def run(script: str, architecture: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PAGEDATTN_CUDA_ARCH": architecture},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


PREAMBLE = """
import sys
sys.path.insert(0, ".")
import numpy as np, pagedattn
from backends import CupyBackend
import test_decode_batches, test_decode_graphs, test_decode_kernels, test_decode_shapes

cuda, seed = CupyBackend(), np.random.SeedSequence().entropy
print("seed", seed)
rng = np.random.default_rng(seed)
"""
CONTRACT = (
    PREAMBLE
    + """
for case in test_decode_kernels.SERVED:
    kernel = test_decode_kernels.kernel_of(cuda, rng, case)
    assert not kernel.startswith("hopper_"), (kernel, case)
for case in test_decode_shapes.PAIRWISE[::4]:
    test_decode_shapes.test_every_pair_of_options_of_decode_matches_the_reference(cuda, rng, case)
for group in (1, 5, 32):
    test_decode_shapes.test_prompts_padding_speculation_and_decode_share_a_call(
        cuda, rng, group, ("bfloat16", "bfloat16"))
test_decode_batches.test_lengths_from_0_to_a_million_share_a_batch(cuda, rng, "float16", "float16", 1, False)
test_decode_graphs.test_one_workspace_serves_calls_of_all_shapes_one_after_the_other(cuda, rng, 0)
test_decode_graphs.test_twenty_runs_give_the_same_bits(cuda, rng, "skewed", ("bfloat16", "bfloat16"), False)
"""
)
ONE_CALL = PREAMBLE + "print(test_decode_kernels.kernel_of(cuda, rng, {}))"


def test_generic_kernels_serve_everything_where_they_are_asked_for(cuda: CupyBackend) -> None:
    result = run(CONTRACT, "sm_80")
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_unknown_architecture_is_refused_with_the_known_one(cuda: CupyBackend) -> None:
    result = run(ONE_CALL, "sm_12")
    assert result.returncode == 1
    assert "InvalidArgumentError: paged_attention: `PAGEDATTN_CUDA_ARCH`" in result.stderr
    assert "sm_80" in result.stderr
    assert "`sm_12`" in result.stderr


def test_an_empty_wish_is_none(cuda: CupyBackend) -> None:
    require_hopper(cuda)
    result = run(ONE_CALL, "")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split()[-1].startswith(HOPPER)
