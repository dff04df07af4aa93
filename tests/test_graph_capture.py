"""A captured CUDA graph, replayed with other lengths, tables and contents, computes what they say.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_close, assert_same_bytes
from backends import DTYPES, CupyBackend
from batches import Batch, cache_views, make_batch, normal, poison
from cuda_graphs import CapturedAttention, capture, refill

pytestmark = pytest.mark.gpu

# Batches of 12 query tokens in 6 sequences: decode, speculation, a chunk, padding, one long sequence.
SHAPES = [
    ([100, 7, 1, 350, 64, 16], [2, 2, 1, 3, 2, 2]),
    ([12, 0, 0, 0, 0, 0], [12, 0, 0, 0, 0, 0]),
    ([3100, 9, 9, 9, 9, 9], [7, 1, 1, 1, 1, 1]),
    ([0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2]),
    ([900, 900, 900, 900, 900, 900], [2, 2, 2, 2, 2, 2]),
]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float16", "float16"), ("bfloat16", "float8_e4m3"), ("float8_e4m3", "float8_e4m3"), ("float32", "float32")],
)
@pytest.mark.parametrize("with_workspace", [True, False])
def test_captured_attention_follows_new_lengths_and_tables(
    cuda: CupyBackend, rng: np.random.Generator, dtype: str, kv_dtype: str, with_workspace: bool
) -> None:
    def batch_of(seq_lens: list[int], query_lens: list[int]) -> Batch:
        kinds = {"dtype": DTYPES[dtype], "kv_dtype": DTYPES[kv_dtype]}
        return make_batch(rng, seq_lens, query_lens, num_q_heads=8, num_kv_heads=2, head_dim=128, **kinds)

    captured = CapturedAttention(cuda, batch_of(*SHAPES[0]), with_workspace=with_workspace)
    for seq_lens, query_lens in [*SHAPES, *reversed(SHAPES)]:
        captured.check(batch_of(seq_lens, query_lens))


def test_a_captured_step_writes_the_cache_and_attends(cuda: CupyBackend, rng: np.random.Generator) -> None:
    k_cache, v_cache = cache_views(40, 16, 2, 64, np.float16, "NHD")
    table, num_seqs = rng.permutation(40).reshape(4, 10).astype(np.int32), 4
    k, v, tables = cuda.arrays(k_cache, v_cache, table)
    zeros = np.zeros((num_seqs, 2, 64), np.float16)
    key, value, q = cuda.arrays(zeros, zeros.copy(), np.zeros((num_seqs, 4, 64), np.float16))
    slots, lens = cuda.arrays(np.full(num_seqs, -1, np.int64), np.zeros(num_seqs, np.int32))
    out = cuda.array(poison((num_seqs, 4, 64), np.float16))
    workspace = cuda.cupy.zeros(pagedattn.paged_attention_workspace_size(q, k, v, tables, lens), np.uint8)

    def step(stream: Any) -> None:
        pagedattn.reshape_and_cache(key, value, k, v, slots, stream=stream)
        pagedattn.paged_attention(q, k, v, tables, lens, out=out, workspace=workspace, stream=stream)

    replay = capture(cuda, step)
    for position in range(20):
        new_key, new_value = normal(rng, (2, num_seqs, 2, 64), np.float16)
        new_q = normal(rng, (num_seqs, 4, 64), np.float16)
        new_slots = table[:, position // 16].astype(np.int64) * 16 + position % 16
        new_lens = np.full(num_seqs, position + 1, np.int32)
        new_slots[3], new_lens[3] = -1, 0  # the padding of a smaller batch
        for target, source in zip(
            (key, value, q, slots, lens), (new_key, new_value, new_q, new_slots, new_lens), strict=True
        ):
            refill(target, source)
        replay()
        reference.reshape_and_cache(new_key, new_value, k_cache, v_cache, new_slots)
        expected, _ = reference.paged_attention(new_q, k_cache, v_cache, table, new_lens)
        assert_close(cuda.host(out), expected, np.float16)
    assert_same_bytes(cuda.host(k), k_cache)
    assert_same_bytes(cuda.host(v), v_cache)


def test_captured_cache_operations_follow_new_mappings(cuda: CupyBackend, rng: np.random.Generator) -> None:
    host = normal(rng, (20, 16, 2, 64), np.float16)
    cache, other = cuda.arrays(host, host.copy())
    mapping = cuda.array(np.array([[0, 1], [2, 3]], np.int64))
    tables, lens = cuda.arrays(np.zeros((2, 5), np.int32), np.ones(2, np.int32))
    k_out, v_out = cuda.arrays(poison((100, 2, 64), np.float16), poison((100, 2, 64), np.float16))

    def call(stream: Any) -> None:
        pagedattn.copy_blocks([cache, other], mapping, stream=stream)
        pagedattn.gather_kv(cache, other, tables, lens, out=(k_out, v_out), stream=stream)

    replay = capture(cuda, call)
    for _ in range(3):
        refill(cache, host)
        order = rng.permutation(20)
        new_mapping = order[:4].reshape(2, 2).astype(np.int64)
        new_tables, new_lens = rng.permutation(20)[:10].reshape(2, 5).astype(np.int32), rng.integers(0, 51, 2)
        refill(mapping, new_mapping)
        refill(tables, new_tables)
        refill(lens, new_lens.astype(np.int32))
        refill(k_out, poison((100, 2, 64), np.float16))
        replay()
        expected, rows = host.copy(), poison((100, 2, 64), np.float16)
        reference.copy_blocks(expected, expected, new_mapping)
        reference.gather_kv(expected, new_tables, new_lens, rows)
        assert_same_bytes(cuda.host(cache), expected)
        assert_same_bytes(cuda.host(k_out), rows)


def test_checked_mode_is_refused_while_a_stream_is_captured(cuda: CupyBackend, rng: np.random.Generator) -> None:
    args, options = make_batch(rng, [40, 9]).on(cuda)
    out = cuda.array(poison((2, 4, 64), np.float32))
    stream = cuda.cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(pagedattn.InvalidArgumentError, match="captur"):
                pagedattn.paged_attention(*args, out=out, stream=stream, check=True, **options)
        finally:
            stream.end_capture()


def test_a_workspace_that_is_too_small_is_refused_with_the_size_it_needs(
    cuda: CupyBackend, rng: np.random.Generator
) -> None:
    batch = make_batch(rng, [5000, 9], num_q_heads=8, num_kv_heads=2, head_dim=128, dtype=np.float16)
    args, options = batch.on(cuda)
    needed = pagedattn.paged_attention_workspace_size(*args)
    out = cuda.array(poison(batch.q.shape, np.float16))
    if needed == 0:
        pytest.skip("these arguments need no workspace")
    small = cuda.cupy.zeros(needed - 1, np.uint8)
    with pytest.raises(pagedattn.InvalidArgumentError, match=f"`workspace`.*{needed}"):
        pagedattn.paged_attention(*args, out=out, workspace=small, **options)
    assert_same_bytes(cuda.host(out), poison(batch.q.shape, np.float16))


def test_a_workspace_serves_call_after_call(cuda: CupyBackend, rng: np.random.Generator) -> None:
    workspace = None
    for seq_lens in ([5000, 9], [1, 1], [300, 7000]):
        batch = make_batch(rng, seq_lens, num_q_heads=8, num_kv_heads=2, head_dim=128, dtype=np.float16)
        args, options = batch.on(cuda)
        needed = pagedattn.paged_attention_workspace_size(*args)
        if workspace is None or workspace.size < needed:
            workspace = cuda.cupy.zeros(needed, np.uint8)
        for _ in range(3):
            out = pagedattn.paged_attention(*args, workspace=workspace, **options)
            assert_close(cuda.host(out), batch.reference()[0], np.float16)
