# SPDX-License-Identifier: Apache-2.0
"""Prefill on CUDA: how near to the tensor cores' limit?"""

from __future__ import annotations

from typing import Any, ClassVar

from pagedattn_bench.cases import PREFILL

from .cuda_run import TIMEOUT_SECONDS, CudaBenchmark, Measured, measure_attention, unjudged


class Prefill(CudaBenchmark):
    """Whole prompts, and chunks on a long context."""

    params: ClassVar = [[case.name for case in PREFILL]]

    def setup_cache(self) -> Measured:
        return measure_attention(PREFILL)

    setup_cache.timeout = TIMEOUT_SECONDS  # type: ignore[attr-defined]

    def track_rate(self, measured: Measured, case: str) -> dict[str, Any]:
        return unjudged(measured[case]["rate"])

    track_rate.unit = "TFLOP/s"  # type: ignore[attr-defined]
