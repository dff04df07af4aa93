# SPDX-License-Identifier: Apache-2.0
"""What does the package cost whoever merely has it?"""

from __future__ import annotations

from pathlib import Path


class Import:
    """``import pagedattn`` in a fresh process, NumPy included."""

    def timeraw_import(self) -> str:
        return "import pagedattn"


class Size:
    """Files of the installed package, bytecode not counted."""

    unit = "bytes"

    def track_installed_bytes(self) -> int:
        import pagedattn

        root = Path(pagedattn.__file__).parent
        return sum(file.stat().st_size for file in root.rglob("*") if file.is_file() and file.suffix != ".pyc")
