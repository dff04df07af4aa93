"""How the CUDA kernels divide a batch among blocks, with the kernels' own header on the host.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path

from installed import REPOSITORY, output_of, tool


def test_every_tile_is_done_once_and_partial_results_never_collide(tmp_path: Path) -> None:
    program = tmp_path / "work_schedule"
    source = REPOSITORY / "tests/work_schedule.cpp"
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
    output_of(tool("g++"), "-std=c++20", "-O1", *warnings, "-I", REPOSITORY / "cuda", source, "-o", program)
    assert output_of(program) == "all hold\n"
