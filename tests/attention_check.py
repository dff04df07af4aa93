"""Runs a batch through paged_attention and judges everything that it wrote, and that it wrote nothing else.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
from accuracy import assert_close, assert_lse_close
from backends import NumpyBackend
from batches import Batch, output, poison


def check_batch(backend: NumpyBackend, batch: Batch, *, strided_out: bool = False, **more: Any) -> None:
    """Run a batch into poisoned outputs; check outputs, log-sum-exps, gaps, and that no input has changed."""
    expected, expected_lse = batch.reference()
    args, options = batch.on(backend)
    before = [backend.allocation(array) for array in args]
    poisoned = output(batch.q.shape, batch.q.dtype, strided=strided_out)  # type: ignore[arg-type]
    out, lse = backend.arrays(poisoned.view, poison(batch.q.shape[:2], np.float32))
    result = pagedattn.paged_attention(*args, out=out, lse=lse, **options, **more)
    assert_close(backend.host(out), expected, batch.q.dtype)
    assert_lse_close(backend.host(lse), expected_lse)
    assert poisoned.gaps_untouched(backend.allocation(out))
    for array, bytes_before in zip(args, before, strict=True):
        np.testing.assert_array_equal(backend.allocation(array), bytes_before)
    assert result is out or (result[0] is out and result[1] is lse)


def check_output_alone(backend: NumpyBackend, batch: Batch, **more: Any) -> None:
    """Run a batch without asking for log-sum-exps; check every element of a poisoned output."""
    args, options = batch.on(backend)
    out = backend.array(poison(batch.q.shape, batch.q.dtype))
    pagedattn.paged_attention(*args, out=out, **options, **more)
    assert_close(backend.host(out), batch.reference()[0], batch.q.dtype)
