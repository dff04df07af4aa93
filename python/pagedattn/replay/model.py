# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a language model: queries, keys and values that cost next to nothing and can be made again.

Each vector is a window of one fixed pool of normal numbers; where the window starts is a hash of (token, position,
all tokens before, layer, head).  Sequences with an equal prefix thus have equal keys and values over it, as in a real
model, and any other two keys differ: a block that is shared wrongly, reused too early or found under the wrong table
entry changes the result.  The pool is rounded once to the model's type, so making a vector is copying it, and the
verification can take any key of any sequence from the same pool without knowing where the cache holds it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pagedattn._device import ELEMENT, STORAGE, Device

from .hashing import GOLDEN, key, mix
from .settings import LARGEST, Settings

# 2**20 windows: two vectors are equal by chance once in a million, and the pool (4 MiB at most) stays in a cache.
_WINDOW_BITS = 20
_Q, _K, _V = 0, 1, 2


class Model:
    """Queries, keys and values as functions of a sequence's tokens.

    Parameters
    ----------
    settings : Settings
        Shape, types and seed.
    device : Device
        Where :meth:`project` makes its arrays.
    """

    def __init__(self, settings: Settings, device: Device) -> None:
        self._settings = settings
        self._device = device
        numbers = np.random.default_rng([settings.seed, 0xA77]).standard_normal(
            2**_WINDOW_BITS + settings.head_dim - 1, np.float32
        )
        self._pool = numbers.astype(ELEMENT[settings.dtype])
        self._bits = device.put(self._pool.view(STORAGE[settings.dtype]))
        self._span = device.xp.arange(settings.head_dim)
        heads = [(_Q, h) for h in range(settings.heads)]
        heads += [(kind, h) for kind in (_K, _V) for h in range(settings.kv_heads)]
        self._lanes = np.array(
            [[key(settings.seed, layer, kind, h) for kind, h in heads] for layer in range(settings.layers)], np.uint64
        )
        self._device_lanes = device.put(self._lanes)
        self.kv_scale = self._calibrate() if settings.quantised else 1.0

    def _calibrate(self) -> float:
        # The least power of two that brings the largest number into the cache type's range.  Dividing by a power of
        # two is exact, so the verification rounds exactly where the kernels do.
        largest = float(np.abs(self._pool.astype(np.float32)).max())
        return 2.0 ** math.ceil(math.log2(largest / LARGEST[self._settings.cache_dtype]))

    @staticmethod
    def digests(tokens: NDArray[np.int32]) -> NDArray[np.uint64]:
        """For each token, a number that stands for it, its position and all tokens before it."""
        positions = np.arange(1, len(tokens) + 1, dtype=np.uint64)
        return np.cumsum(mix(tokens.astype(np.uint64) * GOLDEN + positions), dtype=np.uint64)

    def project(self, digests: Any, layer: int) -> tuple[Any, Any, Any]:
        """Queries ``[T, Hq, D]``, keys and values ``[T, Hkv, D]`` of `T` tokens, on the device.

        The three are views of one array, as the output of a fused projection is.
        """
        heads, kv_heads = self._settings.heads, self._settings.kv_heads
        starts = _starts(digests[:, None], self._device_lanes[layer])
        if self._device.backend == "cpu":
            bits = sliding_window_view(self._bits, self._settings.head_dim)[starts]
        else:
            bits = self._bits[starts[..., None] + self._span]
        qkv = bits.view(ELEMENT[self._settings.dtype])
        return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]

    def query(self, digest: np.uint64, layer: int, head: int) -> NDArray[np.float64]:
        """One query ``[D]`` on the host."""
        exact: NDArray[np.float64] = self._dense(np.array([digest]), layer, head)[0].astype(np.float64)
        return exact

    def keys_values(
        self, digests: NDArray[np.uint64], layer: int, kv_head: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Keys and values ``[L, D]`` of one head on the host, rounded as the cache rounds them."""
        first = self._settings.heads + kv_head
        keys = self._dense(digests, layer, first)
        values = self._dense(digests, layer, first + self._settings.kv_heads)
        return self._stored(keys), self._stored(values)

    def _dense(self, digests: NDArray[np.uint64], layer: int, lane: int) -> NDArray[Any]:
        starts = _starts(digests, self._lanes[layer, lane])
        windows: NDArray[Any] = self._pool[starts[:, None] + np.arange(self._settings.head_dim)]
        return windows

    def _stored(self, vectors: NDArray[Any]) -> NDArray[np.float64]:
        if not self._settings.quantised:
            return vectors.astype(np.float64)
        stored = (vectors.astype(np.float32) / np.float32(self.kv_scale)).astype(ELEMENT[self._settings.cache_dtype])
        return stored.astype(np.float64) * self.kv_scale


def _starts(digests: Any, lanes: Any) -> Any:
    # The high bits of a product are its best mixed.
    return (mix(digests ^ lanes) >> np.uint64(64 - _WINDOW_BITS)).astype(np.int64)
