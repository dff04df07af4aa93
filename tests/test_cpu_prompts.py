"""Long prompts on the CPU: more keys than are packed at once, more rows than share them, and scores that rise.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_close
from attention_check import check_batch, types
from backends import BFLOAT16, DTYPES, NumpyBackend
from batches import SIXTEEN_BIT_KINDS, Batch, make_batch

TOKENS = 1300


# A prompt, a chunk behind what is cached, and a chunk that starts within a block.
@pytest.mark.parametrize("options", [{}, {"window": 700}, {"softcap": 5.0}, {"causal": False}], ids=str)
@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("kind", [("float32", "float32"), *SIXTEEN_BIT_KINDS], ids="-".join)
def test_long_prompts_match_the_reference_on_the_cpu(
    rng: np.random.Generator, kind: tuple[str, str], head_dim: int, options: dict[str, Any]
) -> None:
    shape: dict[str, Any] = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": head_dim, **types(rng, kind, 1)}
    batch = make_batch(rng, [TOKENS, 1031, 555], [TOKENS, 37, 300], **shape, **options)
    check_batch(NumpyBackend(), batch, deterministic=bool(rng.integers(2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_head_has_the_same_bits_whatever_another_one_holds(
    rng: np.random.Generator, bad: float, num_threads: int
) -> None:
    batch = make_batch(rng, [90], [40], num_q_heads=32, num_kv_heads=16, head_dim=64, dtype=DTYPES["float32"])
    args, options = batch.on(NumpyBackend())
    before = pagedattn.get_num_threads()
    expected = pagedattn.paged_attention(*args, **options, deterministic=True)
    args[2][batch.block_tables[0, 0], :, 0] = bad
    try:
        pagedattn.set_num_threads(num_threads)
        result = pagedattn.paged_attention(*args, **options, deterministic=True)
    finally:
        pagedattn.set_num_threads(before)
    np.testing.assert_array_equal(result[:, 2:].view(np.uint32), expected[:, 2:].view(np.uint32))


def with_rising_scores(rng: np.random.Generator, rise: float, dtype: Any = BFLOAT16) -> Batch:
    """Return a prompt whose scores rise (or fall) by so much from its first key to its last."""
    batch = make_batch(rng, [TOKENS], [TOKENS], num_q_heads=2, num_kv_heads=1, head_dim=64, dtype=dtype, scale=0.125)
    positions = np.arange(TOKENS)
    batch.q[..., 0] = 8.0
    slots = batch.block_tables[0, positions // 16], positions % 16
    batch.k_cache[(*slots, slice(None), 0)] = (positions * (rise / TOKENS)).astype(dtype)[:, None]
    return batch


# Weights are relative to a score that is only near the largest: slow rises stay below it, fast ones pass it often.
# Of a score of 400 float32 itself leaves more than results of float32 may be off.
RISES = [
    *((rise, "bfloat16") for rise in (-200.0, 3.0, 30.0, 400.0)),
    *((rise, "float32") for rise in (-30.0, 3.0, 30.0)),
    *((rise, "float16") for rise in (-200.0, 3.0, 30.0, 400.0)),
]


@pytest.mark.parametrize(("rise", "dtype"), RISES)
def test_scores_that_rise_along_a_prompt_match_the_reference(rng: np.random.Generator, dtype: str, rise: float) -> None:
    check_batch(NumpyBackend(), with_rising_scores(rng, rise, DTYPES[dtype]))


def float32_prompt(rng: np.random.Generator) -> Batch:
    return make_batch(rng, [300], [300], num_q_heads=2, num_kv_heads=1, head_dim=64, dtype=DTYPES["float32"])


# Products of float32 may be made of products in other types, which must not show: neither where those types end, nor
# where the largest number of a kind, or what is left of a small one, has no room in them.
@pytest.mark.parametrize("magnitude", [1e-42, 1e-38, 1e-33, 1e-25, 1e15, 1e22, 1e30, 1e36])
def test_float32_values_of_any_magnitude_match_the_reference(rng: np.random.Generator, magnitude: float) -> None:
    batch = float32_prompt(rng)
    batch.v_cache[...] = (batch.v_cache.astype(np.float64) * magnitude).astype(np.float32)
    check_batch(NumpyBackend(), batch)


@pytest.mark.parametrize("magnitude", [1e-36, 1e-28, 1e-18, 1e18, 1e28, 1e36])
def test_float32_keys_and_queries_of_any_magnitude_match_the_reference(
    rng: np.random.Generator, magnitude: float
) -> None:
    batch = float32_prompt(rng)
    batch.k_cache[...] = (batch.k_cache.astype(np.float64) * magnitude).astype(np.float32)
    batch.q[...] = (batch.q.astype(np.float64) / magnitude).astype(np.float32)
    check_batch(NumpyBackend(), batch)


@pytest.mark.parametrize("which", ["q", "k_cache", "v_cache"])
@pytest.mark.parametrize("odd", [1e-45, 1e-36, -0.0])
def test_a_tiny_number_among_others_changes_nothing(rng: np.random.Generator, which: str, odd: float) -> None:
    batch = float32_prompt(rng)
    getattr(batch, which)[..., ::5] = odd
    check_batch(NumpyBackend(), batch)


@pytest.mark.parametrize(
    ("rise", "dtype"), [(0.0, "bfloat16"), (400.0, "bfloat16"), (0.0, "float32"), (30.0, "float32")]
)
def test_a_nan_far_into_a_prompt_reaches_only_the_rows_that_see_it(
    rng: np.random.Generator, dtype: str, rise: float
) -> None:
    batch = with_rising_scores(rng, rise, DTYPES[dtype])
    expected, _ = batch.reference()
    batch.v_cache[batch.block_tables[0, 900 // 16], 900 % 16] = np.nan
    args, options = batch.on(NumpyBackend())
    result = pagedattn.paged_attention(*args, **options)
    assert_close(result[:900], expected[:900], DTYPES[dtype])
    assert np.isnan(result[900].astype(np.float32)).all()


def test_a_long_prompt_has_the_same_bits_whatever_else_is_in_the_batch(rng: np.random.Generator) -> None:
    batch = with_rising_scores(rng, 30.0)
    args, options = batch.on(NumpyBackend())
    q, k_cache, v_cache, tables, _ = args
    whole = pagedattn.paged_attention(*args, **options, deterministic=True)
    again = pagedattn.paged_attention(*args, **options, deterministic=True)
    np.testing.assert_array_equal(whole.view(np.uint16), again.view(np.uint16))
    # A second sequence in the batch, of other lengths.
    more = pagedattn.paged_attention(
        np.concatenate([q, q[:77]]),
        k_cache,
        v_cache,
        np.concatenate([tables, tables]),
        np.array([TOKENS, 500], np.int32),
        query_start_loc=np.array([0, TOKENS, TOKENS + 77], np.int32),
        scale=0.125,
        deterministic=True,
    )
    np.testing.assert_array_equal(whole.view(np.uint16), more[:TOKENS].view(np.uint16))
