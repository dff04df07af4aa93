# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of pagedattn: one file an area, one class a question, the same random data in every run.

Cases, inputs and clocks are those of ``pagedattn.bench`` in this checkout, imported as ``pagedattn_bench``; what they
call is the pagedattn that is installed.  So every commit is measured in the same way.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path


def _load_bench() -> None:
    folder = Path(__file__).resolve().parents[2] / "python" / "pagedattn" / "bench"
    spec = importlib.util.spec_from_file_location(
        "pagedattn_bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def _keep_freed_memory() -> None:
    # As in a process that has run for a while.  By default, what the last sample freed goes back to the system or not
    # as the heap happens to lie, and getting it again takes as long as a short call.
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 4 << 20)


_load_bench()
_keep_freed_memory()
