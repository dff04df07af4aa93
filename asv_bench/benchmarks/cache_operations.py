# SPDX-License-Identifier: Apache-2.0
"""Moving KV on CUDA: how near to a plain copy of the same bytes, and how cheap is a small one?"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from .cuda_run import TIMEOUT_SECONDS, CudaBenchmark, Measured, measure_operations
from .operations import (
    copy_blocks,
    decode_beside_swap,
    gather_kv,
    merge_states,
    reshape_and_cache,
    reshape_and_cache_layers,
    rope_and_cache,
    swap_blocks,
    swap_both_ways,
)

LARGE, SMALL = 32768, 64  # tokens of 4 KiB of K and V in 16 bits: 128 MiB and 256 KiB
BESIDE = 10240  # 40 MiB, which cross a bus in a little more time than three steps of decoding take
E4M3 = "float8_e4m3"

LARGE_OPERATIONS = {
    "reshape_and_cache": partial(reshape_and_cache, num_tokens=LARGE),
    "reshape_and_cache e4m3": partial(reshape_and_cache, num_tokens=LARGE, kv_dtype=E4M3),
    "reshape_and_cache, 16 layers": partial(reshape_and_cache_layers, num_tokens=LARGE, num_layers=16),
    "rope_and_cache": partial(rope_and_cache, num_tokens=LARGE),
    "rope_and_cache, 32 query heads": partial(rope_and_cache, num_tokens=LARGE, q_heads=32),
    "copy_blocks": partial(copy_blocks, num_tokens=LARGE),
    "gather_kv": partial(gather_kv, num_tokens=LARGE),
    "gather_kv e4m3": partial(gather_kv, num_tokens=LARGE, kv_dtype=E4M3),
    "merge_states": partial(merge_states, num_tokens=LARGE // 16),
}
SMALL_OPERATIONS = {
    "reshape_and_cache": partial(reshape_and_cache, num_tokens=SMALL),
    "reshape_and_cache e4m3": partial(reshape_and_cache, num_tokens=SMALL, kv_dtype=E4M3),
    "rope_and_cache": partial(rope_and_cache, num_tokens=SMALL),
    "rope_and_cache, 32 query heads": partial(rope_and_cache, num_tokens=SMALL, q_heads=32),
    "copy_blocks": partial(copy_blocks, num_tokens=SMALL),
    "gather_kv": partial(gather_kv, num_tokens=SMALL),
    "gather_kv e4m3": partial(gather_kv, num_tokens=SMALL, kv_dtype=E4M3),
    "merge_states": partial(merge_states, num_tokens=SMALL),
}
SWAPS = {
    f"{name} of {piece} bytes": partial(swap_blocks, num_tokens=LARGE, back=back, piece=piece)
    for piece in (1024, 4096, 32768)
    for name, back in (("out", False), ("in", True))
}
SWAPS_BOTH_WAYS = {
    f"both ways of {piece} bytes": partial(swap_both_ways, num_tokens=LARGE, piece=piece) for piece in (4096, 32768)
}
BESIDE_SWAPS = {
    f"decode beside a swap {name}": partial(decode_beside_swap, num_tokens=BESIDE, back=back)
    for name, back in (("out", False), ("in", True))
}


class Large(CudaBenchmark):
    """64 MiB and more: bytes a second, as a share of a plain copy of as many."""

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


class Swap(CudaBenchmark):
    """Scattered blocks between device and page-locked memory: as a share of one contiguous copy each way."""

    params: ClassVar = [list(SWAPS)]

    def setup_cache(self) -> Measured:
        return measure_operations(SWAPS)

    setup_cache.timeout = TIMEOUT_SECONDS  # type: ignore[attr-defined]


class SwapBothWays(CudaBenchmark):
    """Scattered blocks from the device and to it at once: as a share of plain copies both ways."""

    params: ClassVar = [list(SWAPS_BOTH_WAYS)]

    def setup_cache(self) -> Measured:
        return measure_operations(SWAPS_BOTH_WAYS)

    setup_cache.timeout = TIMEOUT_SECONDS  # type: ignore[attr-defined]


class BesideSwap(CudaBenchmark):
    """Decoding while blocks are swapped: as a share of its speed without."""

    params: ClassVar = [list(BESIDE_SWAPS)]

    def setup_cache(self) -> Measured:
        return measure_operations(BESIDE_SWAPS)

    setup_cache.timeout = TIMEOUT_SECONDS  # type: ignore[attr-defined]
