"""Runs a batch through paged_attention and judges everything that it wrote, and that it wrote nothing else.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
from accuracy import (
    FLOAT8_PRODUCTS,
    FLOAT8_PRODUCTS_LSE_TOLERANCE,
    LSE_TOLERANCE,
    assert_close,
    assert_lse_close,
)
from backends import DTYPES, NumpyBackend
from batches import LAYOUTS, SLICES, TENSOR_CORE_KINDS, Batch, make_batch, output, poison, scale_for


def assert_result_close(actual: np.ndarray, expected: np.ndarray, dtype: Any) -> None:
    """Check a result of the latest call by what its kernel owes: less where it has multiplied in float8."""
    assert_close(actual, expected, dtype, bar=FLOAT8_PRODUCTS if multiplied_in_float8() else None)


def assert_result_lse_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert_lse_close(actual, expected, FLOAT8_PRODUCTS_LSE_TOLERANCE if multiplied_in_float8() else LSE_TOLERANCE)


def multiplied_in_float8() -> bool:
    """Return whether the latest call had a kernel that multiplies float8 queries as they are."""
    return "_products_" in (pagedattn.last_kernel() or "")


def check_batch(
    backend: NumpyBackend, batch: Batch, *, strided_out: bool = False, out_dtype: Any = None, **more: Any
) -> None:
    """Run a batch into poisoned outputs; check outputs, log-sum-exps, gaps, and that no input has changed."""
    expected, expected_lse = batch.reference()
    args, options = batch.on(backend)
    out_dtype = out_dtype or batch.out_dtype
    before = [backend.allocation(array) for array in args]
    poisoned = output(batch.q.shape, out_dtype, strided=strided_out)  # type: ignore[arg-type]
    out, lse = backend.arrays(poisoned.view, poison(batch.q.shape[:2], np.float32))
    result = pagedattn.paged_attention(*args, out=out, lse=lse, **options, **more)
    assert_result_close(backend.host(out), expected, out_dtype)
    assert_result_lse_close(backend.host(lse), expected_lse)
    assert poisoned.gaps_untouched(backend.allocation(out))
    for array, bytes_before in zip(args, before, strict=True):
        np.testing.assert_array_equal(backend.allocation(array), bytes_before)
    assert result is out or (result[0] is out and result[1] is lse)


def check_output_alone(backend: NumpyBackend, batch: Batch, **more: Any) -> None:
    """Run a batch without asking for log-sum-exps; check every element of a poisoned output."""
    args, options = batch.on(backend)
    out = backend.array(poison(batch.q.shape, batch.out_dtype))
    pagedattn.paged_attention(*args, out=out, **options, **more)
    assert_result_close(backend.host(out), batch.reference()[0], batch.out_dtype)


# Options of `check_case` that every shape is to meet, beside those of its own.
COMMON_OPTIONS: dict[str, list[Any]] = {
    "kind": list(TENSOR_CORE_KINDS),
    "head_dim": [8, 24, 64, 72, 80, 96, 112, 120, 128, 160, 192, 200, 256],
    "layout": [*LAYOUTS, *SLICES],
    "scales": ["absent", "number", "per head"],
    "causal": [True, False],
    "softcap": [0.0, 1.5],
    "alibi": [False, True],
    "sinks": [False, True],
    "lse": [True, False],
    "strided_out": [False, True],
    "packed_q": [False, True],
    "deterministic": [False, True],
}


def types(rng: np.random.Generator, kind: tuple[str, str], num_kv_heads: int) -> dict[str, Any]:
    """Return the types of a batch, and scales for what is float8."""
    dtype, kv_dtype = (DTYPES[name] for name in kind)
    return {"dtype": dtype, "kv_dtype": kv_dtype, **scale_for(kv_dtype, rng, num_kv_heads, dtype)}


def check_case(
    backend: NumpyBackend,
    rng: np.random.Generator,
    case: dict[str, Any],
    group: int,
    seq_lens: list[int],
    query_lens: list[int] | None,
) -> None:
    """Run and check a batch of a case of options, as `pairwise` makes them."""
    num_kv_heads = 1 if group > 16 else 2
    num_q_heads = group * num_kv_heads
    options: dict[str, Any] = {
        **types(rng, case["kind"], num_kv_heads),
        "window": case["window"],
        "causal": case["causal"],
        "softcap": case["softcap"],
    }
    for name, number in (("q_scale", 1.2), ("k_scale", 0.7), ("v_scale", 1.3)):
        if name in options and case["scales"] != "per head":
            del options[name]
            if case["scales"] == "number":
                options[name] = number
    if case["alibi"]:
        options["alibi_slopes"] = rng.uniform(-0.02, 0.2, num_q_heads).astype(np.float32)
    if case["sinks"]:
        options["sinks"] = rng.uniform(-2, 3, num_q_heads).astype(np.float32)
    batch = make_batch(
        rng,
        seq_lens,
        query_lens,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=case["head_dim"],
        block_size=case["block_size"],
        layout=case["layout"],
        packed_q=case["packed_q"],
        **options,
    )
    if case["lse"]:
        check_batch(backend, batch, strided_out=case["strided_out"], deterministic=case["deterministic"])
    else:
        check_output_alone(backend, batch, deterministic=case["deterministic"])
