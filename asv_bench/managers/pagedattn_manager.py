# SPDX-License-Identifier: Apache-2.0
"""What our block manager costs."""

from __future__ import annotations

import pagedattn
from benchmarks.block_manager_units import UNITS as UNITS_AND_AIMS

TITLE = "pagedattn"
VERSION = f"pagedattn {pagedattn.__version__}"
UNITS = {name: measure for name, (measure, _) in UNITS_AND_AIMS.items()}
