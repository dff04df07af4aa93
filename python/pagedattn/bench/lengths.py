# SPDX-License-Identifier: Apache-2.0
"""Lengths of the sequences of a batch, from the short form in which people write them."""

from __future__ import annotations

import numpy as np

MAX_SEQUENCES = 1 << 20
MAX_TOKENS = 1 << 40  # of a whole batch; more is a slip of the pen

FORMS = (
    "LENGTH, COUNTxLENGTH, uniform:COUNT:LOW:HIGH, logn:COUNT:MEDIAN:MAX (lognormal, sigma 1) or "
    "skew:COUNT:LONG:SHORT (one long, the rest short), joined by +"
)


class LengthsError(ValueError):
    """Lengths cannot be read; the message says what was expected."""


def parse_lengths(spec: str, *, seed: int = 0, name: str = "lengths") -> tuple[int, ...]:
    """Lengths from ``64x4096``, ``logn:64:2048:32768``, ``skew:32:65536:256`` and the like.

    Parameters
    ----------
    spec : str
        Parts joined by ``+``, each a length, ``COUNTxLENGTH``, ``uniform:COUNT:LOW:HIGH``,
        ``logn:COUNT:MEDIAN:MAX`` or ``skew:COUNT:LONG:SHORT``.
    seed : int
        Of the distributions; the same text and seed give the same lengths.
    name : str
        What an error calls them.

    Returns
    -------
    tuple of int
        One length a sequence, each at least 1.

    Raises
    ------
    LengthsError
        The text has none of these forms, or asks for more than 2**20 sequences or 2**40 tokens.
    """
    rng = np.random.default_rng(seed)
    try:
        parts = [_part(part.strip(), rng) for part in spec.split("+")]
        lengths = tuple(int(length) for part in parts for length in part)
        if len(lengths) > MAX_SEQUENCES or sum(lengths) > MAX_TOKENS:
            raise LengthsError(f"at most {MAX_SEQUENCES} sequences and {MAX_TOKENS} tokens")
    except LengthsError as error:
        raise LengthsError(f"{name} {spec!r}: {error}") from None
    return lengths


def _part(part: str, rng: np.random.Generator) -> np.ndarray:
    kind, *fields = part.split(":")
    if kind in ("uniform", "logn", "skew"):
        if len(fields) != 3:
            raise LengthsError(f"{kind} takes three numbers; expected {FORMS}")
        count, first, second = (_number(field) for field in fields)
        _check_count(count)
        if kind == "uniform":
            if first > second:
                raise LengthsError(f"the low end {first} is above the high end {second}")
            return rng.integers(first, second + 1, count)
        if kind == "logn":
            return np.clip(np.rint(rng.lognormal(np.log(first), 1.0, count)), 1, second).astype(np.int64)
        return np.array([first] + [second] * (count - 1))
    count_text, times, length = part.rpartition("x")
    count = _number(count_text) if times else 1
    _check_count(count)
    return np.full(count, _number(length))


def _check_count(count: int) -> None:
    # Before anything of this size is allocated.
    if count > MAX_SEQUENCES:
        raise LengthsError(f"at most {MAX_SEQUENCES} sequences; got {count}")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 13 or int(text) < 1:
        raise LengthsError(f"expected {FORMS}, with numbers of at least 1; got {text!r}")
    return int(text)
