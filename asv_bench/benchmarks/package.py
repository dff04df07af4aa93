# SPDX-License-Identifier: Apache-2.0
"""What does the package cost whoever merely has it?"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path


class Import:
    """``import pagedattn`` in a fresh process, NumPy included."""

    def timeraw_import(self) -> str:
        return "import pagedattn"


class Size:
    """Files of the installed package, bytecode not counted: as they lie there, and packed as a wheel packs them."""

    unit = "bytes"

    def setup(self) -> None:
        import pagedattn

        root = Path(pagedattn.__file__).parent
        self.files = [file for file in root.rglob("*") if file.is_file() and file.suffix != ".pyc"]

    def track_installed_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def track_wheel_bytes(self) -> int:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as wheel:
            for file in self.files:
                wheel.write(file)
        return packed.tell()
