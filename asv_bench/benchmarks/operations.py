# SPDX-License-Identifier: Apache-2.0
"""The operations that move KV, on either backend: inputs made, answer checked, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pagedattn
from pagedattn._device import ELEMENT, ITEM_SIZE, STORAGE, Device
from pagedattn_bench.cases import decode, prefill
from pagedattn_bench.inputs import Inputs
from pagedattn_bench.peers.base import Prepared

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Operation:
    """A call whose answer is right, and the bytes that it reads and writes (swapping: that cross the bus).

    `plain` copies as many bytes between the same memories; where nothing is said, within the device.
    """

    call: Callable[[], None]
    num_bytes: int
    plain: Callable[[], None] | None = None
    capturable: bool = True

    def make_plain(self) -> Prepared:
        """The plain copy on CUDA, on CuPy's current stream."""
        if self.plain is not None:
            return Prepared(self.plain, None, capturable=self.capturable)
        import cupy

        source, target = (cupy.zeros(max(self.num_bytes // 2, 1), cupy.uint8) for _ in range(2))
        return Prepared(lambda: _copy_on_device(target, source), None)


def _copy_on_device(target: Any, source: Any) -> None:
    import cupy

    target.data.copy_from_device_async(source.data, source.nbytes, cupy.cuda.get_current_stream())


class PagedTokens:
    """Tokens of eight sequences, contiguous and in the shuffled blocks of a cache of 8 heads of 128."""

    def __init__(self, device: Device, num_tokens: int, kv_dtype: str = DTYPE) -> None:
        lengths = f"8x{num_tokens // 8}"
        self.inputs = inputs = Inputs(prefill("tokens", lengths, lengths, kv_dtype=kv_dtype), device)
        self.device, self.kv_dtype, self.num_tokens = device, kv_dtype, num_tokens
        self.case = case = inputs.case
        self.k_cache, self.v_cache = inputs.k_cache, inputs.v_cache
        self.token_shape = (case.kv_heads, case.head_dim)
        self.elements = 2 * num_tokens * case.kv_heads * case.head_dim
        slots = inputs.host_block_tables[:, :, None].astype(np.int64) * case.block_size + np.arange(case.block_size)
        self.slots = slots.reshape(len(case.kv_lens), -1)[:, : case.kv_lens[0]].reshape(-1)
        half = case.num_blocks // 2
        order = np.random.default_rng(2).permutation(case.num_blocks)
        self.mapping = np.stack([order[:half], order[half : 2 * half]], axis=1)
        # CuPy has no 8-bit float: the type of such a cache is told by name.
        self.options: dict[str, Any] = {} if kv_dtype == DTYPE else {"kv_dtype": kv_dtype}

    def tokens(self) -> list[np.ndarray]:
        """Random keys and values ``[T, Hkv, D]`` in host memory."""
        normal = np.random.default_rng(1).standard_normal((2, self.num_tokens, *self.token_shape), np.float32)
        return list(normal.astype(ELEMENT[DTYPE]))

    def put(self, array: np.ndarray) -> Any:
        """A host array of 16-bit floats on the device."""
        return self.device.put(array.view(STORAGE[DTYPE])).view(ELEMENT[DTYPE])

    def cached_tokens(self, cache: Any) -> np.ndarray:
        """What a cache holds, token by token, in host memory, in the cache's type."""
        bits = self.device.get(cache.view(STORAGE[self.kv_dtype])).reshape(-1, *self.token_shape)
        return bits[self.slots].view(ELEMENT[self.kv_dtype])

    def blocks(self, cache: Any) -> np.ndarray:
        """The bits of a cache, which may be in host memory, in host memory."""
        return self.device.get(cache.view(STORAGE[self.kv_dtype]))


def ensure(right: bool) -> None:
    """A wrong answer has no time."""
    if not right:
        raise AssertionError("wrong result")


def same_bits(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Whether arrays agree, NaNs included."""
    return np.array_equal(np.ascontiguousarray(actual).view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


def reshape_and_cache(device: Device, num_tokens: int, kv_dtype: str = DTYPE) -> Operation:
    """New tokens into their slots, as they are or rounded to 8 bits."""
    t = PagedTokens(device, num_tokens, kv_dtype)
    host = t.tokens()
    key, value = (t.put(array) for array in host)
    slots = device.put(t.slots)
    for cache in (t.k_cache, t.v_cache):
        cache.view(np.uint8)[...] = 0  # what is not written shows

    def call() -> None:
        pagedattn.reshape_and_cache(key, value, t.k_cache, t.v_cache, slots, **t.options)

    call()
    device.synchronize()
    for source, target in zip(host, (t.k_cache, t.v_cache), strict=True):
        ensure(same_bits(t.cached_tokens(target), source.astype(ELEMENT[kv_dtype])))
    return Operation(call, t.elements * (ITEM_SIZE[DTYPE] + ITEM_SIZE[kv_dtype]))


def reshape_and_cache_layers(device: Device, num_tokens: int, num_layers: int) -> Operation:
    """New tokens into the slots of several layers, all in one call; `num_tokens` are those of all layers together."""
    layers = [PagedTokens(device, num_tokens // num_layers) for _ in range(num_layers)]
    host = layers[0].tokens()
    keys, values = ([layers[0].put(array) for _ in layers] for array in host)
    slots = device.put(layers[0].slots)
    caches = [t.k_cache for t in layers], [t.v_cache for t in layers]
    for cache in (*caches[0], *caches[1]):
        cache.view(np.uint8)[...] = 0

    def call() -> None:
        pagedattn.reshape_and_cache(keys, values, *caches, slots)

    call()
    device.synchronize()
    for source, targets in zip(host, caches, strict=True):
        ensure(all(same_bits(layers[0].cached_tokens(target), source) for target in targets))
    return Operation(call, sum(t.elements for t in layers) * 2 * ITEM_SIZE[DTYPE])


def rope_and_cache(device: Device, num_tokens: int, q_heads: int = 0) -> Operation:
    """New tokens into their slots, their keys rotated on the way, and `q_heads` query heads beside them."""
    t = PagedTokens(device, num_tokens)
    host = t.tokens()
    key, value = (t.put(array) for array in host)
    rng = np.random.default_rng(4)
    positions = rng.integers(0, 4096, num_tokens)
    angles = rng.uniform(-np.pi, np.pi, (4096, t.case.head_dim // 2)).astype(np.float32)
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    query = t.put(np.ones((num_tokens, q_heads, t.case.head_dim), ELEMENT[DTYPE])) if q_heads else None
    query_out = None if query is None else device.xp.empty_like(query)
    arrays = [device.put(array) for array in (t.slots, positions, cos_sin)]
    options = {} if query is None else {"query": query, "query_out": query_out}

    def call() -> None:
        pagedattn.rope_and_cache(key, value, t.k_cache, t.v_cache, *arrays, **options)

    call()
    device.synchronize()
    ensure(same_bits(t.cached_tokens(t.v_cache), host[1]))
    wide, half = host[0].astype(np.float32), t.case.head_dim // 2
    cosine, sine = (part[positions][:, None] for part in (cos_sin[:, :half], cos_sin[:, half:]))
    first, second = wide[..., :half], wide[..., half:]
    rotated = np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    error = t.cached_tokens(t.k_cache).astype(np.float32) - rotated
    ensure(bool(np.linalg.norm(error) <= 4e-3 * np.linalg.norm(rotated)))
    num_bytes = 2 * ITEM_SIZE[DTYPE] * (t.elements + num_tokens * q_heads * t.case.head_dim)
    return Operation(call, num_bytes)


def gather_kv(device: Device, num_tokens: int, kv_dtype: str = DTYPE) -> Operation:
    """Pages back to contiguous bfloat16, as they are or widened from 8 bits."""
    t = PagedTokens(device, num_tokens, kv_dtype)
    i = t.inputs
    out = tuple(t.put(np.full((num_tokens, *t.token_shape), np.nan, ELEMENT[DTYPE])) for _ in range(2))

    def call() -> None:
        pagedattn.gather_kv(t.k_cache, t.v_cache, i.block_tables, i.seq_lens, out=out, **t.options)

    call()
    device.synchronize()
    for target, cache in zip(out, (t.k_cache, t.v_cache), strict=True):
        actual = device.get(target.view(STORAGE[DTYPE]))
        ensure(same_bits(actual, t.cached_tokens(cache).astype(ELEMENT[DTYPE])))
    return Operation(call, t.elements * (ITEM_SIZE[DTYPE] + ITEM_SIZE[kv_dtype]))


def copy_blocks(device: Device, num_tokens: int) -> Operation:
    """Half the blocks of K and V onto the other half: copy-on-write.  `num_tokens` tokens are copied."""
    t = PagedTokens(device, 2 * num_tokens)
    caches, mapping = [t.k_cache, t.v_cache], device.put(t.mapping)
    expected = [t.blocks(cache)[t.mapping[:, 0]] for cache in caches]

    def call() -> None:
        pagedattn.copy_blocks(caches, mapping)

    call()
    device.synchronize()
    for cache, blocks in zip(caches, expected, strict=True):
        ensure(same_bits(t.blocks(cache)[t.mapping[:, 1]], blocks))
    return Operation(call, t.elements * ITEM_SIZE[DTYPE])


def swap_blocks(device: Device, num_tokens: int, *, back: bool = False, piece: int = 32 << 10) -> Operation:
    """Half the blocks of K and V, of `piece` bytes, to (or from) host memory, page-locked where there is a device."""
    t = PagedTokens(device, 2 * num_tokens)
    caches = [_in_pieces(cache, piece) for cache in (t.k_cache, t.v_cache)]
    others = _host_blocks(device, caches)
    rng = np.random.default_rng(3)
    for other in others:
        other[...] = rng.integers(0, 1 << 15, other.shape, np.uint16)
    half = len(caches[0]) // 2
    order = rng.permutation(len(caches[0]))
    mapping = np.stack([order[:half], rng.permutation(len(caches[0]))[:half]], axis=1)
    sources, targets = (others, caches) if back else (caches, others)
    expected = [_host(device, source)[mapping[:, 0]] for source in sources]

    def call() -> None:
        pagedattn.swap_blocks(sources, targets, mapping)

    call()
    device.synchronize()
    for target, blocks in zip(targets, expected, strict=True):
        ensure(np.array_equal(_host(device, target)[mapping[:, 1]], blocks))
    num_bytes = 2 * half * piece  # a bus is crossed once
    plain = None if device.backend == "cpu" else _plain_swap(device, num_bytes, back)
    return Operation(call, num_bytes, plain, capturable=False)


def swap_both_ways(device: Device, num_tokens: int, piece: int) -> Operation:
    """Blocks of `piece` bytes, from the device and to it at once, on streams of their own."""
    ways = [swap_blocks(device, num_tokens, back=back, piece=piece) for back in (False, True)]
    plain = [way.plain for way in ways]
    return Operation(
        _at_once([way.call for way in ways]),
        sum(way.num_bytes for way in ways),
        _at_once([call for call in plain if call is not None]),
        capturable=False,
    )


def _at_once(calls: list[Callable[[], None]]) -> Callable[[], None]:
    """The calls on a stream each, all between what comes before on CuPy's current stream and what comes behind."""
    import cupy

    streams = [cupy.cuda.Stream(non_blocking=True) for _ in calls]

    def together() -> None:
        current = cupy.cuda.get_current_stream()
        begin = current.record()
        for stream, call in zip(streams, calls, strict=True):
            stream.wait_event(begin)
            with stream:
                call()
            current.wait_event(stream.record())

    return together


def decode_beside_swap(device: Device, num_tokens: int, *, back: bool) -> Operation:
    """Three steps of decoding while a swap of blocks of 4 KB takes somewhat longer; `plain` is without the swap."""
    import cupy

    swap = swap_blocks(device, num_tokens, back=back, piece=4096)
    inputs = Inputs(decode("beside", "32x4096"), device)
    attend = inputs.attend()
    stream = cupy.cuda.Stream(non_blocking=True)

    def alone() -> None:
        for _ in range(3):
            attend()

    def beside() -> None:
        stream.wait_event(cupy.cuda.get_current_stream().record())
        with stream:
            swap.call()
        alone()

    return Operation(beside, 3 * inputs.case.bytes, alone, capturable=False)


def _host_blocks(device: Device, caches: list[Any]) -> list[np.ndarray]:
    """As many blocks in host memory; NumPy's where that is all there is, which commits without HostCache have too."""
    if device.backend == "cpu":
        return [np.empty_like(cache) for cache in caches]
    return pagedattn.HostCache(caches, len(caches[0])).caches


def _in_pieces(cache: Any, piece: int) -> Any:
    return cache.view(np.uint16).reshape(-1, piece // 2)


def _host(device: Device, array: Any) -> np.ndarray:
    host: np.ndarray = array if isinstance(array, np.ndarray) else device.get(array)
    return host


def _plain_swap(device: Device, num_bytes: int, back: bool) -> Callable[[], None]:
    """One contiguous copy between page-locked and device memory."""
    near = device.xp.zeros(num_bytes, np.uint8)
    (far,) = pagedattn.HostCache(near.reshape(1, -1), 1).caches
    far = far.reshape(-1)

    def call() -> None:
        stream = device.xp.cuda.get_current_stream()
        if back:
            near.data.copy_from_host_async(far.ctypes.data, num_bytes, stream)
        else:
            near.data.copy_to_host_async(far.ctypes.data, num_bytes, stream)

    return call


def merge_states(device: Device, num_tokens: int) -> Operation:
    """Two partial results of 32 heads joined."""
    rng = np.random.default_rng(0)
    host_outs = rng.standard_normal((2, num_tokens, 32, 128), np.float32)
    host_lses = rng.standard_normal((2, num_tokens, 32), np.float32)
    outs, lses = device.put(host_outs), device.put(host_lses)
    out, lse = device.xp.full_like(outs[0], np.nan), device.xp.full_like(lses[0], np.nan)

    def call() -> None:
        pagedattn.merge_states(outs, lses, out=out, lse=lse)

    call()
    device.synchronize()
    weights = np.exp(host_lses.astype(np.float64))
    expected = (weights[..., None] * host_outs).sum(axis=0) / weights.sum(axis=0)[..., None]
    ensure(bool(np.linalg.norm(device.get(out) - expected) <= 1e-5 * np.linalg.norm(expected)))
    ensure(np.allclose(device.get(lse), np.log(weights.sum(axis=0)), atol=1e-5))
    return Operation(call, host_outs.nbytes + host_outs.nbytes // 2 + host_lses.nbytes + host_lses.nbytes // 2)
