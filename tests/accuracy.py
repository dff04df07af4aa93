"""The accuracy every backend owes the float64 reference, and the checks that every element was computed.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401  (registers the types with NumPy)
import numpy as np

# Relative Frobenius error over a whole result, by the type of q and out.
FROBENIUS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}
# The same where queries, keys, weights and values are multiplied in float8, and weights rounded to it.
FLOAT8_PRODUCTS = 4e-2
# One element or one row has no average over many to hide behind, nor to profit from.
ROW_FACTOR = 4.0
ELEMENT_FACTOR = 8.0
LSE_TOLERANCE = 1e-4
FLOAT8_PRODUCTS_LSE_TOLERANCE = 0.1
# Below this nothing can be told from zero: the spacing of float16's subnormal numbers; the others reach far lower.
SPACING = {"float32": 1e-37, "float16": 2.0**-24, "bfloat16": 1e-37}


def assert_close(
    actual: np.ndarray, expected: np.ndarray, dtype: Any, what: str = "out", bar: float | None = None
) -> None:
    """Check [T, H, D] results: the whole, each (token, head) row and each element; a row of zeros must be exact."""
    bar, spacing = bar or FROBENIUS[np.dtype(dtype).name], SPACING[np.dtype(dtype).name]
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    result = actual.astype(np.float64)
    assert np.isfinite(result).all(), f"{what} is not finite at {first(~np.isfinite(result))}"
    error = result - expected
    norm = np.linalg.norm(expected)
    allowed = bar * norm + spacing * np.sqrt(expected.size)
    assert np.linalg.norm(error) <= allowed, f"{what}: relative error {np.linalg.norm(error) / norm:.3g} > {bar}"

    row_norm = np.linalg.norm(expected, axis=-1, keepdims=True)
    row_error = np.linalg.norm(error, axis=-1, keepdims=True)
    bad_rows = row_error > ROW_FACTOR * bar * row_norm + spacing * np.sqrt(expected.shape[-1]) * (row_norm > 0)
    assert not bad_rows.any(), f"{what}: row {first(bad_rows)} is off by {row_error[bad_rows].max():.3g}"
    allowed = ELEMENT_FACTOR * bar * (np.abs(expected) + row_norm / np.sqrt(max(expected.shape[-1], 1)))
    bad = np.abs(error) > allowed + spacing * (row_norm > 0)
    assert not bad.any(), f"{what}: element {first(bad)} is {result[bad][0]}, expected {expected[bad][0]}"


def assert_lse_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = LSE_TOLERANCE) -> None:
    """Check log-sum-exps: float32, every element, minus infinity exactly where no key was seen."""
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    seen = ~np.isneginf(expected)
    allowed = tolerance * np.maximum(1.0, np.abs(expected[seen]) / 10)
    bad = ~(np.abs(actual[seen] - expected[seen]) <= allowed)
    assert not bad.any(), f"lse is {actual[seen][bad][0]}, expected {expected[seen][bad][0]}"


def assert_same_bytes(actual: np.ndarray, expected: np.ndarray, what: str = "result") -> None:
    """Check two arrays bit for bit, NaNs and signed zeros included."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert actual.dtype.itemsize == expected.dtype.itemsize, (what, actual.dtype, expected.dtype)
    different = (as_bytes(actual) != as_bytes(expected)).any(axis=-1)
    assert not different.any(), f"{what} differs at {first(different)}"


def as_bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes of each element in a new last dimension."""
    return np.ascontiguousarray(array)[..., None].view(np.uint8)


def first(where: np.ndarray) -> tuple[int, ...]:
    """Return the index of the first true element."""
    return tuple(int(i) for i in np.argwhere(where)[0])
