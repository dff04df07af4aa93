# SPDX-License-Identifier: Apache-2.0
"""How fast are the operations on the CPU?  Inputs are made and answers checked once a process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from statistics import median
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import pagedattn
from pagedattn._device import Device
from pagedattn_bench.accuracy import check, reference_rows
from pagedattn_bench.cases import CPU_DECODE, CPU_PREFILL, CaseError, find_cases
from pagedattn_bench.inputs import Inputs

from . import operations
from .cuda_run import unjudged
from .operations import Operation

TOKENS = 4096
SHARE_TOKENS = 16384  # of 4 KiB
KV_DTYPES = ["bfloat16", "float8_e4m3"]


@cache  # asv sets up before every sample
def attention(case: str) -> Callable[[], None]:
    """The call of a named case, whose answer is right."""
    try:
        inputs = Inputs(find_cases([case])[0], Device("cpu"))
    except CaseError as error:  # too little memory: n/a
        raise NotImplementedError(str(error)) from error
    call = inputs.attend()
    check(inputs, call, inputs.out, reference_rows(inputs))
    return call


class Decode:
    """One query token a sequence: is the cache read as fast as memory allows, be the sequences long, many or uneven?"""

    params: ClassVar = [[case.name for case in CPU_DECODE]]
    param_names: ClassVar = ["case"]

    def setup(self, case: str) -> None:
        self.attend = attention(case)

    def time_attention(self, case: str) -> None:
        self.attend()


class Prefill:
    """A prompt at once, or a chunk beside decoding sequences: how near to the arithmetic's limit?"""

    params: ClassVar = [[case.name for case in CPU_PREFILL]]
    param_names: ClassVar = ["case"]

    def setup(self, case: str) -> None:
        self.attend = attention(case)

    def time_attention(self, case: str) -> None:
        self.attend()


@cache
def operation(make: Callable[..., Operation], **options: Any) -> Callable[[], None]:
    """The call of an operation on host arrays, whose answer is right."""
    return make(Device("cpu"), **options).call


class ReshapeAndCache:
    """4096 new tokens into their slots, as they are or rounded to 8 bits."""

    params: ClassVar = [KV_DTYPES]
    param_names: ClassVar = ["kv_dtype"]

    def setup(self, kv_dtype: str) -> None:
        self.scatter = operation(operations.reshape_and_cache, num_tokens=TOKENS, kv_dtype=kv_dtype)

    def time_reshape_and_cache(self, kv_dtype: str) -> None:
        self.scatter()


class GatherKV:
    """4096 tokens back to contiguous bfloat16, as they are or widened from 8 bits."""

    params: ClassVar = [KV_DTYPES]
    param_names: ClassVar = ["kv_dtype"]

    def setup(self, kv_dtype: str) -> None:
        self.gather = operation(operations.gather_kv, num_tokens=TOKENS, kv_dtype=kv_dtype)

    def time_gather_kv(self, kv_dtype: str) -> None:
        self.gather()


class CopyBlocks:
    """128 blocks of K and V within their caches: copy-on-write."""

    def setup(self) -> None:
        self.copy = operation(operations.copy_blocks, num_tokens=TOKENS // 2)

    def time_copy_blocks(self) -> None:
        self.copy()


class SwapBlocks:
    """128 blocks of K and V to other caches."""

    def setup(self) -> None:
        self.swap = operation(operations.swap_blocks, num_tokens=TOKENS // 2)

    def time_swap_blocks(self) -> None:
        self.swap()


class SwapShare:
    """64 MiB in scattered blocks to other caches: at which share of the rate of one contiguous copy by all threads?"""

    params: ClassVar = [[4096, 32768]]
    param_names: ClassVar = ["bytes a block"]
    unit = "% of a plain copy"

    def setup(self, piece: int) -> None:
        self.swap = operation(operations.swap_blocks, num_tokens=SHARE_TOKENS, piece=piece)
        threads = pagedattn.get_num_threads()
        source = np.ones(SHARE_TOKENS * 2048, np.uint16)
        self.parts = [np.array_split(array, threads) for array in (np.zeros_like(source), source)]
        self.pool = ThreadPoolExecutor(threads)

    def teardown(self, piece: int) -> None:
        self.pool.shutdown()

    def track_share(self, piece: int) -> dict[str, Any]:
        shares = []
        for _ in range(15):  # in turns, so that a drift of the machine meets both
            plain = _seconds(lambda: list(self.pool.map(np.copyto, *self.parts)))
            shares.append(100 * plain / _seconds(self.swap))
        return unjudged(median(shares))


def _seconds(work: Callable[[], Any]) -> float:
    begin = perf_counter()
    work()
    return perf_counter() - begin


class MergeStates:
    """Two parts of 1024 tokens and 32 heads of 128."""

    def setup(self) -> None:
        self.merge = operation(operations.merge_states, num_tokens=1024)

    def time_merge_states(self) -> None:
        self.merge()
