# SPDX-License-Identifier: Apache-2.0
"""The caches of a replay: one pair a layer, refused before anything is allocated where memory is short."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedattn._device import ELEMENT, STORAGE, Device
from pagedattn._units import show_bytes

from .settings import Settings, SettingsError


def make_caches(device: Device, settings: Settings, num_blocks: int) -> list[tuple[Any, Any]]:
    """A (key cache, value cache) pair for each layer, filled with NaN.

    A slot that is read before it was written then spoils a result, and the verification sees it.
    """
    size = settings.block_bytes * num_blocks
    working = settings.working_bytes(num_blocks)
    free = device.free_memory()
    if free is not None and size + working > free:
        raise SettingsError(
            f"a cache of {num_blocks} blocks takes {show_bytes(size)} and a step {show_bytes(working)}, while "
            f"{show_bytes(free)} are free: give a smaller --num-blocks, --memory, --chunk or model"
        )
    shape = (num_blocks, settings.block_size, settings.kv_heads, settings.head_dim)
    storage = STORAGE[settings.cache_dtype]
    # All bits set is NaN in every one of the types.
    fill = storage.type(np.iinfo(storage).max)

    def cache() -> Any:
        bits = device.xp.full(shape, fill, storage)
        return bits if settings.quantised else bits.view(ELEMENT[settings.cache_dtype])

    return [(cache(), cache()) for _ in range(settings.layers)]
