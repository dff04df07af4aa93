"""merge_states against the float64 reference.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_close, assert_lse_close, assert_same_bytes
from backends import DTYPES, NumpyBackend
from batches import normal, output, poison


def random_parts(
    rng: np.random.Generator, num_parts: int, shape: tuple[int, int, int], dtype: str, spread: float = 3.0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return partial outputs and their log-sum-exps, some of them minus infinity with an output of zeros."""
    outs = [rng.uniform(0.2, 1.8, shape).astype(DTYPES[dtype]) for _ in range(num_parts)]
    lses = [normal(rng, shape[:2], np.float32, spread) for _ in range(num_parts)]
    for out, lse in zip(outs, lses, strict=True):
        unseen = rng.random(lse.shape) < 0.2
        lse[unseen] = -np.inf
        out[unseen] = 0
    return outs, lses


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("shape", [(1, 1, 8), (7, 3, 64), (50, 4, 128), (3, 2, 1), (3, 2, 37), (2, 1, 512)])
def test_merged_parts_match_the_reference(
    backend: NumpyBackend, rng: np.random.Generator, dtype: str, num_parts: int, shape: tuple[int, int, int]
) -> None:
    outs, lses = random_parts(rng, num_parts, shape, dtype)
    expected, expected_lse = reference.merge_states(outs, lses)
    poisoned = output(shape, DTYPES[dtype], strided=num_parts % 2 == 1)
    out, lse = backend.arrays(poisoned.view, poison(shape[:2], np.float32))
    result = pagedattn.merge_states(list(backend.arrays(*outs)), list(backend.arrays(*lses)), out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    assert_close(backend.host(out), expected, DTYPES[dtype])
    assert_lse_close(backend.host(lse), expected_lse, tolerance=1e-5)
    assert poisoned.gaps_untouched(backend.allocation(out))


def test_stacked_parts_give_the_bits_of_a_list(backend: NumpyBackend, rng: np.random.Generator) -> None:
    outs, lses = random_parts(rng, 4, (9, 3, 64), "float16")
    listed = pagedattn.merge_states(list(backend.arrays(*outs)), list(backend.arrays(*lses)))
    stacked = pagedattn.merge_states(backend.array(np.stack(outs)), backend.array(np.stack(lses)))
    for one, other in zip(listed, stacked, strict=True):
        assert_same_bytes(backend.host(one), backend.host(other))


def test_parts_may_lie_apart_with_strides_of_their_own(backend: NumpyBackend, rng: np.random.Generator) -> None:
    outs, lses = random_parts(rng, 3, (9, 4, 64), "float16")
    expected, expected_lse = reference.merge_states(outs, lses)
    spread_outs = [outs[0], outs[1].transpose(1, 0, 2).copy().transpose(1, 0, 2), output((9, 4, 64), "float16").view]
    spread_outs[2][...] = outs[2]
    spread_lses = [lses[0].T.copy().T, lses[1], np.repeat(lses[2], 2, axis=1)[:, ::2]]
    out, lse = pagedattn.merge_states(list(backend.arrays(*spread_outs)), list(backend.arrays(*spread_lses)))
    assert_close(backend.host(out), expected, np.float16)
    assert_lse_close(backend.host(lse), expected_lse, tolerance=1e-5)


def test_parts_that_saw_no_key_give_zeros_and_minus_infinity(backend: NumpyBackend) -> None:
    outs, lses = [np.zeros((3, 2, 8), np.float32)] * 2, [np.full((3, 2), -np.inf, np.float32)] * 2
    out, lse = pagedattn.merge_states(list(backend.arrays(*outs)), list(backend.arrays(*lses)))
    np.testing.assert_array_equal(backend.host(out), 0)
    np.testing.assert_array_equal(backend.host(lse), -np.inf)


def test_a_part_that_saw_no_key_leaves_the_others_alone(backend: NumpyBackend, rng: np.random.Generator) -> None:
    out, lse = normal(rng, (3, 2, 8), np.float32), normal(rng, (3, 2), np.float32)
    outs = backend.arrays(np.zeros_like(out), out, np.zeros_like(out))
    lses = backend.arrays(np.full_like(lse, -np.inf), lse, np.full_like(lse, -np.inf))
    merged, merged_lse = pagedattn.merge_states(list(outs), list(lses))
    np.testing.assert_allclose(backend.host(merged), out, rtol=1e-6)
    np.testing.assert_allclose(backend.host(merged_lse), lse, rtol=1e-6)


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_log_sum_exps_far_beyond_the_range_of_exp_merge(
    backend: NumpyBackend, rng: np.random.Generator, offset: float
) -> None:
    outs, lses = random_parts(rng, 3, (9, 3, 64), "float32")
    lses = [(lse + np.float32(offset)).astype(np.float32) for lse in lses]
    expected, expected_lse = reference.merge_states(outs, lses)
    out, lse = pagedattn.merge_states(list(backend.arrays(*outs)), list(backend.arrays(*lses)))
    assert_close(backend.host(out), expected, np.float32)
    assert_lse_close(backend.host(lse), expected_lse)


def test_merging_no_tokens_gives_empty_results(backend: NumpyBackend) -> None:
    outs, lses = [np.zeros((0, 2, 8), np.float32)] * 2, [np.zeros((0, 2), np.float32)] * 2
    out, lse = pagedattn.merge_states(list(backend.arrays(*outs)), list(backend.arrays(*lses)))
    assert out.shape == (0, 2, 8)
    assert lse.shape == (0, 2)


def test_parts_are_not_changed(backend: NumpyBackend, rng: np.random.Generator) -> None:
    outs, lses = random_parts(rng, 3, (9, 3, 64), "float32")
    moved = list(backend.arrays(*outs, *lses))
    pagedattn.merge_states(moved[:3], moved[3:])
    for before, after in zip([*outs, *lses], moved, strict=True):
        assert_same_bytes(backend.host(after), before)
