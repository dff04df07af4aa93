# SPDX-License-Identifier: Apache-2.0
"""Moving KV on CUDA: how near to a plain copy of the same bytes, and how cheap is a small one?"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from .cuda_run import TIMEOUT_SECONDS, CudaBenchmark, Measured, measure_operations
from .operations import copy_blocks, gather_kv, merge_states, reshape_and_cache, swap_blocks

LARGE, SMALL = 32768, 64  # tokens of 4 KiB of K and V in 16 bits: 128 MiB and 256 KiB
E4M3 = "float8_e4m3"

LARGE_OPERATIONS = {
    "reshape_and_cache": (partial(reshape_and_cache, num_tokens=LARGE), "copy"),
    "reshape_and_cache e4m3": (partial(reshape_and_cache, num_tokens=LARGE, kv_dtype=E4M3), "copy"),
    "copy_blocks": (partial(copy_blocks, num_tokens=LARGE), "copy"),
    "gather_kv": (partial(gather_kv, num_tokens=LARGE), "copy"),
    "gather_kv e4m3": (partial(gather_kv, num_tokens=LARGE, kv_dtype=E4M3), "copy"),
    "swap_blocks out": (partial(swap_blocks, num_tokens=LARGE), "device_to_host"),
    "swap_blocks in": (partial(swap_blocks, num_tokens=LARGE, back=True), "host_to_device"),
    "merge_states": (partial(merge_states, num_tokens=LARGE // 16), "copy"),
}
SMALL_OPERATIONS = {
    "reshape_and_cache": (partial(reshape_and_cache, num_tokens=SMALL), "copy"),
    "copy_blocks": (partial(copy_blocks, num_tokens=SMALL), "copy"),
    "gather_kv": (partial(gather_kv, num_tokens=SMALL), "copy"),
    "merge_states": (partial(merge_states, num_tokens=SMALL), "copy"),
}


class Large(CudaBenchmark):
    """64 MiB and more: bytes a second, as a share of a plain copy's (of the bus's for swapping)."""

    params: ClassVar = [list(LARGE_OPERATIONS)]

    def setup_cache(self) -> Measured:
        return measure_operations(LARGE_OPERATIONS)

    setup_cache.timeout = TIMEOUT_SECONDS  # type: ignore[attr-defined]


class Small(CudaBenchmark):
    """64 tokens, as in a step of decoding: microseconds."""

    params: ClassVar = [list(SMALL_OPERATIONS)]

    def setup_cache(self) -> Measured:
        return measure_operations(SMALL_OPERATIONS)

    setup_cache.timeout = TIMEOUT_SECONDS  # type: ignore[attr-defined]
