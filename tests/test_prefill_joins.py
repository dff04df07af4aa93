"""Prompts whose keys many thread blocks share: who joins the parts depends on chance, what comes of it must not.

Blocks with nothing left to do wait for the parts of others, which is safe only if those have a multiprocessor.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np
import pagedattn
import pytest
from accuracy import assert_same_bytes
from attention_check import check_batch, types
from backends import CupyBackend
from batches import lens, make_batch
from cuda_graphs import workspace_for

pytestmark = pytest.mark.gpu

KINDS = [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float8_e4m3"), ("float8_e4m3", "float8_e4m3")]

# Holds multiprocessors until it is let go, or gives up.
HOLD = r"""
extern "C" __global__ void hold(volatile int *let_go, volatile int *gave_up, int *holding) {
    extern __shared__ char room[];
    unsigned long long start, now;
    if (threadIdx.x == 0) atomicAdd(holding, 1);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    while (*let_go == 0) {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (now - start > 5000000000ull) {
            *gave_up = 1;
            return;
        }
    }
}
"""


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize(
    ("sequences", "heads"),
    [
        ([(9000, 70)], (4, 1)),  # one item of two groups, one of which has few rows
        ([(3000, 128)], (16, 16)),  # several items, in equal parts
        ([(5000, 200), (700, 90), (3000, 150)], (6, 2)),  # ranges that end one item and begin another
        ([(400, 100)], (4, 4)),  # parts of a tile or two
    ],
    ids=["one", "equal", "ragged", "short"],
)
def test_parts_of_an_item_join_to_the_reference(
    cuda: CupyBackend,
    rng: np.random.Generator,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    kind: tuple[str, str],
) -> None:
    shape = {"num_q_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim, **types(rng, kind, heads[1])}
    check_batch(cuda, make_batch(rng, *lens(sequences), **shape))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "heads", "window", "sequence"),
    [(64, 20, 2016, (2208, 385)), (256, 16, 4096, (4232, 387)), (128, 16, 2000, (2300, 300))],
)
def test_tiles_that_see_more_than_the_first_and_the_last_are_joined(
    cuda: CupyBackend,
    rng: np.random.Generator,
    head_dim: int,
    heads: int,
    window: int,
    sequence: tuple[int, int],
    deterministic: bool,
) -> None:
    # Behind a window a tile in the middle may see more keys than both ends, which equal parts were made for: its last
    # part was nobody's once.
    shape = {"num_q_heads": heads, "num_kv_heads": heads, "head_dim": head_dim, "dtype": np.float16}
    batch = make_batch(rng, [sequence[0]], [sequence[1]], **shape, window=window)
    check_batch(cuda, batch, deterministic=deterministic)


def test_joins_have_the_same_bits_whoever_has_time_for_them(cuda: CupyBackend, rng: np.random.Generator) -> None:
    # Five streams at once, so that blocks of some calls start late, and at other times each time.
    calls = [
        make_batch(rng, *lens(sequences), num_q_heads=8, num_kv_heads=2, head_dim=128, dtype=np.float16).on(cuda)
        for sequences in ([(8000, 70)], [(3000, 128), (2000, 65)], [(700, 300)], [(20_000, 40)], [(90, 90)] * 40)
    ]
    streams = [cuda.cupy.cuda.Stream(non_blocking=True) for _ in calls]
    workspaces = [workspace_for(cuda, [call]) for call in calls]
    expected = [
        cuda.host(pagedattn.paged_attention(*args, **options, workspace=workspace))
        for (args, options), workspace in zip(calls, workspaces, strict=True)
    ]
    outs = [cuda.cupy.zeros(x.shape, x.dtype) for x in expected]
    for _ in range(20):
        cuda.synchronize()
        for _ in range(4):
            for (args, options), out, workspace, stream in zip(calls, outs, workspaces, streams, strict=True):
                pagedattn.paged_attention(*args, **options, out=out, workspace=workspace, stream=stream)
        cuda.synchronize()
        for out, first in zip(outs, expected, strict=True):
            assert_same_bytes(cuda.host(out), first)
            out.fill(np.nan)


@pytest.mark.parametrize("free", [1, 5, 70])
def test_blocks_wait_for_nobody_who_has_no_multiprocessor(
    cuda: CupyBackend, rng: np.random.Generator, free: int
) -> None:
    cupy = cuda.cupy
    batch = make_batch(rng, [20_000], [70], num_q_heads=4, num_kv_heads=1, head_dim=128, dtype=np.float16)
    args, options = batch.on(cuda)
    workspace = workspace_for(cuda, [(args, options)])
    expected = cuda.host(pagedattn.paged_attention(*args, **options, workspace=workspace))
    out = cupy.full(expected.shape, np.nan, expected.dtype)
    device = cupy.cuda.Device()
    kernel = cupy.RawKernel(HOLD, "hold")
    kernel.max_dynamic_shared_size_bytes = device.attributes["MaxSharedMemoryPerBlockOptin"]
    nothing = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
    holder, caller, messenger = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
    words = cupy.zeros(3, np.int32)
    nothing((1,), (1,), ())
    cuda.synchronize()
    with holder:  # all multiprocessors but some, each wholly
        blocks = device.attributes["MultiProcessorCount"] - free
        arguments = (words[0:1], words[1:2], words[2:3])
        kernel((blocks,), (32,), arguments, shared_mem=kernel.max_dynamic_shared_size_bytes)
    with messenger:
        while words[2:3].get(stream=messenger)[0] < blocks:
            pass
    with caller:  # a sanitizer starts this when the holder has given up
        nothing((1,), (1,), ())
    caller.synchronize()
    if words.get(stream=messenger)[1] != 0:
        pytest.skip("kernels run one after the other here, as under a sanitizer")
    for _ in range(3):
        pagedattn.paged_attention(*args, **options, out=out, workspace=workspace, stream=caller)
    caller.synchronize()
    cupy.cuda.runtime.memsetAsync(words.data.ptr, 1, 4, messenger.ptr)
    cuda.synchronize()
    assert words.get()[1] == 0, "the call ended only when the multiprocessors were free again"
    assert_same_bytes(cuda.host(out), expected)
