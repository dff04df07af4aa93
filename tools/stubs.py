"""Write the type stub of the compiled module `pagedattn._core`, or check that the committed one is still true.

SPDX-License-Identifier: Apache-2.0

    python tools/stubs.py            write python/pagedattn/_core.pyi
    python tools/stubs.py --check    fail, with the difference, where it is not what the module says

Needs pagedattn, pybind11-stubgen and ruff (tools/lint-requirements.txt) in the environment that runs it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
STUB = REPOSITORY / "python/pagedattn/_core.pyi"


# What versions of pybind11 spell in different ways, or mypy --strict finds too vague.
SPELLINGS = (
    (r"typing\.SupportsInt( \| typing\.SupportsIndex)?", "int"),
    (r"typing\.SupportsFloat( \| typing\.SupportsIndex)?", "float"),
    (r"-> dict:", "-> dict[str, typing.Any]:"),
)


def generate() -> str:
    """Return the stub that the installed module calls for, formatted as the repository is."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", "pagedattn._core", "--exit-code", "--output-dir", folder],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
        )
        stub = Path(folder, "pagedattn/_core.pyi")
        text = stub.read_text(encoding="utf-8")
        for pattern, spelling in SPELLINGS:
            text = re.sub(pattern, spelling, text)
        stub.write_text(text, encoding="utf-8")
        ruff = [sys.executable, "-m", "ruff"]
        config = ["--config", os.fspath(REPOSITORY / "pyproject.toml"), "--quiet"]
        subprocess.run([*ruff, "check", "--fix", *config, stub], check=True)
        subprocess.run([*ruff, "format", *config, stub], check=True)
        return stub.read_text(encoding="utf-8")


def main() -> int:
    """Write or check, as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the stub is stale")
    arguments = parser.parse_args()
    fresh = generate()
    if not arguments.check:
        STUB.write_text(fresh, encoding="utf-8")
        return 0
    committed = STUB.read_text(encoding="utf-8") if STUB.exists() else ""
    if committed == fresh:
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(committed.splitlines(True), fresh.splitlines(True), "committed _core.pyi", "the module")
    )
    print("\nThe stub is stale: run `python tools/stubs.py`.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
