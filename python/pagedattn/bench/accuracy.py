# SPDX-License-Identifier: Apache-2.0
"""A wrong answer has no time: sampled rows of a result against float64, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .inputs import Inputs, poison, to_host

# Largest relative error, by the type of out.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
# A peer that rounds more than the contract allows ours is shown with its error; beyond this it computes something else.
PEER_ALLOWANCE = 10.0


Reference: TypeAlias = tuple[list[int], NDArray[np.float64]]
"""Row numbers, and their exact outputs [R, Hq, D]."""


class WrongResultError(Exception):
    """A result differs from the float64 computation by more than its type explains."""


def reference_rows(inputs: Inputs) -> Reference:
    """First, middle and last query token of the first, middle and last sequence: row numbers and out ``[R, Hq, D]``."""
    case = inputs.case
    starts = np.concatenate([[0], np.cumsum(case.q_lens)])
    rows, outs = [], []
    for index in sorted({0, len(case.kv_lens) // 2, len(case.kv_lens) - 1}):
        keys, values = inputs.sequence(index)
        q_len = case.q_lens[index]
        for token in sorted({0, q_len // 2, q_len - 1}):
            row = int(starts[index]) + token
            visible = slice(*case.visible_keys(index, token))
            q = to_host(inputs.device, inputs.q[row], case.dtype)
            rows.append(row)
            outs.append(_dense_row(q, keys[visible], values[visible]))
    return rows, np.stack(outs)


def check(inputs: Inputs, call: Callable[[], None], out: Any, reference: Reference, *, allowance: float = 1.0) -> float:
    """Run `call` once on a poisoned `out` ``[T, Hq, D]`` and return its relative error.

    That is the root mean square, over the sampled tokens, of the Euclidean norm of a token's error over that of its
    output: a token that sees few keys has a longer output than one that averages many, and must not hide its error.

    Raises
    ------
    WrongResultError
        The error is above `allowance` times the type's tolerance, or an element of `out` is not finite, or unwritten.
    """
    case = inputs.case
    poison(out)
    call()
    inputs.device.synchronize()
    whole = to_host(inputs.device, out, case.out_dtype)
    if not np.isfinite(whole).all():
        raise WrongResultError(f"{case.name}: {int((~np.isfinite(whole)).sum())} elements of out are not finite")
    rows, expected = reference
    norms = np.linalg.norm(expected, axis=(1, 2))
    errors = np.linalg.norm(whole[rows] - expected, axis=(1, 2)) / norms
    error = float(np.sqrt(np.mean(errors**2)))
    allowed = allowance * TOLERANCE[case.out_dtype]
    if not error <= allowed:
        raise WrongResultError(f"{case.name}: relative error {error:.2g}, allowed {allowed:.0e}")
    return error


def _dense_row(q: NDArray[np.float32], keys: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    heads, head_dim = q.shape
    group = heads // keys.shape[1]
    out = np.empty((heads, head_dim))
    for kv_head in range(keys.shape[1]):
        mine = slice(kv_head * group, (kv_head + 1) * group)
        scores = q[mine].astype(np.float64) @ keys[:, kv_head].astype(np.float64).T / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[mine] = weights @ values[:, kv_head].astype(np.float64) / weights.sum(axis=1, keepdims=True)
    return out
