"""KVCache: the shape and layout that it promises, and every operation works on it as on any other cache.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_close, assert_same_bytes
from backends import DTYPES, NumpyBackend
from batches import make_batch
from test_copy_blocks import random_bytes


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_k_and_v_of_a_block_lie_side_by_side(dtype: str) -> None:
    cache = pagedattn.KVCache(5, 16, 2, 24, dtype, num_layers=3)
    block = 16 * 2 * 24 * DTYPES[dtype].itemsize
    assert len(cache.k_caches) == len(cache.v_caches) == 3
    assert cache.nbytes == 3 * 5 * 2 * block
    for k, v in zip(cache.k_caches, cache.v_caches, strict=True):
        assert k.shape == v.shape == (5, 16, 2, 24)
        assert k.dtype == v.dtype == DTYPES[dtype]
        assert k.strides[0] == v.strides[0] == 2 * block
        assert v.ctypes.data - k.ctypes.data == block
        assert k[0].flags.c_contiguous
        assert not k.view(np.uint8).any()
        assert not v.view(np.uint8).any()
    assert cache.k_caches[0].ctypes.data % (2 << 20) == 0
    assert f"3 layers of 5 blocks of 16 tokens, 2 heads of 24, {DTYPES[dtype]}, {cache.nbytes} bytes" in repr(cache)


def memory_of(address: int) -> dict[str, str]:
    """What the system says of the mapping that holds an address."""
    fields: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside:
            name, value = line.split(":", 1)
            fields[name] = value
    return fields


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_huge_pages_are_asked_for_in_memory_that_can_have_them() -> None:
    cache = pagedattn.KVCache(100, 16, 8, 128, "bfloat16")
    flags = memory_of(cache.k_caches[0].ctypes.data)["VmFlags"].split()
    assert "hg" in flags
    assert "sh" not in flags  # memory to be shared gets none, unless the system was told so


def test_no_slot_is_shared(rng: np.random.Generator) -> None:
    cache = pagedattn.KVCache(7, 3, 2, 8, "float16", num_layers=2)
    arrays = cache.k_caches + cache.v_caches
    expected = [np.empty_like(array, order="C") for array in arrays]
    random_bytes(rng, *expected)
    for array, values in zip(arrays, expected, strict=True):
        array[...] = values
    for array, values in zip(arrays, expected, strict=True):
        assert_same_bytes(np.ascontiguousarray(array), values)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_and_the_operations_that_fill_a_cache_work_on_it(rng: np.random.Generator, dtype: str) -> None:
    batch = make_batch(rng, [40, 90, 16, 700], [5, 1, 16, 1], dtype=DTYPES[dtype])
    expected, _ = batch.reference()
    (q, k, v, tables, lens), options = batch.on(NumpyBackend())
    cache = pagedattn.KVCache(*k.shape, dtype)
    blocks = np.arange(len(k)).repeat(2).reshape(-1, 2)
    pagedattn.swap_blocks([k, v], [cache.k_caches[0], cache.v_caches[0]], blocks)
    result = pagedattn.paged_attention(q, cache.k_caches[0], cache.v_caches[0], tables, lens, **options)
    assert_close(result, expected, q.dtype)
    # Through other blocks: each moved to its mirror image.
    mirrored = pagedattn.KVCache(*k.shape, dtype)
    slots = np.arange(k.shape[0] * k.shape[1]).reshape(k.shape[:2])[::-1].reshape(-1)
    keys, values = (np.ascontiguousarray(array).reshape(-1, *k.shape[2:]) for array in (k, v))
    pagedattn.reshape_and_cache(keys, values, mirrored.k_caches[0], mirrored.v_caches[0], slots)
    tables = np.where((tables >= 0) & (tables < len(k)), len(k) - 1 - tables, tables)
    result = pagedattn.paged_attention(q, mirrored.k_caches[0], mirrored.v_caches[0], tables, lens, **options)
    assert_close(result, expected, q.dtype)


def test_an_array_outlives_the_cache_that_made_it() -> None:
    cache = pagedattn.KVCache(300, 16, 2, 64, "float32")
    array = cache.v_caches[0]
    array[...] = 7
    del cache
    gc.collect()
    assert (array == 7).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 16, 8, 128, "float32"), "`num_blocks` must be a whole number on the host of at least 1; got 0"),
        ((1, 1.5, 8, 128, "float32"), "`block_size`.*got 1.5"),
        ((1, 16, -1, 128, "float32"), "`num_kv_heads`.*got -1"),
        ((1, 16, 8, "8", "float32"), "`head_dim`.*got '8'"),
        ((1, 16, 8, 128, "float64"), "`dtype` must be one of float32.*got 'float64'"),
        ((1, 16, 8, 128, np.int16), "`dtype` must be one of"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(pagedattn.InvalidArgumentError, match=f"^KVCache: {says}"):
        pagedattn.KVCache(*arguments)


@pytest.mark.parametrize("num_blocks", [2**36, 2**62])
def test_more_memory_than_there_is_is_refused(num_blocks: int) -> None:
    with pytest.raises(pagedattn.OutOfMemoryError, match=r"^KVCache: "):
        pagedattn.KVCache(num_blocks, 64, 64, 256, "float32")
