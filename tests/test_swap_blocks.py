"""swap_blocks: whole blocks from host to host, host to device, device to host and device to device.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_same_bytes
from backends import DTYPES, CupyBackend, NumpyBackend, is_float8
from batches import LAYOUTS, cache_views
from cuda_graphs import capture, refill
from test_copy_blocks import random_bytes


@pytest.fixture(
    params=[
        "host to host",
        pytest.param("host to device", marks=pytest.mark.gpu),
        pytest.param("device to host", marks=pytest.mark.gpu),
        pytest.param("device to device", marks=pytest.mark.gpu),
    ]
)
def sides(request: pytest.FixtureRequest) -> tuple[NumpyBackend, NumpyBackend]:
    """The backends that the source and the destination live on."""
    host = NumpyBackend()
    if request.param == "host to host":
        return host, host
    device = request.getfixturevalue("cuda")
    source, _, destination = request.param.partition(" to ")
    return (device if source == "device" else host), (device if destination == "device" else host)


def random_mapping(rng: np.random.Generator, num_src: int, num_dst: int, num_pairs: int) -> np.ndarray:
    """Return pairs without a destination twice; sources may repeat."""
    return np.stack([rng.integers(0, num_src, num_pairs), rng.permutation(num_dst)[:num_pairs]], axis=1)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("src_layout", ["NHD", "HND", "interleaved NHD", "padded"])
@pytest.mark.parametrize("dst_layout", ["NHD", "HND", "interleaved HND", "packed heads"])
def test_blocks_are_swapped_between_any_strides_and_no_other_byte_changes(
    sides: tuple[NumpyBackend, NumpyBackend], rng: np.random.Generator, dtype: str, src_layout: str, dst_layout: str
) -> None:
    stored: Any = np.uint8 if is_float8(DTYPES[dtype]) else DTYPES[dtype]  # CuPy knows no float8
    src, _ = cache_views(9, 4, 2, 16, stored, src_layout)
    dst, _ = cache_views(14, 4, 2, 16, stored, dst_layout)
    random_bytes(rng, src, dst)
    mapping = random_mapping(rng, 9, 14, 8)
    moved_src, moved_dst = sides[0].array(src), sides[1].array(dst)
    assert pagedattn.swap_blocks(moved_src, moved_dst, mapping) is None
    reference.copy_blocks(src, dst, mapping)
    assert_same_bytes(sides[1].host(moved_dst), dst)
    assert_same_bytes(sides[0].host(moved_src), src)
    root = NumpyBackend().allocation(dst)
    assert_same_bytes(sides[1].allocation(moved_dst)[: root.size], root)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_the_caches_of_many_layers_are_swapped_in_one_call(
    sides: tuple[NumpyBackend, NumpyBackend], rng: np.random.Generator, layout: str
) -> None:
    src = [c for _ in range(5) for c in cache_views(20, 16, 2, 64, np.float16, layout)]
    dst = [c for _ in range(5) for c in cache_views(30, 16, 2, 64, np.float16, layout)]
    random_bytes(rng, *src, *dst)
    mapping = random_mapping(rng, 20, 30, 25)
    moved_src, moved_dst = sides[0].arrays(*src), sides[1].arrays(*dst)
    pagedattn.swap_blocks(list(moved_src), list(moved_dst), mapping)
    for actual, one_src, one_dst in zip(moved_dst, src, dst, strict=True):
        reference.copy_blocks(one_src, one_dst, mapping)
        assert_same_bytes(sides[1].host(actual), one_dst)


def test_an_empty_mapping_swaps_nothing(sides: tuple[NumpyBackend, NumpyBackend], rng: np.random.Generator) -> None:
    src, dst = np.empty((4, 3, 2, 8), np.float16), np.empty((4, 3, 2, 8), np.float16)
    random_bytes(rng, src, dst)
    moved_src, moved_dst = sides[0].array(src), sides[1].array(dst)
    pagedattn.swap_blocks(moved_src, moved_dst, np.empty((0, 2), np.int64))
    assert_same_bytes(sides[1].host(moved_dst), dst)


@pytest.fixture(params=["the library's choice", "kernel", "kernel:3", "memcpy", "batch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One way to swap page-locked blocks, and the kernel that must have served the call; "" where it is open."""
    if " " in request.param:
        return ""
    monkeypatch.setenv("PAGEDATTN_SWAP", request.param)
    return f"cuda::swap_blocks_{request.param.partition(':')[0]}"


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("shape", [(16, 2, 64), (1, 1, 8), (3, 5, 7), (4, 8, 128)])
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved NHD", "8 bytes off", "odd rows"])
def test_page_locked_blocks_are_swapped_every_way_and_no_other_byte_changes(
    cuda: CupyBackend, rng: np.random.Generator, way: str, layout: str, shape: tuple[int, int, int], direction: str
) -> None:
    # One cache of each pair of views, since the caches of one call share their strides; 5 more blocks on the host.
    device = [cache_views(40, *shape, np.float16, layout)[0] for _ in range(3)]
    random_bytes(rng, *device)
    moved = cuda.arrays(*device)
    host = pagedattn.HostCache(list(moved), 45)
    assert host.page_locked
    random_bytes(rng, *host.caches)
    before = [cache.copy() for cache in host.caches]
    stream, event = cuda.cupy.cuda.Stream(non_blocking=True), cuda.cupy.cuda.Event()
    cuda.synchronize()  # uploads ran on another stream
    sources, targets = (list(moved), host.caches) if direction == "out" else (host.caches, list(moved))
    mapping = random_mapping(rng, len(sources[0]), len(targets[0]), 31)
    given = mapping.copy()
    pagedattn.swap_blocks(sources, targets, given, event=event, stream=stream)
    assert pagedattn.last_kernel() == way or not way
    given[...] = -1  # it has been read
    event.synchronize()
    for old_device, old_host in zip(device, before, strict=True):
        if direction == "out":
            reference.copy_blocks(old_device, old_host, mapping)
        else:
            reference.copy_blocks(old_host, old_device, mapping)
    for actual, expected in zip(moved, device, strict=True):
        assert_same_bytes(cuda.host(actual), expected)
        root = NumpyBackend().allocation(expected)
        assert_same_bytes(cuda.allocation(actual)[: root.size], root)
    for cache, old in zip(host.caches, before, strict=True):
        assert_same_bytes(cache, old)


@pytest.mark.gpu
def test_swaps_between_devices_and_pageable_memory_say_how_they_went(
    cuda: CupyBackend, rng: np.random.Generator
) -> None:
    host = np.empty((50, 4, 2, 8), np.float16)
    random_bytes(rng, host)
    one, other = cuda.arrays(host, host.copy())
    mapping = random_mapping(rng, 50, 50, 20)
    pagedattn.swap_blocks(one, other, mapping)
    assert pagedattn.last_kernel() == "cuda::swap_blocks_kernel"
    back = np.empty_like(host)
    pagedattn.swap_blocks(one, back, mapping)
    assert pagedattn.last_kernel() == "cuda::swap_blocks_pageable"
    few = np.arange(6).repeat(2).reshape(6, 2)
    locked = pagedattn.HostCache(one, 6)
    pagedattn.swap_blocks(one, locked.caches, few)
    assert pagedattn.last_kernel() == "cuda::swap_blocks_memcpy"
    cuda.synchronize()
    assert_same_bytes(locked.caches[0], host[:6])


@pytest.mark.gpu
def test_an_unknown_way_to_swap_is_refused_by_name(cuda: CupyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda.array(np.zeros((4, 8), np.float32))
    host = pagedattn.HostCache(device, 4)
    host.caches[0][...] = 7
    for value in ("magic", "kernel:", "kernel:0", "kernel:65536", "kernel:x", "kernel:5x"):
        monkeypatch.setenv("PAGEDATTN_SWAP", value)
        with pytest.raises(pagedattn.InvalidArgumentError, match=f"PAGEDATTN_SWAP.*{value}"):
            pagedattn.swap_blocks(device, host.caches, np.array([[0, 1]]))
    assert (host.caches[0] == 7).all()


@pytest.mark.gpu
def test_100_000_blocks_are_swapped_out_and_in(cuda: CupyBackend, rng: np.random.Generator) -> None:
    blocks = np.empty((100_000, 64), np.uint16)
    random_bytes(rng, blocks)
    device, returned = cuda.arrays(blocks, np.zeros_like(blocks))
    host = pagedattn.HostCache(device, 120_000)
    places = rng.permutation(120_000)[:100_000]
    order = rng.permutation(100_000)
    pagedattn.swap_blocks(device, host.caches, np.stack([order, places], axis=1))
    pagedattn.swap_blocks(host.caches, returned, np.stack([places, order], axis=1))
    assert_same_bytes(cuda.host(returned), blocks)
    assert_same_bytes(host.caches[0][places], blocks[order])


@pytest.mark.gpu
def test_a_captured_swap_is_replayed_with_new_contents(cuda: CupyBackend, rng: np.random.Generator) -> None:
    blocks = np.empty((30, 4, 2, 8), np.float16)
    random_bytes(rng, blocks)
    device = cuda.array(blocks)
    host = pagedattn.HostCache(device, 30)
    mapping = random_mapping(rng, 30, 30, 17)
    replay = capture(cuda, lambda stream: pagedattn.swap_blocks(device, host.caches, mapping, stream=stream))
    for _ in range(3):
        random_bytes(rng, blocks)
        refill(device, blocks)
        replay()
        assert_same_bytes(host.caches[0][mapping[:, 1]], blocks[mapping[:, 0]])


@pytest.mark.gpu
def test_page_locked_host_memory_comes_back_as_it_went(cuda: CupyBackend, rng: np.random.Generator) -> None:
    shape, count = (20, 16, 2, 64), 20 * 16 * 2 * 64
    memory = cuda.cupy.cuda.alloc_pinned_memory(2 * count)
    pinned = np.frombuffer(memory, np.float16, count).reshape(shape)
    blocks = np.empty(shape, np.float16)
    random_bytes(rng, blocks)
    device = cuda.array(blocks)
    stream = cuda.cupy.cuda.Stream(non_blocking=True)
    out, back = random_mapping(rng, 20, 20, 12), np.arange(20).repeat(2).reshape(20, 2)
    pinned[...] = 0
    returned = cuda.array(np.zeros(shape, np.float16))
    cuda.synchronize()  # uploads ran on another stream
    pagedattn.swap_blocks(device, pinned, out, stream=stream)
    pagedattn.swap_blocks(pinned, returned, back, stream=stream)
    stream.synchronize()
    expected = np.zeros(shape, np.float16)
    reference.copy_blocks(blocks, expected, out)
    assert_same_bytes(cuda.host(returned), expected)
