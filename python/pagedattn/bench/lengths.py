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
        _check_most(len(lengths), MAX_SEQUENCES, "sequences")
        _check_most(sum(lengths), MAX_TOKENS, "tokens")
    except LengthsError as error:
        raise LengthsError(f"{name} {spec!r}: {error}") from None
    return lengths


def _part(part: str, rng: np.random.Generator) -> np.ndarray:
    kind, *fields = part.split(":")
    if kind in ("uniform", "logn", "skew"):
        if len(fields) != 3:
            raise LengthsError(f"{kind} takes three numbers; expected {FORMS}")
        count = _count(fields[0])
        first, second = (_number(field) for field in fields[1:])
        if kind == "uniform":
            if first > second:
                raise LengthsError(f"the low end {first} is above the high end {second}")
            return rng.integers(first, second + 1, count)
        if kind == "logn":
            return np.clip(np.rint(rng.lognormal(np.log(first), 1.0, count)), 1, second).astype(np.int64)
        return np.array([first] + [second] * (count - 1))
    count_text, times, length = part.rpartition("x")
    count = _count(count_text) if times else 1
    return np.full(count, _number(length))


def _check_most(number: int, most: int, noun: str) -> None:
    if number > most:
        raise LengthsError(f"at most {most} {noun}; got {number}")


def _count(text: str) -> int:
    # Before anything of this size is allocated.
    return _number(text, MAX_SEQUENCES, "sequences")


def _number(text: str, most: int = MAX_TOKENS, noun: str = "tokens") -> int:
    digits = text.lstrip("0")
    if not (text.isascii() and text.isdigit() and digits):
        raise LengthsError(f"expected {FORMS}, with numbers of at least 1; got {text!r}")
    if len(digits) > len(str(most)):  # perhaps of more digits than Python reads
        raise LengthsError(f"at most {most} {noun}; got {digits}")
    _check_most(int(digits), most, noun)
    return int(digits)
