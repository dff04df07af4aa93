# SPDX-License-Identifier: Apache-2.0
"""Short words for the tests of the block manager."""

from __future__ import annotations

import numpy as np
from pagedattn import BlockManager
from pagedattn._block_manager import StepBatch


def compute_all(m: BlockManager, seq: int) -> StepBatch:
    return m.step([seq], [m.num_tokens(seq) - m.num_computed_tokens(seq)])


def add_computed(m: BlockManager, tokens: list[int] | range, **options: object) -> int:
    seq = m.add(tokens, **options)
    compute_all(m, seq)
    return seq


def assert_unchanged(m: BlockManager, before: dict[str, np.ndarray]) -> None:
    m.check()
    after = m.snapshot()
    assert list(before) == list(after)
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)
