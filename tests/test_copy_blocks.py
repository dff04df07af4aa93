"""copy_blocks: whole blocks, all caches in one call, and nothing else.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_same_bytes
from backends import DTYPES, NumpyBackend, allocation
from batches import LAYOUTS, cache_views


def random_bytes(rng: np.random.Generator, *arrays: np.ndarray) -> None:
    """Fill the arrays' whole allocations with random bytes."""
    for array in arrays:
        owner = allocation(array)
        owner[:] = rng.integers(0, 256, owner.size, np.uint8)


def random_mapping(rng: np.random.Generator, num_blocks: int, num_pairs: int) -> np.ndarray:
    """Return pairs without a destination twice or a destination that is also a source; sources may repeat."""
    order = rng.permutation(num_blocks)
    sources = rng.choice(order[num_pairs:], num_pairs)
    return np.stack([sources, order[:num_pairs]], axis=1).astype(np.int64)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("layout", LAYOUTS[:-1])  # the caches of one call share one layout
@pytest.mark.parametrize("shape", [(16, 2, 64), (1, 1, 8), (3, 5, 7)])
def test_blocks_are_copied_in_every_cache_and_no_other_byte_changes(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, layout: str, shape: tuple[int, int, int]
) -> None:
    caches = [c for _ in range(3) for c in cache_views(19, *shape, DTYPES[dtype], layout)]
    if layout == "padded":  # K and V differ in strides there
        caches = caches[::2]
    random_bytes(rng, *caches)
    moved = backend.arrays(*caches)
    mapping = random_mapping(rng, 19, 7)
    assert pagedattn.copy_blocks(list(moved), backend.array(mapping)) is None
    for cache in caches:
        reference.copy_blocks(cache, cache, mapping)
    for actual, expected in zip(moved, caches, strict=True):
        assert_same_bytes(backend.host(actual), expected)
        root = NumpyBackend().allocation(expected)
        assert_same_bytes(backend.allocation(actual)[: root.size], root)


@pytest.mark.parametrize("shape", [(19, 2, 16, 2, 8), (19, 100), (19, 3, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_a_single_array_of_any_block_shape_is_served(
    backend: NumpyBackend, rng: np.random.Generator, shape: tuple[int, ...], dtype: Any
) -> None:
    cache = np.empty(shape, dtype)
    random_bytes(rng, cache)
    moved = backend.array(cache)
    mapping = random_mapping(rng, 19, 9)
    pagedattn.copy_blocks(moved, backend.array(mapping))
    reference.copy_blocks(cache, cache, mapping)
    assert_same_bytes(backend.host(moved), cache)


def test_an_empty_mapping_copies_nothing(backend: NumpyBackend, rng: np.random.Generator) -> None:
    cache = np.empty((5, 4, 2, 8), np.float16)
    random_bytes(rng, cache)
    moved = backend.array(cache)
    pagedattn.copy_blocks(moved, backend.array(np.empty((0, 2), np.int64)))
    assert_same_bytes(backend.host(moved), cache)


def test_one_block_may_be_copied_to_many(backend: NumpyBackend, rng: np.random.Generator) -> None:
    cache = np.empty((40, 16, 2, 64), np.float16)
    random_bytes(rng, cache)
    moved = backend.array(cache)
    mapping = np.array([[7, d] for d in range(40) if d != 7], np.int64)
    pagedattn.copy_blocks([moved], backend.array(mapping))
    assert_same_bytes(backend.host(moved), np.broadcast_to(cache[7], cache.shape).copy())


@pytest.mark.parametrize("num_layers", [8, 9, 130, 400])
def test_the_caches_of_many_layers_are_copied_in_one_call(
    backend: NumpyBackend, rng: np.random.Generator, num_layers: int
) -> None:
    layers = np.empty((num_layers, 9, 4, 2, 8), np.float16)
    random_bytes(rng, layers)
    moved = backend.array(layers)
    mapping = random_mapping(rng, 9, 4)
    pagedattn.copy_blocks([moved[i] for i in range(num_layers)], backend.array(mapping))
    for layer in layers:
        reference.copy_blocks(layer, layer, mapping)
    assert_same_bytes(backend.host(moved), layers)


@pytest.mark.parametrize("num_pairs", [65_536, 100_000])
def test_more_pairs_than_a_dimension_of_a_grid_has_are_copied_in_one_call(
    backend: NumpyBackend, rng: np.random.Generator, num_pairs: int
) -> None:
    caches = [np.empty((2 * num_pairs + 5, 1, 2, 8), np.float16) for _ in range(2)]
    random_bytes(rng, *caches)
    moved = backend.arrays(*caches)
    mapping = random_mapping(rng, len(caches[0]), num_pairs)
    pagedattn.copy_blocks(list(moved), backend.array(mapping), check=True)
    for actual, cache in zip(moved, caches, strict=True):
        cache[mapping[:, 1]] = cache[mapping[:, 0]]
        assert_same_bytes(backend.host(actual), cache)


def large_caches(layout: str) -> list[np.ndarray]:
    """Return two caches of 500 blocks of 32 KiB, together more than a processor's caches keep."""
    match layout:
        case "dense":
            return [np.empty((500, 16, 8, 128), np.float16) for _ in range(2)]
        case "rows apart":
            return [np.empty((500, 16, 9, 128), np.float16)[:, :, :8] for _ in range(2)]
        case _:  # "between lines of the cache"
            flat = [np.empty(500 * 16 * 8 * 128 + 3, np.float16) for _ in range(2)]
            return [array[3:].reshape(500, 16, 8, 128) for array in flat]


@pytest.mark.parametrize("layout", ["dense", "rows apart", "between lines of the cache"])
def test_large_amounts_are_copied_whole(backend: NumpyBackend, rng: np.random.Generator, layout: str) -> None:
    caches = large_caches(layout)
    random_bytes(rng, *caches)
    moved = backend.arrays(*caches)
    mapping = random_mapping(rng, 500, 245)
    pagedattn.copy_blocks(list(moved), backend.array(mapping))
    for actual, expected in zip(moved, caches, strict=True):
        reference.copy_blocks(expected, expected, mapping)
        root = NumpyBackend().allocation(expected)
        assert_same_bytes(backend.allocation(actual)[: root.size], root)
