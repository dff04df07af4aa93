"""How the CUDA kernels divide a batch among blocks, with the kernels' own header on the host.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path

import pytest
from installed import REPOSITORY, output_of, tool


@pytest.mark.parametrize("program", ["work_schedule", "work_cursor"])
def test_every_tile_is_done_once_and_partial_results_never_collide(tmp_path: Path, program: str) -> None:
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror", "-Wno-unknown-pragmas"]
    source = REPOSITORY / f"tests/{program}.cpp"
    output_of(tool("g++"), "-std=c++20", "-O1", *warnings, "-I", REPOSITORY / "cuda", source, "-o", tmp_path / program)
    assert output_of(tmp_path / program) == "all hold\n"
