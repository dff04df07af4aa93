"""Small sets of cases in which every pair of option values meets.

Faults come from one option or from two that meet; a table that covers all pairs finds them with tens of cases where the
full product has millions.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Return cases, one value an option each, in which each pair of values of two options occurs (greedy cover)."""
    names = list(options)
    choose = random.Random(seed)
    uncovered = {
        ((a, i), (b, j))
        for a, b in combinations(range(len(names)), 2)
        for i in range(len(options[names[a]]))
        for j in range(len(options[names[b]]))
    }
    cases = []
    while uncovered:
        best: list[int] = []
        best_gain: set[tuple[tuple[int, int], tuple[int, int]]] = set()
        first = min(uncovered)
        for _ in range(30):
            case = _grow(first, [len(options[name]) for name in names], uncovered, choose)
            gain = {pair for pair in combinations(enumerate(case), 2) if pair in uncovered}
            if len(gain) > len(best_gain):
                best, best_gain = case, gain
        uncovered -= best_gain
        cases.append({name: options[name][i] for name, i in zip(names, best, strict=True)})
    return cases


def _grow(
    pair: tuple[tuple[int, int], tuple[int, int]],
    sizes: list[int],
    uncovered: set[tuple[tuple[int, int], tuple[int, int]]],
    choose: random.Random,
) -> list[int]:
    """Return a case around one uncovered pair: the other options, in random order, take what covers most."""
    chosen = dict(pair)
    rest = [i for i in range(len(sizes)) if i not in chosen]
    choose.shuffle(rest)
    for option in rest:
        values = list(range(sizes[option]))
        choose.shuffle(values)
        chosen[option] = max(
            values,
            key=lambda value: sum(_in_order((option, value), other) in uncovered for other in chosen.items()),
        )
    return [chosen[i] for i in range(len(sizes))]


def _in_order(a: tuple[int, int], b: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (a, b) if a < b else (b, a)


def case_id(case: Mapping[str, Any]) -> str:
    """Return a readable test id."""
    return "-".join(f"{name}={value}" for name, value in case.items())
