"""Prefill and append of every shape against the float64 reference: sizes, types, strides, options, mixed batches.

Query lengths lie on both sides of the tiles that kernels cut at; prompts begin empty, or behind a long cache.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_same_bytes
from attention_check import COMMON_OPTIONS, check_batch, check_case, types
from backends import DTYPES, CupyBackend
from batches import TENSOR_CORE_KINDS, lens, make_batch, naming_poisoned_blocks, scale_for
from cuda_graphs import CapturedAttention
from pairwise import case_id, pairwise
from test_decode_kernels import PREAMBLE, run

pytestmark = pytest.mark.gpu

# (tokens in the cache, query tokens among them): whole prompts, chunks, and what other kernels serve.
SEQUENCES = [(130, 130), (1100, 90), (40, 40), (700, 1), (0, 70), (300, 4), (65, 65), (260, 129)]


PAIRWISE = pairwise(
    {
        **COMMON_OPTIONS,
        "block_size": [1, 3, 8, 16, 24, 32, 40, 48, 64, 96, 128, 256],
        "group": [1, 2, 3, 4, 5, 7, 8, 12, 16, 24],
        "window": [None, 1, 7, 100, 128, 1000, 10_000],
    }
)


@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_every_pair_of_options_of_prefill_matches_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any]
) -> None:
    check_case(cuda, rng, case, case["group"], *lens(SEQUENCES))


@pytest.mark.parametrize("kind", TENSOR_CORE_KINDS, ids="-".join)
@pytest.mark.parametrize("head_dim", [64, 80, 88, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
def test_prompts_behind_a_cache_match_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, block_size: int, head_dim: int, kind: tuple[str, str]
) -> None:
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": head_dim, "block_size": block_size}
    check_batch(cuda, make_batch(rng, *lens([(2000, 200), (511, 511), (129, 128)]), **shape, **types(rng, kind, 2)))


@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("group", [1, 3, 5, 7, 16, 33, 48, 64, 65, 71, 128, 192])
def test_prefill_of_any_group_matches_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, group: int, head_dim: int
) -> None:
    heads = {"num_q_heads": group, "num_kv_heads": 1, "head_dim": head_dim, "dtype": DTYPES["bfloat16"]}
    check_batch(cuda, make_batch(rng, *lens([(300, 77), (90, 90), (9, 2), (64, 64)]), **heads))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kind", [("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3"), ("float16", "float8_e5m2")])
def test_tiles_of_any_number_of_rows_behind_a_cache_match_the_reference(
    cuda: CupyBackend, rng: np.random.Generator, kind: tuple[str, str], head_dim: int, deterministic: bool
) -> None:
    # On both sides of what a warp, and a tile, has of rows; tiles are shared by several blocks.
    sequences = [(900 + rows, rows) for rows in (17, 32, 33, 63, 64, 65, 127, 128, 129, 193)]
    shape = {"num_q_heads": 2, "num_kv_heads": 2, "head_dim": head_dim, **types(rng, kind, 2)}
    check_batch(cuda, make_batch(rng, *lens(sequences), **shape), deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("sequences", "heads"),
    [
        # Fewer tiles than multiprocessors, each shared by many of them.
        ([(20_000, 70)], (4, 1)),
        ([(9000, 128), (3, 3), (6000, 65)], (4, 2)),
        # Just over as many as they take in a round, all of one length, and of all lengths.
        ([(1000, 64)] * 36, (32, 8)),
        ([(700, 700), (1500, 1500)], (32, 8)),
        # Many short sequences, most of which another kernel serves.
        ([(80, 80), (50, 1), (33, 2), (0, 0)] * 200, (4, 2)),
    ],
    ids=["one long", "few", "one round and more", "causal", "many short"],
)
def test_work_is_divided_well_and_right(
    cuda: CupyBackend,
    rng: np.random.Generator,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    deterministic: bool,
) -> None:
    shape = {"num_q_heads": heads[0], "num_kv_heads": heads[1], "head_dim": 64, "dtype": np.float16}
    check_batch(cuda, make_batch(rng, *lens(sequences), **shape), deterministic=deterministic)


@pytest.mark.parametrize("kind", [("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3")], ids="-".join)
@pytest.mark.parametrize("spread", [1.0, 2.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_prompts_bits_do_not_depend_on_the_batch_if_results_are_deterministic(
    cuda: CupyBackend, rng: np.random.Generator, head_dim: int, spread: float, kind: tuple[str, str]
) -> None:
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": head_dim, **types(rng, kind, 2)}
    batch = make_batch(rng, *lens([(5000, 100), *[(1000, 64)] * 40, (1300, 1300)]), **shape, spread=spread)
    args, options = batch.on(cuda)
    whole = [cuda.host(x) for x in pagedattn.paged_attention(*args, **options, deterministic=True, return_lse=True)]
    del options["query_start_loc"]
    q, _, _, tables, seq_lens = args
    for index, first, count in ((0, 0, 100), (41, 2660, 1300)):
        alone = pagedattn.paged_attention(
            q[first : first + count],
            args[1],
            args[2],
            tables[index : index + 1],
            seq_lens[index : index + 1],
            query_start_loc=cuda.array(np.array([0, count], np.int32)),
            **options,
            deterministic=True,
            return_lse=True,
        )
        for one, all_of_them in zip(alone, whole, strict=True):
            assert_same_bytes(cuda.host(one), all_of_them[first : first + count])


@pytest.mark.parametrize("kind", TENSOR_CORE_KINDS[1:3], ids="-".join)
@pytest.mark.parametrize("options", [{}, {"window": 200}, {"softcap": 2.0}], ids=case_id)
@pytest.mark.parametrize("head_dim", [96, 128])
def test_the_last_keys_of_a_tile_may_be_seen_by_nobody(
    cuda: CupyBackend, rng: np.random.Generator, head_dim: int, options: dict[str, Any], kind: tuple[str, str]
) -> None:
    # Many items of two or three tiles each, on both sides of half a tile, one behind the other in a block.
    lengths = [130 + over + 32 * i for i in range(6) for over in (0, 1, 30, 31, 32, 33, 62, 63, 64, 65)]
    sequences = [(length, 70 + length % 7) for length in lengths]
    shape = {"num_q_heads": 8, "num_kv_heads": 8, "head_dim": head_dim, **types(rng, kind, 8)}
    check_batch(cuda, make_batch(rng, *lens(sequences), **shape, **options))


def test_twenty_runs_of_a_mixed_batch_give_the_same_bits(cuda: CupyBackend, rng: np.random.Generator) -> None:
    shape = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": DTYPES["bfloat16"]}
    args, options = make_batch(rng, *lens([(3000, 500), (700, 700), (900, 1), (9000, 80)]), **shape).on(cuda)
    runs = [cuda.host(pagedattn.paged_attention(*args, **options)) for _ in range(20)]
    for other in runs[1:]:
        assert_same_bytes(other, runs[0])


@pytest.mark.parametrize("heads", [(4, 2), (10, 2)])
def test_a_captured_prefill_follows_new_lengths_and_tables(
    cuda: CupyBackend, rng: np.random.Generator, heads: tuple[int, int]
) -> None:
    shape = {"num_q_heads": heads[0], "num_kv_heads": heads[1], "head_dim": 128, "dtype": np.float16}
    mixes = [
        [(200, 200), (3000, 100), (80, 80), (70, 70)],
        [(450, 450), (0, 0), (0, 0), (0, 0)],
        [(3000, 1), (9, 1), (448, 448), (0, 0)],
        [(900, 113), (900, 112), (900, 113), (900, 112)],
    ]
    captured = CapturedAttention(cuda, make_batch(rng, *lens(mixes[0]), **shape))
    for mix in mixes:
        captured.check(make_batch(rng, *lens(mix), **shape))


@pytest.mark.parametrize(("block_size", "window"), [(8, 100), (16, 1), (64, 257), (256, 100)])
def test_prefill_may_name_anything_outside_its_window(
    cuda: CupyBackend, rng: np.random.Generator, block_size: int, window: int
) -> None:
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": np.float16, "block_size": block_size}
    batch = make_batch(rng, *lens([(3000, 100), (700, 80), (90, 90)]), window=window, **shape)
    check_batch(cuda, naming_poisoned_blocks(rng, batch))


@pytest.mark.parametrize("kind", TENSOR_CORE_KINDS[2:], ids="-".join)
@pytest.mark.parametrize("head_dim", [56, 64, 80, 128, 192, 256])
@pytest.mark.parametrize(
    "options",
    [{"window": 100}, {"window": 257, "softcap": 1.5}, {"softcap": 1.5}, {"causal": False}],
    ids=case_id,
)
def test_prefill_over_float8_caches_takes_every_option(
    cuda: CupyBackend, rng: np.random.Generator, options: dict[str, Any], head_dim: int, kind: tuple[str, str]
) -> None:
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": head_dim, **types(rng, kind, 2)}
    check_batch(cuda, make_batch(rng, *lens([(1500, 100), (700, 300), (90, 90)]), **options, **shape))


@pytest.mark.parametrize("kind", TENSOR_CORE_KINDS[2:], ids="-".join)
def test_prefill_over_a_float8_cache_may_name_anything_outside_its_window(
    cuda: CupyBackend, rng: np.random.Generator, kind: tuple[str, str]
) -> None:
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, **types(rng, kind, 2)}
    batch = make_batch(rng, *lens([(3000, 100), (700, 80), (90, 90)]), window=100, **shape)
    check_batch(cuda, naming_poisoned_blocks(rng, batch))


@pytest.mark.parametrize("k_scale", [0.0, -0.5, 1e-6, 20.0])
def test_prefill_takes_any_scale_of_keys(cuda: CupyBackend, rng: np.random.Generator, k_scale: float) -> None:
    # Scores are compared before they are scaled only where that keeps their order.
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, **types(rng, ("bfloat16", "float8_e4m3"), 2)}
    batch = make_batch(rng, *lens([(1500, 100), (300, 300)]), **shape)
    batch.options["k_scale"] = np.array([k_scale, 0.5], np.float32)
    check_batch(cuda, batch)


@pytest.mark.parametrize("exponent", [-100, -30, 20, 100])
def test_bfloat16_queries_over_a_float8_cache_may_be_of_any_size(
    cuda: CupyBackend, rng: np.random.Generator, exponent: int
) -> None:
    # Rows far apart, beyond what a float16 holds.
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "scale": 2.0 ** -(exponent + 4)}
    batch = make_batch(rng, *lens([(900, 200), (129, 128)]), **shape, **types(rng, ("bfloat16", "float8_e4m3"), 2))
    sizes = 2.0 ** (exponent - rng.integers(0, 20, (len(batch.q), 1, 1)))
    batch.q = (batch.q.astype(np.float64) * sizes).astype(batch.q.dtype)
    check_batch(cuda, batch)


@pytest.mark.parametrize("place", [0, 15, 127, 128, 1000, 1899])
def test_the_largest_score_of_a_prompt_may_be_that_of_any_key(
    cuda: CupyBackend, rng: np.random.Generator, place: int
) -> None:
    # What was summed before it, right of it, is scaled down; steps below and above what rescaling waits for.
    shape = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 128, "dtype": np.float16}
    batch = make_batch(rng, [2000], [100], **shape)
    for factor, row in ((0.4, 0), (1.0, 50), (3.0, 99)):
        batch.k_cache[batch.block_tables[0, (place + row // 50) // 16], (place + row // 50) % 16] += (
            factor * batch.q[row, ::2]
        ).astype(np.float16)
    check_batch(cuda, batch)


@pytest.mark.parametrize("kind", [("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3"), ("float16", "float8_e5m2")])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("factor", [0.3, 0.6, 4.0, 9.0])
def test_scores_may_rise_towards_the_first_keys(
    cuda: CupyBackend, rng: np.random.Generator, factor: float, head_dim: int, kind: tuple[str, str]
) -> None:
    # Tiles come from the last to the first.  Weights beside the largest of before: many of moderate size, some above
    # what is kept, far above, and above what float32 holds.  Groups of five leave rows of a tile without a token.
    shape = {"num_q_heads": 10, "num_kv_heads": 2, "head_dim": head_dim}
    batch = make_batch(rng, [2000, 900], [100, 300], **shape, **types(rng, kind, 2))
    common = rng.standard_normal(head_dim) * (128 / head_dim) ** 0.25
    batch.q = (batch.q * 0.25 + common).astype(batch.q.dtype)
    for sequence, end in ((0, 1100), (1, 333)):
        tokens = np.arange(end)
        place = batch.block_tables[sequence, tokens // 16], tokens % 16
        batch.k_cache[place] = (batch.k_cache[place].astype(np.float32) + factor * common).astype(batch.k_cache.dtype)
    check_batch(cuda, batch)


def test_lanes_without_a_token_do_not_run_ahead_of_their_warp(cuda: CupyBackend, rng: np.random.Generator) -> None:
    # Rows of a tile without a token, in tiles that several blocks share, where some warps take far longer than others:
    # lanes that were not waited for once took part in products alone, in most runs but not in all.
    shape = {"num_q_heads": 10, "num_kv_heads": 2, "head_dim": 128, **types(rng, ("bfloat16", "float8_e4m3"), 2)}
    batch = make_batch(rng, *lens([(2000, 100), (900, 300)]), **shape, spread=3.0)
    for sequence, end in enumerate((1000, 450)):
        place = batch.block_tables[sequence, np.arange(end) // 16], np.arange(end) % 16
        batch.k_cache[place] = (batch.k_cache[place].astype(np.float32) * 4).astype(batch.k_cache.dtype)
    for _ in range(10):
        check_batch(cuda, batch)


def require_hopper(cuda: CupyBackend) -> None:
    if cuda.cupy.cuda.Device().compute_capability != "90" or os.environ.get("PAGEDATTN_CUDA_ARCH"):
        pytest.skip("this device or PAGEDATTN_CUDA_ARCH wants the generic kernels")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, "hopper_prefill_float16_d128"),
        ({"head_dim": 56}, "hopper_prefill_float16_d64"),
        ({"head_dim": 72}, "hopper_prefill_float16_d112"),
        ({"head_dim": 80}, "hopper_prefill_float16_d80"),
        ({"head_dim": 88}, "hopper_prefill_float16_d112"),
        ({"head_dim": 96}, "hopper_prefill_float16_d96"),
        ({"num_q_heads": 10}, "hopper_prefill_float16_d128"),
        ({"block_size": 8, "layout": "HND"}, "hopper_prefill_float16_d128"),
        ({"packed_q": True}, "hopper_prefill_float16_d128"),
        ({"window": 9, "softcap": 2.0}, "hopper_prefill_float16_d128"),
        ({"block_size": 12}, "mma_float16_d128_many_rows"),
        ({"layout": "odd rows"}, "mma_float16_d128_many_rows"),
        ({"kv_dtype": "float8_e4m3"}, "hopper_prefill_float8_e4m3_d128"),
        ({"kv_dtype": "float8_e5m2", "head_dim": 96}, "hopper_prefill_float8_e5m2_d96"),
        ({"kv_dtype": "float8_e5m2", "block_size": 12}, "mma_float8_e5m2_d128_many_rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else case_id(value),
)
def test_on_hopper_its_own_kernels_serve_prefill(
    cuda: CupyBackend, rng: np.random.Generator, case: dict[str, Any], expected: str
) -> None:
    require_hopper(cuda)
    case = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": np.float16, **case}
    if "kv_dtype" in case:
        case["kv_dtype"] = DTYPES[case["kv_dtype"]]
        case |= scale_for(case["kv_dtype"], rng, 2)
    check_batch(cuda, make_batch(rng, [300, 40], [200, 1], **case))
    assert pagedattn.last_kernel().split("+")[1] == expected


def test_queries_that_lie_where_the_copy_engine_cannot_read_are_served_by_the_generic_kernel(
    cuda: CupyBackend, rng: np.random.Generator
) -> None:
    require_hopper(cuda)
    batch = make_batch(rng, [300], [200], num_q_heads=8, num_kv_heads=2, head_dim=64, dtype=np.float16)
    wide = np.zeros((200, 8, 68), np.float16)
    wide[..., 4:] = batch.q
    batch.q = wide[..., 4:]
    check_batch(cuda, batch)
    assert pagedattn.last_kernel() == "mma_float16_d64_many_rows"


CONTRACT = (
    PREAMBLE
    + """
import test_prefill_shapes as prefill

for case in prefill.PAIRWISE[::4]:
    prefill.test_every_pair_of_options_of_prefill_matches_the_reference(cuda, rng, case)
for head_dim in (64, 80, 128, 192, 256):
    for block_size in (8, 16, 64):
        prefill.test_prompts_behind_a_cache_match_the_reference(
            cuda, rng, block_size, head_dim, ("bfloat16", "bfloat16"))
for group in (1, 7, 48, 71, 192):
    prefill.test_prefill_of_any_group_matches_the_reference(cuda, rng, group, 128)
for deterministic in (False, True):
    prefill.test_tiles_of_any_number_of_rows_behind_a_cache_match_the_reference(
        cuda, rng, ("bfloat16", "bfloat16"), 128, deterministic)
prefill.test_a_prompts_bits_do_not_depend_on_the_batch_if_results_are_deterministic(
    cuda, rng, 128, 1.0, ("bfloat16", "bfloat16"))
prefill.test_twenty_runs_of_a_mixed_batch_give_the_same_bits(cuda, rng)
prefill.test_prefill_may_name_anything_outside_its_window(cuda, rng, 16, 100)
for place in (0, 127, 1000, 1899):
    prefill.test_the_largest_score_of_a_prompt_may_be_that_of_any_key(cuda, rng, place)
assert pagedattn.last_kernel() == "mma_float16_d128_many_rows"
"""
)


def test_generic_kernels_serve_prefill_where_they_are_asked_for(cuda: CupyBackend) -> None:
    result = run(CONTRACT, "sm_80")
    assert result.returncode == 0, result.stdout + result.stderr
