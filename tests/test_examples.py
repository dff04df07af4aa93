"""The example programs run and find their own results correct.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import sys

import pytest
from installed import REPOSITORY, output_of

EXAMPLES = REPOSITORY / "examples/python"


@pytest.mark.parametrize("name", ["numpy_decode", "prefix_sharing"])
def test_an_example_finds_its_results_correct(name: str) -> None:
    assert output_of(sys.executable, EXAMPLES / f"{name}.py").endswith(": correct\n")


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_the_cupy_example_finds_its_results_correct() -> None:
    assert output_of(sys.executable, EXAMPLES / "cupy_decode.py").endswith(": correct\n")


def test_the_cupy_example_says_why_where_it_cannot_run() -> None:
    output = output_of(sys.executable, EXAMPLES / "cupy_decode.py", env={"CUDA_VISIBLE_DEVICES": ""})
    assert output.startswith("skipped: ")


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"numpy_decode", "prefix_sharing", "cupy_decode"}
