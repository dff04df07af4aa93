# SPDX-License-Identifier: Apache-2.0
"""The paged roof of the CPU: how fast the blocks of a case can be read at best, as they lie.

The ceiling of contiguous reads is out of reach where blocks lie anywhere.  Here the same threads walk the same block
tables, K and V of a block and then the next block, fetched ahead, and do nothing with what they read.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

import pagedattn
from pagedattn import _core

from .cases import Case
from .inputs import Inputs

_READ_BYTES = 256 << 20  # of a call: starting its threads must not count


class PagedRoof:
    """Reads the blocks that a case's queries see.

    Attributes
    ----------
    num_bytes : int
        What one call reads: whole blocks of keys and values, several times over where they are few.
    """

    def __init__(self, inputs: Inputs) -> None:
        blocks = visible_blocks(inputs.case, inputs.host_block_tables)
        self._caches = inputs.k_cache, inputs.v_cache
        pass_bytes = len(blocks) * sum(cache.nbytes // len(cache) for cache in self._caches)
        self._passes = max(1, _READ_BYTES // pass_bytes)
        self._parts = [part for part in np.array_split(blocks, pagedattn.get_num_threads()) if len(part)]
        self.num_bytes = self._passes * pass_bytes

    def __call__(self) -> None:
        """Read them, on as many threads as pagedattn has."""
        with ThreadPoolExecutor(len(self._parts)) as pool:
            list(pool.map(lambda part: _core.read_blocks(*self._caches, part, self._passes), self._parts))


def visible_blocks(case: Case, block_tables: NDArray[np.int32]) -> NDArray[np.int32]:
    """Blocks of keys that some query token sees, sequence after sequence."""
    rows = []
    for row, kv_len in enumerate(case.kv_lens):
        first = case.visible_keys(row, 0)[0]
        rows.append(block_tables[row, first // case.block_size : -(-kv_len // case.block_size)])
    return np.concatenate(rows)
