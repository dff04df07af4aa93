"""Where the installed package lies, and the tools that look into it or build against it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pagedattn
import pytest

INCLUDE_DIR = Path(pagedattn.get_include())
CMAKE_DIR = Path(pagedattn.get_cmake_dir())
LIB_DIR = CMAKE_DIR.parents[1]
PACKAGE_DIR = LIB_DIR.parent
LIBRARY = LIB_DIR / "libpagedattn.so"
REPOSITORY = Path(__file__).resolve().parents[1]


def tool(name: str) -> str:
    """Return the path of a program of this environment or of the machine; skip the test where neither has it."""
    path = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def output_of(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a program and return what it printed; fail with its words where it fails."""
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=240, env={**os.environ, **(env or {})}
    )
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}{result.stderr}"
    return result.stdout


def extension_modules() -> list[Path]:
    """Return the compiled modules of the package."""
    modules = sorted(PACKAGE_DIR.glob("_*.so"))
    assert modules, f"no compiled module in {PACKAGE_DIR}"
    return modules
