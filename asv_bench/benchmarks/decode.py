# SPDX-License-Identifier: Apache-2.0
"""Decode on CUDA: is the cache read at the rate the memory gives, whatever the lengths?"""

from __future__ import annotations

from typing import ClassVar

from pagedattn_bench.cases import DECODE

from .cuda_run import TIMEOUT_SECONDS, CudaBenchmark, Measured, measure_attention


class Decode(CudaBenchmark):
    """One query token a sequence, or a few for speculative decode."""

    params: ClassVar = [[case.name for case in DECODE]]

    def setup_cache(self) -> Measured:
        return measure_attention(DECODE)

    setup_cache.timeout = TIMEOUT_SECONDS  # type: ignore[attr-defined]
