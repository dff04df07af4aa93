"""Decode in CUDA graphs, with one workspace for all calls: the lengths, the tables and the calls before do not matter.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_close, assert_same_bytes
from attention_check import check_batch
from backends import DTYPES, Array, CupyBackend
from batches import Batch, make_batch, poison, scale_for
from cuda_graphs import CapturedAttention, workspace_for

pytestmark = pytest.mark.gpu

KINDS = [("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "float8_e4m3"), ("bfloat16", "float8_e5m2")]


def batch_of(
    rng: np.random.Generator,
    kind: tuple[str, str],
    seq_lens: list[int],
    query_lens: list[int] | None = None,
    *,
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 128,
    **options: Any,
) -> Batch:
    dtype, kv_dtype = (DTYPES[name] for name in kind)
    options |= {"num_q_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim}
    options |= {"dtype": dtype, "kv_dtype": kv_dtype, **scale_for(kv_dtype, rng, heads[1])}
    return make_batch(rng, seq_lens, query_lens, **options)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_captured_decode_follows_new_lengths_and_tables(
    cuda: CupyBackend, rng: np.random.Generator, kind: tuple[str, str]
) -> None:
    num_seqs = 33
    tiny = [int(n) for n in rng.integers(0, 18, num_seqs)]
    skewed = [3100, *tiny[1:]]
    lengths = [tiny, [300] * num_seqs, [0] * num_seqs, skewed, skewed[::-1], [1] * num_seqs]
    lengths += [[int(n) for n in rng.integers(0, 320, num_seqs)] for _ in range(4)]
    # One pair of scales for all: those in the graph are not refilled.
    scales = scale_for(DTYPES[kind[1]], rng, 2)
    batches = [batch_of(rng, kind, seq_lens) for seq_lens in lengths]
    for batch in batches:
        batch.options |= scales
    captured = CapturedAttention(cuda, batches[1])
    for batch in batches:
        captured.check(batch)


@pytest.mark.parametrize("group", [1, 4, 5])
def test_a_captured_call_follows_new_query_lengths(cuda: CupyBackend, rng: np.random.Generator, group: int) -> None:
    # The same graph holds pure decode, speculation, and prompts beside decodes.
    num_tokens, num_seqs = 90, 18
    query_lens = [
        [5] * num_seqs,
        [num_tokens - num_seqs + 1] + [1] * (num_seqs - 1),
        [0] * (num_seqs - 1) + [num_tokens],
        [1] * 9 + [9] * 9,
        *(rng.multinomial(num_tokens, rng.dirichlet(np.full(num_seqs, 0.3)), 4).tolist()),
    ]
    batches = [
        batch_of(rng, KINDS[0], [n + int(rng.integers(0, 500)) for n in lens], lens, heads=(2 * group, 2))
        for lens in query_lens
    ]
    captured = CapturedAttention(cuda, batches[0])
    for batch in batches:
        captured.check(batch)


# (query heads and KV heads, head dimension, block size, lengths, query lengths): decode with few and many rows, D and
# blocks of all sorts, prompts, and shapes that only other kernels serve.
SHAPES: list[tuple[tuple[int, int], int, int, list[int], list[int] | None]] = [
    ((8, 2), 128, 16, [4000, 3, 0, 700], None),
    ((8, 8), 64, 16, [100] * 40, None),
    ((64, 1), 128, 64, [2000, 1], None),
    ((8, 2), 256, 32, [1500, 600], [4, 4]),
    ((32, 4), 80, 8, [2000, 5, 5, 5], [8, 1, 1, 5]),
    ((4, 4), 192, 256, [5000], None),
    ((8, 2), 128, 3, [1000, 50], None),
    ((8, 2), 128, 16, [700, 130, 3000], [300, 130, 1]),
    ((71, 1), 64, 16, [2500, 3], None),
    ((8, 2), 128, 16, [1, 0, 2], None),
]


@pytest.mark.parametrize("seed_of_order", range(3))
def test_one_workspace_serves_calls_of_all_shapes_one_after_the_other(
    cuda: CupyBackend, rng: np.random.Generator, seed_of_order: int
) -> None:
    kinds = [*KINDS, ("float32", "float32")]
    batches = [
        batch_of(rng, kinds[(i + seed_of_order) % len(kinds)], lens, query_lens, heads=heads, head_dim=d, block_size=s)
        for i, (heads, d, s, lens, query_lens) in enumerate(SHAPES)
    ]
    calls = [batch.on(cuda) for batch in batches]
    for i, (_, options) in enumerate(calls):
        options["deterministic"] = i % 3 == 2
    workspace = workspace_for(cuda, calls)
    order = np.concatenate([rng.permutation(len(calls)) for _ in range(4)])
    outs = [cuda.array(poison(batches[i].q.shape, batches[i].q.dtype)) for i in order]
    cuda.synchronize()
    for i, out in zip(order, outs, strict=True):  # nothing waits in between
        args, options = calls[i]
        pagedattn.paged_attention(*args, out=out, workspace=workspace, **options)
    expected = [batch.reference()[0] for batch in batches]
    for i, out in zip(order, outs, strict=True):
        assert_close(cuda.host(out), expected[i], batches[i].q.dtype, f"out of shape {i}")


DIVIDED: dict[str, tuple[list[int], list[int] | None]] = {
    "one long": ([50_021], None),
    "skewed": ([20_003, 5, 300, 0, 1, 64, 1000], None),
    "many": ([(i * 37) % 211 for i in range(300)], None),
    "speculation": ([7001, 300, 4, 9], [4, 4, 4, 4]),
    "prompts beside decodes": ([7001, 300, 400, 9], [1, 1, 400, 1]),
    # Deterministic pieces of 512, 512 and 16 tokens, mostly all of one block's, which does two at once: the last one
    # must not be joined with what is still on its way.
    "a short last piece": ([1040] * 600, None),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS[1:3], ids="-".join)
@pytest.mark.parametrize("name", DIVIDED)
def test_twenty_runs_give_the_same_bits(
    cuda: CupyBackend, rng: np.random.Generator, name: str, kind: tuple[str, str], deterministic: bool
) -> None:
    batch = batch_of(rng, kind, *DIVIDED[name], heads=(4, 1))
    check_batch(cuda, batch, deterministic=deterministic)
    args, options = batch.on(cuda)
    options["deterministic"] = deterministic
    workspace = workspace_for(cuda, [(args, options)])
    runs: list[tuple[Array, ...]] = [
        cuda.arrays(poison(batch.q.shape, batch.q.dtype), poison(batch.q.shape[:2], np.float32)) for _ in range(20)
    ]
    cuda.synchronize()
    for out, lse in runs:
        pagedattn.paged_attention(*args, out=out, lse=lse, workspace=workspace, **options)
    first = [cuda.host(array) for array in runs[0]]
    for run in runs[1:]:
        for array, expected, what in zip(run, first, ("out", "lse"), strict=True):
            assert_same_bytes(cuda.host(array), expected, what)


@pytest.mark.parametrize("kind", KINDS[1:3], ids="-".join)
@pytest.mark.parametrize("query_len", [1, 4])
def test_deterministic_decode_gives_a_sequence_the_same_bits_alone_and_among_hundreds(
    cuda: CupyBackend, rng: np.random.Generator, query_len: int, kind: tuple[str, str]
) -> None:
    seq_lens = [20_003, 3000, 1000, 513, 64, 17, 4, *(int(n) for n in rng.integers(4, 300, 200))]
    batch = batch_of(rng, kind, seq_lens, [query_len] * len(seq_lens))

    def run(chosen: list[int]) -> np.ndarray:
        rows = np.concatenate([np.arange(query_len * b, query_len * (b + 1)) for b in chosen])
        part = Batch(
            batch.q[rows],
            batch.k_cache,
            batch.v_cache,
            batch.block_tables[chosen],
            batch.seq_lens[chosen],
            (query_len * np.arange(len(chosen) + 1)).astype(np.int32),
            batch.options,
        )
        args, options = part.on(cuda)
        out = cuda.array(poison(part.q.shape, part.q.dtype))
        pagedattn.paged_attention(*args, out=out, deterministic=True, **options)
        return cuda.host(out).reshape(len(chosen), query_len, *out.shape[1:])

    together = run(list(range(len(seq_lens))))
    for b in [*range(8), 100]:
        assert_same_bytes(run([b])[0], together[b], f"sequence {b} alone")
    order = [int(b) for b in rng.permutation(len(seq_lens))[:50]]
    assert_same_bytes(run(order), together[order], "fifty of them in another order")
