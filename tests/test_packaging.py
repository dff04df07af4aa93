"""The installed package: what it exports, links, ships and says of itself.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import importlib.metadata
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pagedattn
import pytest
from installed import INCLUDE_DIR, LIB_DIR, LIBRARY, PACKAGE_DIR, extension_modules, output_of, tool

# What every Linux system with a C++ program has.
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux[\w-]*)\.so(\.\d+)?")


def exported_symbols(path: Path) -> set[str]:
    lines = output_of(tool("nm"), "-D", "--defined-only", path).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def dynamic_entries(path: Path, kind: str) -> list[str]:
    return re.findall(rf"\({kind}\).*\[(.*)\]", output_of(tool("readelf"), "-dW", path))


def module_name(path: Path) -> str:
    return path.name.split(".")[0]


def test_the_library_exports_exactly_the_functions_of_the_c_header() -> None:
    header = (INCLUDE_DIR / "pagedattn/pagedattn.h").read_text()
    declared = set(re.findall(r"^PA_API [\w ]+?\*?\b(pa_\w+)\(", header, flags=re.MULTILINE))
    assert len(declared) > 10
    assert exported_symbols(LIBRARY) == declared


@pytest.mark.parametrize("module", extension_modules(), ids=module_name)
def test_an_extension_module_exports_its_initialiser_alone(module: Path) -> None:
    assert exported_symbols(module) == {f"PyInit_{module_name(module)}"}


@pytest.mark.parametrize("binary", [LIBRARY, *extension_modules()], ids=module_name)
def test_nothing_links_more_than_system_libraries_and_the_library_itself(binary: Path) -> None:
    needed = dynamic_entries(binary, "NEEDED")
    assert needed
    assert [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name) and name != "libpagedattn.so"] == []


@pytest.mark.parametrize("module", extension_modules(), ids=module_name)
def test_an_extension_module_finds_the_library_beside_itself(module: Path) -> None:
    assert dynamic_entries(module, "(?:RUNPATH|RPATH)") == ["$ORIGIN/lib"]


def test_the_library_has_one_name_and_no_copies() -> None:
    assert [path.name for path in LIB_DIR.glob("*.so*")] == ["libpagedattn.so"]
    assert dynamic_entries(LIBRARY, "SONAME") == ["libpagedattn.so"]


def test_the_compiled_files_packed_as_in_a_wheel_stay_under_30_megabytes() -> None:
    size = sum(len(zlib.compress(path.read_bytes())) for path in [LIBRARY, *extension_modules()])
    assert size < 30e6


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(pagedattn.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("module", extension_modules(), ids=module_name)
def test_the_stub_of_an_extension_module_names_what_the_module_has(module: Path) -> None:
    name = module_name(module)
    stub = ast.parse((Path(pagedattn.__file__).parent / f"{name}.pyi").read_text())
    runtime = importlib.import_module(f"pagedattn.{name}")
    in_stub = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    public = {
        key
        for key, value in vars(runtime).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == runtime.__name__
    }
    assert {key for key in in_stub if not hasattr(runtime, key)} == set()
    assert public - in_stub == set()


def test_the_version_is_the_same_in_python_in_c_and_in_the_metadata() -> None:
    library = ctypes.CDLL(str(LIBRARY))
    library.pa_version.restype = ctypes.c_char_p
    version = importlib.metadata.version("pagedattn")
    assert pagedattn.__version__ == version
    assert library.pa_version().decode() == version


def test_the_pkg_config_and_cmake_files_carry_the_release_of_the_package() -> None:
    release = re.match(r"\d+(\.\d+)*", importlib.metadata.version("pagedattn"))
    assert release is not None
    assert f"\nVersion: {release[0]}\n" in (LIB_DIR / "pkgconfig/pagedattn.pc").read_text()
    version_file = (LIB_DIR / "cmake/pagedattn/pagedattnConfigVersion.cmake").read_text()
    assert f'set(PACKAGE_VERSION "{release[0]}")' in version_file


def test_no_installed_text_file_names_a_folder_of_the_build() -> None:
    for path in [*LIB_DIR.rglob("*.cmake"), *LIB_DIR.rglob("*.pc")]:
        assert not re.search(r"(?<![\w}.])/(tmp|home|root|work|usr)/", path.read_text()), path


@pytest.mark.parametrize(
    ("compiler", "language", "standard", "header"),
    [
        ("gcc", "c", "c11", "pagedattn.h"),
        ("g++", "c++", "c++17", "pagedattn.h"),
        ("g++", "c++", "c++17", "pagedattn.hpp"),
        ("g++", "c++", "c++20", "pagedattn.hpp"),
    ],
)
def test_a_header_compiles_alone_without_a_warning(
    compiler: str, language: str, standard: str, header: str, tmp_path: Path
) -> None:
    source = tmp_path / "use.txt"
    source.write_text(f"#include <pagedattn/{header}>\nint main(void) {{ return pa_version() == 0; }}\n")
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
    output_of(tool(compiler), f"-std={standard}", *warnings, "-fsyntax-only", "-I", INCLUDE_DIR, "-x", language, source)


def test_importing_is_silent_and_loads_no_array_library_but_numpy_and_nothing_of_the_network() -> None:
    unwanted = ("cupy", "torch", "jax", "typer", "rich", "http.client", "ssl")
    program = f"import sys, pagedattn; print([m for m in {unwanted} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_every_public_name_has_a_docstring() -> None:
    undocumented = [name for name in pagedattn.__all__ if not getattr(getattr(pagedattn, name), "__doc__", None)]
    assert undocumented == []


def test_the_licence_is_in_the_metadata() -> None:
    metadata = importlib.metadata.metadata("pagedattn")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert PACKAGE_DIR.name == "pagedattn"
