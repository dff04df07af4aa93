"""HostCache: blocks of the right shape and type, alive as long as somebody looks into them or a swap uses them.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_same_bytes
from backends import DTYPES, FLOAT8_E4M3, CupyBackend, NumpyBackend, is_float8
from test_copy_blocks import random_bytes


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_there_is_an_array_for_each_cache(backend: NumpyBackend, dtype: str) -> None:
    stored: Any = np.uint8 if is_float8(DTYPES[dtype]) and backend.is_cuda else DTYPES[dtype]
    k_cache, v_cache = backend.arrays(np.zeros((5, 4, 2, 8), stored), np.zeros((5, 3, 7), stored))
    host = pagedattn.HostCache([k_cache, v_cache], 11)
    assert [cache.shape for cache in host.caches] == [(11, 4, 2, 8), (11, 3, 7)]
    assert all(cache.dtype == stored and cache.flags.c_contiguous for cache in host.caches)
    assert host.nbytes == sum(cache.nbytes for cache in host.caches)
    assert host.page_locked == backend.is_cuda
    assert f"2 caches of 11 blocks, {host.nbytes} bytes" in repr(host)
    # Each may be filled to its last byte without touching the other.
    host.caches[0].view(np.uint8)[...], host.caches[1].view(np.uint8)[...] = 1, 2
    assert (host.caches[0].view(np.uint8) == 1).all()


def test_blocks_go_to_the_host_and_come_back(backend: NumpyBackend, rng: np.random.Generator) -> None:
    blocks = [np.empty((9, 4, 2, 8), np.float16) for _ in range(4)]
    random_bytes(rng, *blocks)
    device, returned = backend.arrays(*blocks), backend.arrays(*(np.zeros_like(b) for b in blocks))
    there = np.stack([rng.permutation(9), rng.permutation(12)[:9]], axis=1)
    with pagedattn.HostCache(list(device), 12) as host:
        pagedattn.swap_blocks(list(device), host.caches, there)
        pagedattn.swap_blocks(host.caches, list(returned), there[:, ::-1].copy())
        for actual, expected in zip(returned, blocks, strict=True):
            assert_same_bytes(backend.host(actual), expected)
    assert host.caches == []


def test_an_array_outlives_the_cache_that_made_it(backend: NumpyBackend) -> None:
    host = pagedattn.HostCache(backend.array(np.zeros((2, 1000), np.float32)), 300)
    (cache,) = host.caches
    cache[...] = 7
    host.close()
    host.close()
    del host
    gc.collect()
    assert (cache == 7).all()


def test_a_cache_without_elements_has_no_memory(backend: NumpyBackend) -> None:
    host = pagedattn.HostCache(backend.array(np.zeros((2, 0, 8), np.float32)), 3)
    assert host.caches[0].shape == (3, 0, 8)
    assert host.nbytes == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([], 1), "`caches` must have at least one array"),
        ((3, 1), "`caches` must be an array or a list of arrays; got int"),
        (([3], 1), r"`caches\[0\]` must be an array.*got int"),
        (([np.zeros(2, np.float32), np.float32(3)], 1), r"`caches\[1\]`.*no dimension"),
        (([np.zeros(2), np.zeros(2, object)], 1), r"`caches\[1\]` must be of a type of plain bytes; got object"),
        (([np.float32], 1), r"`caches\[0\]` must be an array.*got type"),
        ((np.zeros(2), 0), "`num_blocks` must be a whole number on the host of at least 1; got 0"),
        ((np.zeros(2), 1.5), "`num_blocks`.*got 1.5"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(pagedattn.InvalidArgumentError, match=f"^HostCache: {says}"):
        pagedattn.HostCache(*arguments)


def test_more_memory_than_there_is_is_refused(backend: NumpyBackend) -> None:
    with pytest.raises(pagedattn.OutOfMemoryError):
        pagedattn.HostCache(backend.array(np.zeros((1, 1024), np.float32)), 2**40)


@pytest.mark.gpu
def test_freeing_waits_for_the_swap_that_reads_the_memory(cuda: CupyBackend, rng: np.random.Generator) -> None:
    # Without the wait, later allocations would get the memory and write over what the running swap still reads.
    blocks = np.empty((4000, 4096), np.uint8)
    random_bytes(rng, blocks)
    device = cuda.array(np.zeros_like(blocks))
    mapping = np.stack([rng.permutation(4000), rng.permutation(4000)], axis=1)
    stream = cuda.cupy.cuda.Stream(non_blocking=True)
    for _ in range(10):
        host = pagedattn.HostCache(device, 4000)
        host.caches[0][...] = blocks
        event = cuda.cupy.cuda.Event()
        pagedattn.swap_blocks(host.caches, device, mapping, event=event, stream=stream)
        del host
        assert event.done
        other = pagedattn.HostCache(device, 4000)
        other.caches[0][...] = 0xEE
        assert_same_bytes(cuda.host(device)[mapping[:, 1]], blocks[mapping[:, 0]])


@pytest.mark.gpu
def test_swaps_race_with_frees_on_many_threads(cuda: CupyBackend, rng: np.random.Generator) -> None:
    blocks = np.empty((600, 2048), np.uint8)
    random_bytes(rng, blocks)
    wrong: list[str] = []

    def swap_and_forget(seed: int) -> None:
        own = np.random.default_rng(seed)
        device, returned = cuda.arrays(blocks, np.zeros_like(blocks))
        stream = cuda.cupy.cuda.Stream(non_blocking=True)
        cuda.synchronize()
        for _ in range(15):
            host = pagedattn.HostCache(device, 700)
            there = np.stack([own.permutation(600), own.permutation(700)[:600]], axis=1)
            with stream:
                returned.fill(0)
            pagedattn.swap_blocks(device, host.caches, there, stream=stream)
            pagedattn.swap_blocks(host.caches, returned, there[:, ::-1].copy(), stream=stream)
            host.close()
            del host
            stream.synchronize()
            if not np.array_equal(cuda.host(returned), blocks):
                wrong.append(f"thread {seed}")
                return

    threads = [threading.Thread(target=swap_and_forget, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_memory_may_be_freed_while_another_stream_is_captured(cuda: CupyBackend) -> None:
    blocks = np.arange(100, dtype=np.float32).repeat(512).reshape(100, 512)
    device, mapping = cuda.arrays(blocks, np.array([[3, 7]]))
    host = pagedattn.HostCache(device, 100)
    pagedattn.swap_blocks(device, host.caches, np.stack([np.arange(100), np.arange(100)[::-1]], axis=1))
    stream = cuda.cupy.cuda.Stream(non_blocking=True)
    with stream:
        # In this mode any thread's call that a capture cannot have beside it fails, and spoils the capture.
        stream.begin_capture(mode=cuda.cupy.cuda.runtime.streamCaptureModeGlobal)
        try:
            pagedattn.copy_blocks(device, mapping, stream=stream)
            del host
            pagedattn.HostCache(device, 3).close()
        finally:
            graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    blocks[7] = 3
    assert_same_bytes(cuda.host(device), blocks)


@pytest.mark.gpu
def test_float8_storage_of_a_device_is_bytes_on_the_host_too(cuda: CupyBackend, rng: np.random.Generator) -> None:
    values = rng.standard_normal((3, 16), np.float32).astype(FLOAT8_E4M3)
    device = cuda.array(values)
    host = pagedattn.HostCache(device, 3)
    pagedattn.swap_blocks(device, host.caches, np.arange(3).repeat(2).reshape(3, 2))
    cuda.synchronize()
    assert_same_bytes(host.caches[0].view(FLOAT8_E4M3), values)
