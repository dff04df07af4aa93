# SPDX-License-Identifier: Apache-2.0
"""What does a call cost before any work: arguments read and checked, a kernel chosen, and launched?

The arrays are as small as can be.  On CUDA nothing waits for the device, and nothing is allocated.
"""

from __future__ import annotations

from functools import cache
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import pagedattn
from pagedattn._device import ELEMENT, Device, cuda_missing
from pagedattn_bench.cases import Case
from pagedattn_bench.inputs import Inputs

from .cuda_run import timed

BACKENDS = ["cpu", "cuda"]
TINY = Case("tiny", (1,), (1,), heads=1, kv_heads=1, head_dim=8, dtype="float16", kv_dtype="float16")


@cache  # asv sets up before every sample
def tiny(backend: str) -> Inputs:
    """One token, one head of 8."""
    if backend == "cuda" and (reason := cuda_missing()):
        raise NotImplementedError(reason)
    return Inputs(TINY, Device(backend))


class PagedAttention:
    """100 calls on one token."""

    params: ClassVar = [BACKENDS]
    param_names: ClassVar = ["backend"]

    def setup(self, backend: str) -> None:
        inputs = tiny(backend)
        self.attend = inputs.attend()
        inputs.poison_out()
        self.attend()
        inputs.device.synchronize()
        # One key: the answer is its value.
        assert (inputs.device.get(inputs.out) == inputs.sequence(0)[1][:, 0]).all()

    def time_100_calls(self, backend: str) -> None:
        attend = self.attend
        for _ in range(100):
            attend()


class ReshapeAndCache:
    """100 calls on one token."""

    params: ClassVar = [BACKENDS]
    param_names: ClassVar = ["backend"]

    def setup(self, backend: str) -> None:
        inputs = tiny(backend)
        ones = np.ones((1, TINY.kv_heads, TINY.head_dim), ELEMENT[TINY.kv_dtype])
        self.arguments: tuple[Any, ...] = (
            *(inputs.device.put(array) for array in (ones, 2 * ones)),
            *(inputs.device.xp.zeros_like(array) for array in (inputs.k_cache, inputs.v_cache)),
            inputs.device.put(np.array([3], np.int64)),
        )
        pagedattn.reshape_and_cache(*self.arguments)
        inputs.device.synchronize()
        assert (inputs.device.get(self.arguments[3])[0, 3] == 2).all()

    def time_100_calls(self, backend: str) -> None:
        arguments = self.arguments
        for _ in range(100):
            pagedattn.reshape_and_cache(*arguments)


class SwapBlocks:
    """A call for 10 000 scattered blocks of 4 KB, while the device has nothing to do."""

    params: ClassVar = [[1, 2, 64]]
    param_names: ClassVar = ["caches"]
    num_pairs = 10_000

    def setup(self, num_caches: int) -> None:
        if reason := cuda_missing():
            raise NotImplementedError(reason)
        self.device = Device("cuda")
        self.caches = [self.device.xp.zeros((2 * self.num_pairs, 4096), np.uint8) for _ in range(num_caches)]
        self.caches[-1][...] = 7
        self.host = pagedattn.HostCache(self.caches, 2 * self.num_pairs)
        mapping = self.swap()
        self.device.synchronize()
        assert (self.host.caches[-1][mapping[:, 1]] == 7).all()

    def swap(self) -> np.ndarray:
        rng = np.random.default_rng()
        mapping = np.stack([rng.permutation(2 * self.num_pairs)[: self.num_pairs] for _ in range(2)], axis=1)
        self.device.synchronize()
        begin = perf_counter()
        pagedattn.swap_blocks(self.caches, self.host.caches, mapping)
        self.seconds = perf_counter() - begin
        return mapping

    def track_seconds(self, num_caches: int) -> dict[str, Any]:
        samples = []
        for _ in range(31):
            self.swap()
            samples.append(self.seconds)
        self.device.synchronize()
        return timed(samples)

    track_seconds.type = "time"  # type: ignore[attr-defined]
    track_seconds.unit = "seconds"  # type: ignore[attr-defined]
