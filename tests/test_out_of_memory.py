"""Memory that runs out in the middle of a call, which must then have changed nothing.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path

from installed import INCLUDE_DIR, LIB_DIR, REPOSITORY, output_of, tool

FLAGS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror", "-pthread")
INCLUDES = ("-I", REPOSITORY / "src", "-I", REPOSITORY / "include")


def test_a_call_of_the_block_manager_that_runs_out_of_memory_has_changed_nothing(tmp_path: Path) -> None:
    program = tmp_path / "failing_allocations"
    output_of(tool("g++"), *FLAGS, *INCLUDES, REPOSITORY / "tests/failing_allocations.cpp", "-o", program)
    assert output_of(program) == "all hold\n"


def test_threads_that_cannot_be_started_for_want_of_memory_are_done_without(tmp_path: Path) -> None:
    sources = REPOSITORY / "tests/failing_threads.cpp", REPOSITORY / "src/cpu/thread_pool.cpp"
    program = tmp_path / "failing_threads"
    output_of(tool("g++"), *FLAGS, *INCLUDES, *sources, "-o", program)
    assert output_of(program) == "all hold\n"


def test_attention_is_whole_or_not_begun_where_threads_get_no_memory(tmp_path: Path) -> None:
    program = tmp_path / "failing_scratch"
    paths = ("-I", INCLUDE_DIR, "-L", LIB_DIR, f"-Wl,-rpath,{LIB_DIR}", "-lpagedattn")
    output_of(tool("g++"), *FLAGS, REPOSITORY / "tests/failing_scratch.cpp", "-o", program, *paths)
    assert output_of(program) == "all hold\n"
