"""Every instruction set that was compiled in and that this processor has computes the contract.

PAGEDATTN_CPU_ISA is read once a process, so each one gets a process of its own.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pagedattn
import pytest

ISAS = pagedattn.config()["cpu"]["isas"]


def run(script: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PAGEDATTN_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def usable(isa: str) -> bool:
    """Whether this processor has the instruction set: forcing it does not raise."""
    return run("import pagedattn; pagedattn.config()", isa).returncode == 0


# A few cases of each type and of each operation that computes or converts.
CONTRACT = """
import sys
sys.path.insert(0, ".")
import numpy as np, pagedattn
from backends import FLOAT8_E4M3, FLOAT8_E5M2, NumpyBackend
import test_float8_queries, test_gather_kv, test_merge_states, test_paged_attention, test_reshape_and_cache

assert pagedattn.config()["cpu"]["isa"] == {isa!r}
backend, seed = NumpyBackend(), np.random.SeedSequence().entropy
print("seed", seed)
rng = np.random.default_rng(seed)
for case in test_paged_attention.PAIRWISE[::3]:
    test_paged_attention.test_every_pair_of_options_matches_the_reference(backend, rng, case)
for dtype in ("float32", "float16", "bfloat16"):
    for head_dim in (40, 64, 128):
        test_paged_attention.test_prompts_on_the_cpu_match_the_reference_beside_chunks_and_decodes(
            rng, dtype, 5, head_dim)
    for bad in (np.nan, np.inf):
        test_paged_attention.test_a_value_that_is_no_number_reaches_on_the_cpu_only_the_rows_that_see_it(
            rng, dtype, bad)
    for tokens in (1, 3):
        test_paged_attention.test_any_few_rows_match_the_reference_on_the_cpu(rng, (dtype, dtype), tokens)
    test_paged_attention.test_one_long_sequence_matches_the_reference(backend, rng, dtype, dtype, 1)
    test_merge_states.test_merged_parts_match_the_reference(backend, rng, dtype, 3, (7, 3, 37))
    for kv_dtype in (FLOAT8_E4M3, FLOAT8_E5M2):
        test_reshape_and_cache.test_float8_caches_get_the_nearest_value_with_ties_to_even(
            backend, rng, dtype, kv_dtype, "HND")
        test_reshape_and_cache.test_float8_caches_saturate_infinities_and_keep_nan(backend, dtype, kv_dtype)
        test_gather_kv.test_float8_pages_are_dequantised_exactly(backend, rng, dtype, kv_dtype, "NHD")
for kv_dtype in ("float8_e4m3", "float8_e5m2"):
    test_paged_attention.test_any_few_rows_match_the_reference_on_the_cpu(rng, ("float16", kv_dtype), 2)
    test_paged_attention.test_any_few_rows_match_the_reference_on_the_cpu(rng, (kv_dtype, kv_dtype), 2)
    test_paged_attention.test_every_float8_code_is_decoded_exactly(backend, kv_dtype)
    test_float8_queries.test_every_code_of_a_query_is_decoded_exactly(backend, kv_dtype, 90)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_the_contract_holds_on(isa: str) -> None:
    if not usable(isa):
        pytest.skip(f"this processor has no {isa}")
    result = run(CONTRACT.format(isa=isa), isa)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_that_the_processor_lacks_is_refused_by_name(isa: str) -> None:
    if usable(isa):
        pytest.skip(f"this processor has {isa}")
    result = run("import pagedattn; pagedattn.config()", isa)
    assert "UnsupportedError: build_info: `PAGEDATTN_CPU_ISA`" in result.stderr
    assert f"`{isa}`" in result.stderr


def test_an_unknown_instruction_set_is_refused_with_the_known_ones() -> None:
    result = run("import pagedattn; pagedattn.config()", "sse9")
    assert result.returncode == 1
    assert "InvalidArgumentError: build_info: `PAGEDATTN_CPU_ISA`" in result.stderr
    assert "`sse9`" in result.stderr
    assert "generic" in result.stderr


def pays(isa: str) -> bool:
    """Whether the instruction set is fast here: products of bfloat16 in vectors are slow on Intel's processors."""
    return isa != "avx512_bf16" or "AuthenticAMD" in Path("/proc/cpuinfo").read_text()


def test_without_a_wish_the_widest_usable_instruction_set_that_pays_is_chosen() -> None:
    script = "import pagedattn; print(pagedattn.config()['cpu']['isa'])"
    assert run(script, "").stdout.strip() == [isa for isa in ISAS if usable(isa) and pays(isa)][-1]
