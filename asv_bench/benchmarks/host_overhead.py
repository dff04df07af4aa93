# SPDX-License-Identifier: Apache-2.0
"""What does a call cost before any work: arguments read and checked, a kernel chosen, and launched?

The arrays are as small as can be.  On CUDA nothing waits for the device, and nothing is allocated.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import numpy as np
import pagedattn
from pagedattn._device import ELEMENT, Device, cuda_missing
from pagedattn_bench.cases import Case
from pagedattn_bench.inputs import Inputs

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
