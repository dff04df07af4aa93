"""Decode of every shape against the float64 reference: rows a KV head, head and block sizes, types, strides, options.

Lengths lie on both sides of the sizes that kernels cut at, one is 0, and one is long enough to be divided.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_check import COMMON_OPTIONS, check_batch, check_case, types
from backends import CupyBackend
from batches import SIXTEEN_BIT_KINDS, TENSOR_CORE_KINDS, make_batch, naming_poisoned_blocks, poison
from pairwise import case_id, pairwise

pytestmark = pytest.mark.gpu

SEQ_LENS = [1, 15, 16, 17, 0, 63, 64, 65, 200, 700]


def queries(seq_lens: list[int], query_len: int) -> list[int]:
    """Return query lengths that fit the sequences; a query token of an empty sequence sees nothing."""
    return [min(query_len, n) if n else query_len for n in seq_lens]


@pytest.mark.parametrize("kind", SIXTEEN_BIT_KINDS[1:3], ids="-".join)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 32, 33, 64, 65, 71, 128])
def test_decode_of_any_group_matches_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, group: int, kind: tuple[str, str]
) -> None:
    num_kv_heads = 3 if group <= 16 else 1
    options = types(rng, kind, num_kv_heads)
    heads = {"num_q_heads": group * num_kv_heads, "num_kv_heads": num_kv_heads, "head_dim": 128}
    check_batch(cuda, make_batch(rng, SEQ_LENS, **heads, **options))


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("query_len", range(2, 17))
def test_a_few_query_tokens_a_sequence_match_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, query_len: int, group: int
) -> None:
    kind = TENSOR_CORE_KINDS[(query_len + group) % len(TENSOR_CORE_KINDS)]
    heads = {"num_q_heads": 2 * group, "num_kv_heads": 2, "head_dim": 128}
    batch = make_batch(rng, SEQ_LENS, queries(SEQ_LENS, query_len), **heads, **types(rng, kind, 2))
    check_batch(cuda, batch)


@pytest.mark.parametrize("kind", SIXTEEN_BIT_KINDS[:3], ids="-".join)
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8, 16, 32, 64])
def test_prompts_padding_speculation_and_decode_share_a_call(
    cuda: CupyBackend, rng: np.random.Generator, group: int, kind: tuple[str, str]
) -> None:
    # Sequences of 16, 17, 64, 65 rows and a few more or less; whole prompts; no query token; no key.
    few, many = 16 // group, 64 // group
    query_lens = [1, 0, few, few + 1, many, many + 1, 130, 3, 0, 2, 1]
    seq_lens = [40, 9, few + 30, few + 1, many + 300, many + 1, 130, 3, 0, 0, 900]
    order = rng.permutation(len(seq_lens))
    batch = make_batch(
        rng,
        [seq_lens[i] for i in order],
        [query_lens[i] for i in order],
        num_q_heads=group,
        num_kv_heads=1,
        **types(rng, kind, 1),
    )
    check_batch(cuda, batch)


PAIRWISE = pairwise(
    {
        **COMMON_OPTIONS,
        "block_size": [1, 3, 8, 16, 24, 32, 40, 48, 64, 128, 256],
        "rows": [(1, 1), (1, 4), (1, 5), (1, 8), (1, 16), (1, 64), (2, 1), (4, 4), (5, 3), (8, 8), (16, 4)],
        "window": [None, 1, 7, 16, 17, 100, 1000, 10_000],
    }
)


@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_every_pair_of_options_of_decode_matches_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any]
) -> None:
    query_len, group = case["rows"]
    seq_lens = [1, 16, 33, 0, 130, 1100]
    check_case(cuda, rng, case, group, seq_lens, queries(seq_lens, query_len) if query_len > 1 else None)


@pytest.mark.parametrize("kind", [SIXTEEN_BIT_KINDS[0], SIXTEEN_BIT_KINDS[4]], ids="-".join)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize(("block_size", "window"), [(8, 7), (16, 1), (16, 17), (64, 100), (256, 100), (3, 100)])
def test_blocks_outside_the_window_may_hold_and_name_anything(
    cuda: CupyBackend,
    rng: np.random.Generator,
    block_size: int,
    window: int,
    query_len: int,
    layout: str,
    kind: tuple[str, str],
) -> None:
    batch = make_batch(
        rng,
        [3000, 700, 40, 1, 0],
        [query_len, query_len, query_len, 1, 0],
        num_q_heads=8,
        window=window,
        block_size=block_size,
        layout=layout,
        **types(rng, kind, 2),
    )
    check_batch(cuda, naming_poisoned_blocks(rng, batch))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("query_len", [1, 4])
def test_the_largest_score_may_be_that_of_any_key(
    cuda: CupyBackend, rng: np.random.Generator, query_len: int, head_dim: int
) -> None:
    # All that was summed before such a key is scaled down by it, all that comes after it or from elsewhere too.
    places = [0, 15, 16, 63, 64, 1000, 1998, 1999]
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": head_dim, "dtype": np.float16}
    batch = make_batch(rng, [2000] * len(places), [query_len] * len(places), **heads)
    for b, place in enumerate(places):
        first_heads = batch.q[b * query_len + query_len - 1, ::2]
        batch.k_cache[batch.block_tables[b, place // 16], place % 16] = 3 * first_heads
    check_batch(cuda, batch)


def test_strides_of_dimensions_of_one_do_not_matter(cuda: CupyBackend, rng: np.random.Generator) -> None:
    # A slice of one KV head or of one block may have any stride there: nothing is ever a stride away.
    batch = make_batch(rng, [13], num_q_heads=4, num_kv_heads=1, head_dim=128, dtype=np.float16)
    block = int(batch.block_tables[0, 0])
    batch.block_tables = np.zeros((1, 1), np.int32)
    for name in ("k_cache", "v_cache"):
        whole = getattr(batch, name)[block : block + 1].copy()
        strides = (14, whole.strides[1], 2, 2)
        setattr(batch, name, np.ndarray(whole.shape, whole.dtype, buffer=whole, strides=strides))
    check_batch(cuda, batch)


def test_kv_heads_and_blocks_may_be_the_same_memory(cuda: CupyBackend, rng: np.random.Generator) -> None:
    # Strides of 0, as broadcasting makes them.
    batch = make_batch(rng, [100, 40], num_q_heads=8, num_kv_heads=2, head_dim=128, block_size=128, dtype=np.float16)
    for name in ("k_cache", "v_cache"):
        cache = getattr(batch, name)
        one = cache[batch.block_tables[0, 0]].copy()
        strides = (0, cache.strides[1], 0, cache.strides[3])
        setattr(batch, name, np.ndarray(cache.shape, cache.dtype, buffer=one, strides=strides))
    check_batch(cuda, batch)


def test_a_cache_without_blocks_serves_sequences_without_tokens(cuda: CupyBackend, rng: np.random.Generator) -> None:
    batch = make_batch(rng, [0, 0, 0], num_q_heads=8, num_kv_heads=2, head_dim=128, dtype=np.float16)
    for name in ("k_cache", "v_cache"):
        setattr(batch, name, poison((0, 16, 2, 128), np.float16))
    check_batch(cuda, batch)


@pytest.mark.parametrize("max_blocks", [0, 1, 7])
def test_a_table_that_ends_with_the_last_block_is_not_read_past_its_end(
    cuda: CupyBackend, rng: np.random.Generator, max_blocks: int
) -> None:
    # The row of the next sequence, or the end of the allocation, lies right behind.
    seq_lens = [16 * max_blocks, max(0, 16 * max_blocks - 5)]
    batch = make_batch(rng, seq_lens, num_q_heads=8, num_kv_heads=2, head_dim=128, dtype=np.float16)
    batch.block_tables = np.ascontiguousarray(batch.block_tables[:, :max_blocks])
    check_batch(cuda, batch)
