# SPDX-License-Identifier: Apache-2.0
"""The rule: of the block sizes that are as fast as the fastest, the one that holds the least cache.

*As fast* is within the noise of the measurement (the middle one of the quartile spreads), and never finer than 3 %:
differences below that come and go with the lengths of the next batch.  *Least* is within 1 %: for less than that nobody
should carry tables twice as long, so the largest block of those wins, unless it was measured slower than another of
them by those 3 %: shorter tables are worth less than the benefit of the doubt.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pagedattn._units import show_seconds, show_size

LEAST_NOISE = 0.03
MOST_NOISE = 0.10  # a measurement that scatters more says nothing about the difference, so it excuses no more
SAME_FOOTPRINT = 0.01


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one block size costs.

    Attributes
    ----------
    block_size : int
        Tokens a block.
    seconds, low, high : float
        Time of attention: median and quartiles.
    held_bytes : float
        Cache that a running sequence holds on average, unused slots included, blocks shared with an earlier one not.
    """

    block_size: int
    seconds: float
    low: float
    high: float
    held_bytes: float

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as part of the median."""
        return (self.high - self.low) / self.seconds


@dataclass(frozen=True, slots=True)
class Choice:
    """The recommended block size, why, and the noise within which times were taken for equal (as part of 1)."""

    block_size: int
    reason: str
    noise: float


def choose(candidates: Sequence[Candidate], *, unit: str = "a request") -> Choice:
    """Recommend a block size.

    Parameters
    ----------
    candidates : sequence of Candidate
        At least one, each with a block size of its own.
    unit : str
        What `Candidate.seconds` is the time of, for the reason.

    Returns
    -------
    Choice

    Raises
    ------
    ValueError
        There is no candidate.

    Examples
    --------
    >>> rows = [Candidate(16, 0.95, 0.94, 0.96, 101e6), Candidate(64, 0.94, 0.93, 0.95, 108e6)]
    >>> choose(rows).block_size
    16
    """
    if not candidates:
        raise ValueError("choose: `candidates` must hold at least one block size; got none")
    ordered = sorted(candidates, key=lambda c: c.block_size)
    fastest = min(ordered, key=lambda c: c.seconds)
    noise = min(MOST_NOISE, max(LEAST_NOISE, statistics.median(c.spread for c in ordered)))
    fast = [c for c in ordered if c.seconds <= fastest.seconds * (1 + noise)]
    least = min(c.held_bytes for c in fast)
    light = [c for c in fast if c.held_bytes <= least * (1 + SAME_FOOTPRINT)]
    quickest = min(c.seconds for c in light)
    best = [c for c in light if c.seconds <= quickest * (1 + LEAST_NOISE)][-1]
    sentences = [_merit(best, fastest, noise, unit)]
    place = ordered.index(best)
    rejected = [_fault(c, best, fast) for c in (*ordered[max(0, place - 1) : place], *ordered[place + 1 : place + 2])]
    if rejected:
        sentences.append("Blocks of " + "; blocks of ".join(rejected) + ".")
    return Choice(best.block_size, " ".join(sentences), noise)


def _merit(best: Candidate, fastest: Candidate, noise: float, unit: str) -> str:
    time = f"Blocks of {best.block_size} take {show_seconds(best.seconds)} of attention {unit}"
    held = f"a sequence holds {show_size(best.held_bytes)} of cache."
    if best is fastest:
        return f"{time}, the shortest time, and {held}"
    more = best.seconds / fastest.seconds - 1
    return (
        f"{time}, {_percent(more)} more than the fastest ({fastest.block_size}) and within the noise of "
        f"{100 * noise:.0f} %, and {held}"
    )


def _fault(other: Candidate, best: Candidate, fast: Sequence[Candidate]) -> str:
    smaller = other.block_size < best.block_size
    held = other.held_bytes / best.held_bytes - 1
    more = f"hold {_percent(abs(held))} {'more' if held >= 0 else 'less'}"
    slower = other.seconds / best.seconds - 1
    if other not in fast or (abs(held) <= SAME_FOOTPRINT and not smaller and slower > 0):
        longer = f"take {_percent(slower)} longer"
        return f"{other.block_size} {longer}" + (f" and {more}" if held > 0 else "")
    if abs(held) <= SAME_FOOTPRINT and smaller:
        return f"{other.block_size} {more}, with tables {_times(best.block_size / other.block_size)} as long"
    return f"{other.block_size} {more}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _times(factor: float) -> str:
    return "twice" if factor == 2 else f"{factor:.3g} times"
