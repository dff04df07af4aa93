# SPDX-License-Identifier: Apache-2.0
"""How fast are the operations on the CPU?  Inputs are made and answers checked once a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ClassVar

import numpy as np
import pagedattn
from pagedattn._device import ELEMENT, STORAGE, Device
from pagedattn_bench.accuracy import check, reference_rows
from pagedattn_bench.cases import CPU_DECODE, CPU_PREFILL, CaseError, find_cases, prefill
from pagedattn_bench.inputs import Inputs

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


class PagedTokens:
    """4096 tokens of eight sequences: contiguous, and in the shuffled blocks of a cache of 8 heads of 128."""

    def __init__(self, kv_dtype: str) -> None:
        case = prefill("tokens", "8x512", "8x512", kv_dtype=kv_dtype)
        self.inputs = inputs = Inputs(case, Device("cpu"))
        self.k_cache, self.v_cache = inputs.k_cache, inputs.v_cache
        shape = (2, sum(case.kv_lens), case.kv_heads, case.head_dim)
        normal = np.random.default_rng(1).standard_normal(shape, np.float32)
        self.key, self.value = normal.astype(ELEMENT["bfloat16"])
        slots = inputs.host_block_tables[:, :, None].astype(np.int64) * case.block_size + np.arange(case.block_size)
        self.slots = slots.reshape(-1)
        half = case.num_blocks // 2
        order = np.random.default_rng(2).permutation(2 * half)
        self.mapping = np.stack([order[:half], order[half:]], axis=1)

    def bits(self, array: np.ndarray) -> np.ndarray:
        """An array of the cache's type as integers, since NaN is not itself."""
        return array.view(STORAGE[self.inputs.case.kv_dtype])


def ensure(right: bool) -> None:
    """A wrong answer has no time."""
    if not right:
        raise AssertionError("wrong result")


@cache
def scattered(kv_dtype: str) -> Callable[[], None]:
    """reshape_and_cache, checked."""
    t = PagedTokens(kv_dtype)
    # A call is to overwrite what was there.
    t.bits(t.k_cache)[...] = 0
    t.bits(t.v_cache)[...] = 0

    def call() -> None:
        pagedattn.reshape_and_cache(t.key, t.value, t.k_cache, t.v_cache, t.slots)

    call()
    for source, target in ((t.key, t.k_cache), (t.value, t.v_cache)):
        written = target.reshape(-1, *source.shape[1:])[t.slots]
        ensure(np.array_equal(t.bits(written), t.bits(source.astype(ELEMENT[kv_dtype]))))
    return call


@cache
def gathered(kv_dtype: str) -> Callable[[], None]:
    """gather_kv to bfloat16, checked."""
    t = PagedTokens(kv_dtype)
    i = t.inputs
    out = (np.empty_like(t.key), np.empty_like(t.value))

    def call() -> None:
        pagedattn.gather_kv(t.k_cache, t.v_cache, i.block_tables, i.seq_lens, out=out)

    call()
    for target, cache_ in zip(out, (t.k_cache, t.v_cache), strict=True):
        expected = cache_.reshape(-1, *target.shape[1:])[t.slots].astype(target.dtype)
        ensure(np.array_equal(target.view(np.uint16), expected.view(np.uint16)))
    return call


@cache
def copied() -> Callable[[], None]:
    """copy_blocks of half the blocks, checked."""
    t = PagedTokens("bfloat16")
    caches = [t.k_cache, t.v_cache]

    def call() -> None:
        pagedattn.copy_blocks(caches, t.mapping)

    expected = [t.bits(array)[t.mapping[:, 0]].copy() for array in caches]
    call()
    for array, blocks in zip(caches, expected, strict=True):
        ensure(np.array_equal(t.bits(array)[t.mapping[:, 1]], blocks))
    return call


@cache
def swapped() -> Callable[[], None]:
    """swap_blocks of half the blocks to another cache, checked."""
    t = PagedTokens("bfloat16")
    caches = [t.k_cache, t.v_cache]
    others = [np.zeros_like(array) for array in caches]

    def call() -> None:
        pagedattn.swap_blocks(caches, others, t.mapping)

    call()
    for array, other in zip(caches, others, strict=True):
        ensure(np.array_equal(t.bits(other)[t.mapping[:, 1]], t.bits(array)[t.mapping[:, 0]]))
    return call


@cache
def merged() -> Callable[[], None]:
    """merge_states of two parts, checked."""
    rng = np.random.default_rng(0)
    outs, lses = rng.standard_normal((2, 1024, 32, 128), np.float32), rng.standard_normal((2, 1024, 32), np.float32)
    out, lse = np.empty_like(outs[0]), np.empty_like(lses[0])

    def call() -> None:
        pagedattn.merge_states(outs, lses, out=out, lse=lse)

    call()
    weights = np.exp(lses.astype(np.float64))
    expected = (weights[..., None] * outs).sum(axis=0) / weights.sum(axis=0)[..., None]
    ensure(bool(np.linalg.norm(out - expected) <= 1e-5 * np.linalg.norm(expected)))
    ensure(np.allclose(lse, np.log(weights.sum(axis=0)), atol=1e-5))
    return call


class ReshapeAndCache:
    """4096 new tokens into their slots, as they are or rounded to 8 bits."""

    params: ClassVar = [KV_DTYPES]
    param_names: ClassVar = ["kv_dtype"]

    def setup(self, kv_dtype: str) -> None:
        self.scatter = scattered(kv_dtype)

    def time_reshape_and_cache(self, kv_dtype: str) -> None:
        self.scatter()


class GatherKV:
    """4096 tokens back to contiguous bfloat16, as they are or widened from 8 bits."""

    params: ClassVar = [KV_DTYPES]
    param_names: ClassVar = ["kv_dtype"]

    def setup(self, kv_dtype: str) -> None:
        self.gather = gathered(kv_dtype)

    def time_gather_kv(self, kv_dtype: str) -> None:
        self.gather()


class CopyBlocks:
    """128 blocks of K and V within their caches: copy-on-write."""

    def setup(self) -> None:
        self.copy = copied()

    def time_copy_blocks(self) -> None:
        self.copy()


class SwapBlocks:
    """128 blocks of K and V to other caches."""

    def setup(self) -> None:
        self.swap = swapped()

    def time_swap_blocks(self) -> None:
        self.swap()


class MergeStates:
    """Two parts of 1024 tokens and 32 heads of 128."""

    def setup(self) -> None:
        self.merge = merged()

    def time_merge_states(self) -> None:
        self.merge()
