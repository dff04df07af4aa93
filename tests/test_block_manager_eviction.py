# SPDX-License-Identifier: Apache-2.0
"""Blocks that come into use leave gaps among those that wait for eviction: order and size stay what they were."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from block_manager_helpers import compute_all
from pagedattn import BlockManager


@pytest.mark.parametrize("levels", [1, 3])
def test_gaps_in_the_eviction_order_leave_it_as_it_was(levels: int) -> None:
    rng = np.random.default_rng()
    m = BlockManager(600, 1)
    prompts = [np.arange(20) + 100 * i for i in range(30)]
    order: list[list[int]] = [[] for _ in range(levels)]  # by priority, the next one first
    level_of: dict[int, int] = {}
    for _ in range(600):
        prompt = prompts[rng.integers(30)][: rng.integers(2, 21)]
        level = int(rng.integers(levels))
        seq = m.add(prompt, priority=level)
        compute_all(m, seq)
        table = m.block_table(seq).tolist()
        for block in table:
            for blocks in order:
                if block in blocks:
                    blocks.remove(block)
            level_of[block] = max(level, level_of.get(block, 0))
        m.free(seq)
        for block in reversed(table):
            order[level_of[block]].append(block)
        m.check()
        assert m.snapshot()["evictable_blocks"].tolist() == list(chain(*order))
    taken = m.add(np.arange(300) + 10_000, priority=levels)
    left = m.num_free_blocks
    compute_all(m, taken)
    assert m.num_free_blocks == left - 300
    m.check()
    kept = list(chain(*order))[-(m.num_cached_blocks - 300) :]
    assert m.snapshot()["evictable_blocks"].tolist() == kept


@pytest.mark.parametrize("levels", [1, 3])
def test_blocks_move_up_into_gaps_in_the_order_of_eviction(levels: int) -> None:
    # Every block is evictable, so that there is hardly more room than they need without gaps.
    rng = np.random.default_rng()
    m = BlockManager(1300, 1)
    level_of = rng.integers(levels, size=1300).tolist()
    for i in range(1300):
        seq = m.add([i], priority=level_of[i])
        compute_all(m, seq)
        m.free(seq)
    order = [[i for i in range(1300) if level_of[i] == level] for level in range(levels)]
    for round in range(40):
        # Of 13 blocks, which is what a part of the order holds, six go: two neighbours are too full to become one.
        chosen = rng.permutation(1300)[:600] if round % 4 == 3 else [b for o in order for b in o if rng.random() < 0.46]
        for block in chosen:
            m.unpin(m.pin([block]))
            order[level_of[block]].remove(block)
            order[level_of[block]].append(block)
        m.check()
        assert m.snapshot()["evictable_blocks"].tolist() == list(chain(*order))


MEMORY = """
import os
import numpy as np
from pagedattn import BlockManager, StepBatch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def fill(m, ids):
    seqs = [m.add(row) for row in ids]
    m.step(seqs, ids.shape[1], batch)
    m.free(seqs)

blocks = 13 * 150_000
prompts = np.arange(2 * blocks, dtype=np.int32).reshape(-1, SHAPE)
_, seqs, tokens = prompts.shape
batch = StepBatch(seqs, tokens // 2, seqs * tokens)
once = BlockManager(seqs * tokens // 2, 2, prefix_caching=False)
fill(once, prompts[0])  # touches the arrays
before = resident()
m = BlockManager(blocks, 2)
for ids in prompts:
    fill(m, ids)
GAPS
print((resident() - before) / blocks)
assert m.num_cached_blocks == blocks
m.check()
"""

# Of 13 blocks in a row six come into use and go to the end of the order, then of 13 of these, and so on.
GAPS = """
def six_of_13(order):
    return (block for i, block in enumerate(order) if i % 13 < 6)

for depth in range(1, 5):
    order = range(blocks)
    for _ in range(depth):
        order = six_of_13(order)
    for block in order:
        m.unpin(m.pin((2 * block, 2 * block + 1)))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux for the memory in use")
@pytest.mark.parametrize(("shape", "gaps"), [("1, 26_000", ""), ("1000, 2", GAPS)], ids=["without gaps", "with gaps"])
def test_a_cached_block_takes_48_bytes_besides_its_tokens(shape: str, gaps: str) -> None:
    code = MEMORY.replace("SHAPE", shape).replace("GAPS", gaps)
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    tokens = 2 * 4
    assert float(done.stdout) - tokens < 48.5, "half a byte is left to the rest of the process"
