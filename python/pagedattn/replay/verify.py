# SPDX-License-Identifier: Apache-2.0
"""The judge: attention as the textbook writes it, in float64, over keys that never saw a block.

It knows a sequence by its tokens alone.  Block tables, slots, cached prefixes, chunks and copies do not occur here, so
a fault in any of them shows as a difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .model import Model
from .settings import Settings

# Largest error of a row, |out - exact| / |exact| in the Euclidean norm.  The exact row takes the rounded inputs, so
# what remains is rounding inside the kernel and of its output.  The contract bounds whole results by 1e-5, 1e-3 and
# 4e-3; a single row, where many values may average to a short vector, has twice as much in 16 bits.  A wrong block is
# off by about 1.  An 8-bit cache is compared with its own rounded contents.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 8e-3}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A row that differs from the dense computation."""

    step: int
    request: int
    sample: int
    sequence: int
    position: int
    layer: int
    head: int
    error: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"wrong result in step {self.step}: request {self.request}, sample {self.sample} (sequence "
            f"{self.sequence}), position {self.position}, layer {self.layer}, head {self.head}: relative error "
            f"{self.error:.3g}, allowed {self.tolerance:.0e}"
        )


def dense_row(
    model: Model, settings: Settings, digests: NDArray[np.uint64], layer: int, head: int
) -> NDArray[np.float64]:
    """Attention of the last of a sequence's tokens over all of them, ``[D]``."""
    keys, values = model.keys_values(digests, layer, head // (settings.heads // settings.kv_heads))
    scores = keys @ model.query(digests[-1], layer, head) / np.sqrt(settings.head_dim)
    weights = np.exp(scores - scores.max())
    row: NDArray[np.float64] = weights @ values / weights.sum()
    return row


def relative_error(actual: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    """Euclidean norm of the difference over that of the exact row; NaN where `actual` holds one."""
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))
