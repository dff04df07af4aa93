# SPDX-License-Identifier: Apache-2.0
"""asv imports the suite in processes that it then forks: a CUDA context made there would be broken in the children."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

IMPORT = """
import importlib, pkgutil, sys
import benchmarks
for module in pkgutil.iter_modules(benchmarks.__path__):
    importlib.import_module(f"benchmarks.{module.name}")
assert "benchmarks.decode" in sys.modules
print([name for name in ("cupy", "torch") if name in sys.modules])
"""


def test_importing_the_benchmarks_touches_no_gpu() -> None:
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
