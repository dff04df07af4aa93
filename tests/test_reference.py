"""The reference itself, against softmax written out key by key.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from accuracy import first
from batches import LAYOUTS, cache_views, is_poison, make_batch, output


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_reference_is_softmax_key_by_key(
    rng: np.random.Generator, layout: str, causal: bool, window: int | None
) -> None:
    slopes, sinks = rng.uniform(-1, 1, 4).astype(np.float32), rng.uniform(-1, 1, 4).astype(np.float32)
    batch = make_batch(
        rng,
        [9, 5, 0, 4],
        [3, 5, 0, 1],
        block_size=2,
        head_dim=8,
        layout=layout,
        causal=causal,
        window=window,
        softcap=2.0,
        alibi_slopes=slopes,
        sinks=sinks,
        k_scale=0.5,
        v_scale=[2.0, 3.0],
    )
    out, lse = batch.reference()
    row = 0
    for b, (seq_len, query_len) in enumerate(zip([9, 5, 0, 4], [3, 5, 0, 1], strict=True)):
        for r in range(query_len):
            i = seq_len - query_len + r
            for h in range(4):
                total, mean = math.exp(sinks[h]), np.zeros(8)
                keys = [j for j in range(seq_len) if not causal or j <= i]
                for j in keys if window is None else keys[-window:]:
                    block, slot = batch.block_tables[b, j // 2], j % 2
                    score = 8**-0.5 * float(batch.q[row, h].astype(float) @ (0.5 * batch.k_cache[block, slot, h // 2]))
                    weight = math.exp(2 * math.tanh(score / 2) + slopes[h] * (j - i))
                    total += weight
                    mean += weight * [2.0, 3.0][h // 2] * batch.v_cache[block, slot, h // 2]
                np.testing.assert_allclose(out[row, h], mean / total, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(lse[row, h], math.log(total), rtol=1e-5, atol=1e-6)
            row += 1


def test_reference_merge_of_disjoint_parts_is_attention_over_all_keys(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [7], [1], block_size=1, head_dim=8)
    whole = batch.reference()
    parts = []
    for keys in (slice(0, 3), slice(3, 7)):
        tables, lens = batch.block_tables[:, keys], np.array([keys.stop - keys.start])
        parts.append(reference.paged_attention(batch.q, batch.k_cache, batch.v_cache, tables, lens))
    parts.append((np.zeros_like(whole[0]), np.full_like(whole[1], -np.inf)))
    out, lse = reference.merge_states([out for out, _ in parts], [lse for _, lse in parts])
    np.testing.assert_allclose(out, whole[0], rtol=1e-12)
    np.testing.assert_allclose(lse, whole[1], rtol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_layouts_have_the_shape_and_only_other_strides(layout: str) -> None:
    for cache in cache_views(5, 3, 2, 8, np.float16, layout):
        assert cache.shape == (5, 3, 2, 8)
        assert cache.strides[-1] == 2
        assert is_poison(cache).all(), first(~is_poison(cache))


def test_output_tells_a_touched_gap() -> None:
    poisoned = output((3, 2, 8), np.float16, strided=True)
    poisoned.view[...] = 1
    owner = poisoned.view.base
    assert owner is not None
    after = owner.reshape(-1).view(np.uint8)
    assert poisoned.gaps_untouched(after)
    owner[1, 2, 0] = 0
    assert not poisoned.gaps_untouched(after)
