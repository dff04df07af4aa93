# SPDX-License-Identifier: Apache-2.0
"""Times, sizes and numbers of things, for people."""

from __future__ import annotations

_TIMES = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))
_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def time_unit(seconds: float) -> tuple[float, str]:
    """How many of a unit a second has, and the unit, in which a time is at least 1 where there is one."""
    return next((each for each in _TIMES if seconds * each[0] >= 1), _TIMES[-1])


def size_unit(size: float) -> tuple[int, str]:
    """How many bytes a unit has, and the unit, in which a size is at least 1 where there is one."""
    return next((each for each in _SIZES if size >= each[0]), _SIZES[-1])


def show_seconds(seconds: float) -> str:
    """A time with three digits and a unit.

    Examples
    --------
    >>> show_seconds(0.01234), show_seconds(5.6e-6)
    ('12.3 ms', '5.60 µs')
    """
    factor, unit = time_unit(seconds)
    return f"{three_digits(seconds * factor)} {unit}"


def show_size(size: float) -> str:
    """A size with four digits, so that near ones can be told apart, and a binary unit.

    Examples
    --------
    >>> show_size(1.5 * 2**20), show_size(0)
    ('1.5 MiB', '0 B')
    """
    bytes_, unit = size_unit(size)
    return f"{size / bytes_:.4g} {unit}"


def three_digits(value: float) -> str:
    """A number with three digits, or all before the point."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def show_bytes(size: float) -> str:
    """A size for people, in binary units."""
    bytes_, unit = size_unit(size)
    return f"{size / bytes_:.{0 if bytes_ == 1 else 1}f} {unit}"


def counted(number: int, noun: str) -> str:
    """A number of things.

    Examples
    --------
    >>> counted(1, "case"), counted(2, "case")
    ('1 case', '2 cases')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
