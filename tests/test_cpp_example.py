"""The C++ and C examples, built against the installed package as a user would build them, and run.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pagedattn
import pytest
from installed import CMAKE_DIR, INCLUDE_DIR, LIB_DIR, REPOSITORY, output_of, tool

SOURCE = REPOSITORY / "examples/cpp"


def build_with_cmake(pagedattn_dir: Path, build_dir: Path) -> Path:
    """Configure and build the examples against a package that find_package is told of."""
    output_of(
        tool("cmake"),
        *("-S", SOURCE, "-B", build_dir, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
        *("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", f"-Dpagedattn_DIR={pagedattn_dir}"),
    )
    output_of(tool("cmake"), "--build", build_dir)
    return build_dir


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_with_cmake(CMAKE_DIR, tmp_path_factory.mktemp("cpp_example"))


def test_the_cpp_example_computes_correctly_on_the_cpu(built: Path) -> None:
    output = output_of(built / "paged_cache", "cpu")
    assert re.fullmatch(r"cpu: 20 steps, 3 sequences, 12 of 32 blocks in use, kernel .+: all correct\n", output)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_the_cpp_example_computes_correctly_on_the_gpu(built: Path) -> None:
    if not re.search(r"EXAMPLE_HAS_CUDA", (built / "build.ninja").read_text()):
        pytest.skip("the CUDA toolkit, which the example allocates with, is not installed")
    output = output_of(built / "paged_cache", "cuda")
    assert re.fullmatch(r"cuda: 20 steps, 3 sequences, 12 of 32 blocks in use, kernel .+: all correct\n", output)


def test_the_c_example_computes_correctly(built: Path) -> None:
    assert output_of(built / "minimal") == f"pagedattn {pagedattn.__version__}: every element is 3\n"


def test_the_cpp_example_builds_with_pkg_config(tmp_path: Path) -> None:
    flags = output_of(
        tool("pkg-config"), "--cflags", "--libs", "pagedattn", env={"PKG_CONFIG_PATH": str(LIB_DIR / "pkgconfig")}
    ).split()
    program = tmp_path / "paged_cache"
    output_of(tool("g++"), "-std=c++17", "-O1", SOURCE / "main.cpp", "-o", program, *flags, f"-Wl,-rpath,{LIB_DIR}")
    assert output_of(program, "cpu").endswith(": all correct\n")


def test_the_cmake_package_works_wherever_the_tree_is_moved(tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(LIB_DIR, moved / "lib")
    shutil.copytree(pagedattn.get_include(), moved / "include")
    built = build_with_cmake(moved / "lib/cmake/pagedattn", tmp_path / "build")
    assert str(LIB_DIR) not in output_of(tool("readelf"), "-dW", built / "minimal")
    assert output_of(built / "minimal").endswith(": every element is 3\n")


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_every_function_of_the_cpp_header_does_what_the_c_function_does(standard: str, tmp_path: Path) -> None:
    program = tmp_path / "veneer"
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
    paths = ["-I", INCLUDE_DIR, "-L", LIB_DIR, f"-Wl,-rpath,{LIB_DIR}"]
    source = REPOSITORY / "tests/veneer.cpp"
    output_of(tool("g++"), f"-std={standard}", *warnings, source, "-o", program, *paths, "-lpagedattn")
    assert output_of(program) == "all hold\n"
