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
