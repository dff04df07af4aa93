"""Captures calls in CUDA graphs, and checks a captured attention against the reference each time it is replayed.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pagedattn
from attention_check import assert_result_close, assert_result_lse_close
from backends import Array, CupyBackend
from batches import Batch, poison

NUM_BLOCKS, MAX_BLOCKS = 700, 200


def capture(cuda: CupyBackend, call: Callable[[Any], Any]) -> Callable[[], None]:
    """Return what replays `call(stream)`, which has run once before it is captured, as engines do."""
    stream = cuda.cupy.cuda.Stream(non_blocking=True)
    cuda.synchronize()  # uploads ran on another stream
    call(stream)
    stream.synchronize()
    with stream:
        stream.begin_capture()
        call(stream)
        graph = stream.end_capture()

    def replay() -> None:
        cuda.synchronize()
        graph.launch(stream)
        stream.synchronize()

    return replay


def refill(target: Array, source: np.ndarray) -> None:
    """Overwrite a device array in place."""
    target.set(np.ascontiguousarray(source).view(target.dtype))


def workspace_for(cuda: CupyBackend, calls: list[tuple[list[Array], dict[str, Any]]]) -> Array:
    """Return a workspace, zero, that suffices for each of the calls' arguments."""
    names = ("query_start_loc", "max_query_len", "kv_dtype", "deterministic")
    sizes = [
        pagedattn.paged_attention_workspace_size(*args, **{name: options[name] for name in names if name in options})
        for args, options in calls
    ]
    return cuda.cupy.zeros(max(sizes), np.uint8)


class CapturedAttention:
    """One call of `paged_attention` in a graph, replayed with the lengths, tables and contents of other batches.

    All batches must have as many sequences and query tokens as the first.
    """

    def __init__(self, cuda: CupyBackend, first: Batch, *, with_workspace: bool = True) -> None:
        self._cuda = cuda
        self._args, self._options = _resized(first).on(cuda)
        self._out, self._lse = cuda.arrays(
            poison(first.q.shape, first.out_dtype), poison(first.q.shape[:2], np.float32)
        )
        if with_workspace:
            self._options["workspace"] = workspace_for(cuda, [(self._args, self._options)])
        self._replay = capture(cuda, self._call)

    def _call(self, stream: Any) -> None:
        pagedattn.paged_attention(*self._args, out=self._out, lse=self._lse, stream=stream, **self._options)

    def check(self, batch: Batch) -> None:
        """Replay with this batch in place of the last one, and compare with the reference."""
        batch = _resized(batch)
        fresh = (batch.q, batch.k_cache, batch.v_cache, batch.block_tables, batch.seq_lens)
        for target, source in zip(self._args, fresh, strict=True):
            refill(target, source)
        if batch.query_start_loc is not None:
            refill(self._options["query_start_loc"], batch.query_start_loc)
        refill(self._out, poison(batch.q.shape, batch.out_dtype))
        refill(self._lse, poison(batch.q.shape[:2], np.float32))
        self._replay()
        expected, expected_lse = batch.reference()
        assert_result_close(self._cuda.host(self._out), expected, batch.out_dtype)
        assert_result_lse_close(self._cuda.host(self._lse), expected_lse)


def _resized(batch: Batch) -> Batch:
    """Return the batch in a cache and tables of the graph's sizes."""
    tables = np.full((len(batch.seq_lens), MAX_BLOCKS), -1, np.int32)
    tables[:, : batch.block_tables.shape[1]] = batch.block_tables
    batch.block_tables = tables
    for name in ("k_cache", "v_cache"):
        small = getattr(batch, name)
        large = poison((NUM_BLOCKS, *small.shape[1:]), small.dtype)
        large[: len(small)] = small
        setattr(batch, name, large)
    return batch
