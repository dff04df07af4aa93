"""Decode on the GPU in a CUDA graph: captured once, replayed while the sequences grow.

SPDX-License-Identifier: Apache-2.0

With `out` and `workspace` given a call allocates nothing and reads no length on the host, so one captured graph serves
every step: only the arrays it reads change.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pagedattn

NUM_SEQS, NUM_BLOCKS, BLOCK_SIZE, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 512, 16, 32, 8, 128
MAX_BLOCKS = NUM_BLOCKS // NUM_SEQS


def why_not() -> str | None:
    """Return why this example cannot run here, or None."""
    try:
        import cupy as cp

        cp.cuda.runtime.getDeviceCount()
    except ImportError:
        return "CuPy is not installed"
    except Exception as error:
        return f"no CUDA device ({error})"
    return None if pagedattn.config()["cuda"]["built"] else "pagedattn was built without CUDA"


def random(cp: Any, *shape: int) -> Any:
    """Return random float16 numbers on the GPU."""
    return cp.random.standard_normal(shape, dtype=cp.float32).astype(cp.float16)


def main() -> None:
    """Capture one decode step and replay it for growing sequences."""
    import cupy as cp

    k_cache = random(cp, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    v_cache = random(cp, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    block_tables = cp.random.permutation(NUM_BLOCKS).astype(cp.int32).reshape(NUM_SEQS, MAX_BLOCKS)
    seq_lens = cp.asarray(np.random.default_rng().integers(1, 500, NUM_SEQS), dtype=cp.int32)
    q = random(cp, NUM_SEQS, NUM_Q_HEADS, HEAD_DIM)
    out = cp.empty_like(q)
    arguments = (q, k_cache, v_cache, block_tables, seq_lens)
    workspace = cp.zeros(pagedattn.paged_attention_workspace_size(*arguments), cp.uint8)

    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        pagedattn.paged_attention(*arguments, out=out, workspace=workspace)
        stream.begin_capture()
        pagedattn.paged_attention(*arguments, out=out, workspace=workspace)
        graph = stream.end_capture()
        for _step in range(20):
            q[...] = random(cp, NUM_SEQS, NUM_Q_HEADS, HEAD_DIM)
            seq_lens += 1
            graph.launch(stream)
            expected = pagedattn.paged_attention(*arguments)
            cp.testing.assert_array_equal(out, expected)
    print(f"20 replays of one graph, lengths now {seq_lens.get().tolist()}: correct")


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        print(f"skipped: {reason}")
        sys.exit(0)
    main()
