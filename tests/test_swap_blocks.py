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


@pytest.mark.parametrize("skipped", [0, 1, 2, 3])
@pytest.mark.parametrize("num_pairs", [1, 3, 4, 5, 9, 40])
def test_a_number_out_of_range_is_found_wherever_it_stands(num_pairs: int, skipped: int) -> None:
    # In memory that begins anywhere within a line.
    place = np.empty((num_pairs + skipped, 2), np.int64)[skipped:]
    src, dst = np.zeros((50, 8), np.uint8), np.full((60, 8), 7, np.uint8)
    good = np.stack([np.arange(num_pairs), np.arange(num_pairs)[::-1]], axis=1)
    for pair in range(num_pairs):
        for side, values in ((0, (-1, 50, 2**32, 2**63 - 1, -(2**63))), (1, (-1, 60, 2**32 + 1, 2**63 - 1, -(2**63)))):
            for value in values:
                mapping = place
                mapping[...] = good
                mapping[pair, side] = value
                name = f"`block_mapping`\\[{pair}\\] names {('source', 'destination')[side]} block {value}; there are"
                with pytest.raises(pagedattn.InvalidArgumentError, match=f"^swap_blocks: {name}"):
                    pagedattn.swap_blocks(src, dst, mapping)
    assert (dst == 7).all()
    pagedattn.swap_blocks(src, dst, good)
    assert (dst[:num_pairs] == 0).all()


@pytest.fixture(params=["the library's choice", "bulk", "bulk:3", "kernel", "kernel:3", "memcpy", "batch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One way to swap page-locked blocks, and the kernel that must have served the call; "" where it is open."""
    if " " in request.param:
        return ""
    monkeypatch.setenv("PAGEDATTN_SWAP", request.param)
    return f"cuda::swap_blocks_{request.param.partition(':')[0]}"


def has_bulk_copies(cuda: CupyBackend) -> bool:
    return int(cuda.cupy.cuda.Device().compute_capability) >= 90


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
    if way == "cuda::swap_blocks_bulk":
        # Blocks that lie in one piece, at multiples of 16 bytes.
        whole = all(c[0].flags.c_contiguous and c.strides[0] % 16 == 0 and c.ctypes.data % 16 == 0 for c in device)
        if not (whole and device[0][0].nbytes % 16 == 0 and has_bulk_copies(cuda)):
            way = "cuda::swap_blocks_kernel"
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
@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize(
    "block_bytes", [16, 48, 256, 272, 512, 528, 1024, 2032, 2048, 2064, 4080, 4096, 4112, 9216, 12304, 131072]
)
def test_bulk_copies_cut_blocks_of_any_size_into_pieces(
    cuda: CupyBackend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block_bytes: int, direction: str
) -> None:
    # From a round that is not full to many rounds a warp, whose order nobody knows.
    for warps, num_pairs in ((1, 1), (1, 77), (2, 333), (33, 5)):
        monkeypatch.setenv("PAGEDATTN_SWAP", f"bulk:{warps}")
        blocks = [np.empty((num_pairs + 3, block_bytes), np.uint8) for _ in range(3)]
        random_bytes(rng, *blocks)
        device = cuda.arrays(*blocks)
        host = pagedattn.HostCache(list(device), num_pairs + 9)
        random_bytes(rng, *host.caches)
        before = [cache.copy() for cache in host.caches]
        sources, targets = (list(device), host.caches) if direction == "out" else (host.caches, list(device))
        mapping = random_mapping(rng, len(sources[0]), len(targets[0]), num_pairs)
        pagedattn.swap_blocks(sources, targets, mapping)
        if has_bulk_copies(cuda):
            assert pagedattn.last_kernel() == "cuda::swap_blocks_bulk"
        cuda.synchronize()
        for one, other in zip(blocks, before, strict=True):
            reference.copy_blocks(*((one, other) if direction == "out" else (other, one)), mapping)
        for actual, expected in zip(device, blocks, strict=True):
            assert_same_bytes(cuda.host(actual), expected)
        for actual, expected in zip(host.caches, before, strict=True):
            assert_same_bytes(actual, expected)


@pytest.mark.gpu
def test_swaps_on_many_streams_at_once_keep_apart(cuda: CupyBackend, rng: np.random.Generator) -> None:
    # Each has pairs and claims of its own, from buffers that earlier ones have left.
    num_streams, count = 6, 700
    blocks = [np.empty((count, 4096), np.uint8) for _ in range(num_streams)]
    random_bytes(rng, *blocks)
    device, returned = cuda.arrays(*blocks), cuda.arrays(*(np.zeros_like(b) for b in blocks))
    hosts = [pagedattn.HostCache(one, count) for one in device]
    streams = [cuda.cupy.cuda.Stream(non_blocking=True) for _ in range(num_streams)]
    cuda.synchronize()
    for _ in range(4):
        for one, back, host, stream in zip(device, returned, hosts, streams, strict=True):
            out = random_mapping(rng, count, count, count)
            out[:, 0] = rng.permutation(count)
            with stream:
                back.fill(0)
            pagedattn.swap_blocks(one, host.caches, out, stream=stream)
            pagedattn.swap_blocks(host.caches, back, out[:, ::-1].copy(), stream=stream)
    cuda.synchronize()
    for actual, expected in zip(returned, blocks, strict=True):
        assert_same_bytes(cuda.host(actual), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["bulk:3", "kernel:3"])
def test_calls_of_several_launches_share_their_pairs(
    cuda: CupyBackend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    # More caches than a launch's arguments have room for.
    monkeypatch.setenv("PAGEDATTN_SWAP", way)
    blocks = [np.empty((9, 528), np.uint8) for _ in range(401)]
    random_bytes(rng, *blocks)
    device, returned = list(cuda.arrays(*blocks)), list(cuda.arrays(*(np.zeros_like(b) for b in blocks)))
    host = pagedattn.HostCache(device, 12)
    for _ in range(2):
        mapping = np.stack([rng.permutation(9), rng.permutation(12)[:9]], axis=1)
        for back in returned:
            back.fill(0)
        cuda.synchronize()
        pagedattn.swap_blocks(device, host.caches, mapping)
        pagedattn.swap_blocks(host.caches, returned, mapping[:, ::-1].copy())
        cuda.synchronize()
        for actual, expected in zip(returned, blocks, strict=True):
            assert_same_bytes(cuda.host(actual), expected)


@pytest.mark.gpu
def test_swaps_that_were_refused_move_nothing_and_leave_their_buffers_to_others(
    cuda: CupyBackend, rng: np.random.Generator
) -> None:
    blocks = np.empty((50, 4096), np.uint8)
    random_bytes(rng, blocks)
    device = cuda.array(blocks)
    host = pagedattn.HostCache(device, 60)
    host.caches[0][...] = 0x5A
    good = random_mapping(rng, 50, 60, 40)
    for place, bad in ((0, [50, 3]), (39, [-1, 3]), (17, [2, 60]), (20, [2, -(2**62)]), (39, [0, int(good[3, 1])])):
        mapping = good.copy()
        mapping[place] = bad
        with pytest.raises(pagedattn.InvalidArgumentError, match=rf"^swap_blocks: `block_mapping`\[{place}\]"):
            pagedattn.swap_blocks(device, host.caches, mapping)
    cuda.synchronize()
    assert (host.caches[0] == 0x5A).all()
    pagedattn.swap_blocks(device, host.caches, good)
    cuda.synchronize()
    assert_same_bytes(host.caches[0][good[:, 1]], blocks[good[:, 0]])


@pytest.mark.gpu
def test_swaps_between_devices_and_pageable_memory_say_how_they_went(
    cuda: CupyBackend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PAGEDATTN_SWAP", raising=False)  # the library's own choices
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
    counts = (":", ":0", ":65536", ":x", ":5x", ": 5", ":-5", "y")
    for value in ("magic", *(way + count for way in ("kernel", "bulk") for count in counts)):
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
