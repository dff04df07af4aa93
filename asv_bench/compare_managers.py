# SPDX-License-Identifier: Apache-2.0
"""What the block manager costs, beside its aims and the block managers of others.

    python asv_bench/compare_managers.py
    python asv_bench/compare_managers.py --peer vllm_manager=PYTHON --peer sglang_rust=PYTHON --json FILE

A peer is a module of `managers/`, and PYTHON an interpreter that has what it imports.  Each has a process of its own.
They are measured in turns, one unit after the other, so that a drift of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
OURS = "pagedattn_manager"


def serve(module: str) -> None:
    """Measure one contestant: a line with a unit's name comes in, a line with its seconds goes out."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # who prints while it is imported does not disturb
    contestant = importlib.import_module(f"managers.{module}")
    gc.collect()
    gc.freeze()  # what was imported is not walked by the collections that are timed
    gc.disable()
    facts = {"title": contestant.TITLE, "version": contestant.VERSION, "units": list(contestant.UNITS)}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(contestant.UNITS[line.strip()](), file=answers, flush=True)


class Contestant:
    """A block manager in a process of its own."""

    def __init__(self, module: str, python: str) -> None:
        self._command = [python, __file__, "--serve", module]
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = module
        facts = json.loads(self._answer())
        self.title, self.version, self.units = facts["title"], facts["version"], facts["units"]

    def measure(self, unit: str) -> float:
        """Seconds."""
        assert self._process.stdin is not None
        print(unit, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"compare_managers: {' '.join(self._command)} ended early")
        return line


def compare(contestants: Sequence[Contestant], aims: dict[str, float], rounds: int) -> dict[str, Any]:
    """The document: seconds of every round, by unit and contestant."""
    units: dict[str, dict[str, list[float]]] = {unit: {} for unit in aims}
    for _ in range(rounds):
        for unit, results in units.items():
            for one in contestants:
                if unit in one.units:
                    results.setdefault(one.name, []).append(one.measure(unit))
    return {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "contestants": [{"name": one.name, "title": one.title, "version": one.version} for one in contestants],
        "units": [{"name": unit, "aim": aims[unit], "results": results} for unit, results in units.items()],
    }


def show(document: dict[str, Any]) -> None:
    """Print best and median, in microseconds, and whether the aim is met."""
    contestants = document["contestants"]
    print(f"{'us: best (median)':34}", *(f"{one['title']:>18}" for one in contestants), f"{'aim':>8}")
    for unit in document["units"]:
        cells = []
        for one in contestants:
            seconds = unit["results"].get(one["name"])
            cells.append(f"{1e6 * min(seconds):.4g} ({1e6 * statistics.median(seconds):.4g})" if seconds else "-")
        met = "met" if min(unit["results"][OURS]) <= unit["aim"] else "MISSED"
        print(f"{unit['name']:34}", *(f"{cell:>18}" for cell in cells), f"{1e6 * unit['aim']:8.4g} {met}")


def main() -> None:
    """Measure and print, as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="MODULE=PYTHON")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document too")
    parser.add_argument("--serve", metavar="MODULE", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sys.path.insert(0, str(FOLDER))
    if chosen.serve:
        serve(chosen.serve)
        return
    aims = {name: aim for name, (_, aim) in importlib.import_module("benchmarks.block_manager_units").UNITS.items()}
    chosen_peers = [peer.partition("=")[::2] for peer in chosen.peer]
    contestants = [Contestant(module, python or sys.executable) for module, python in [(OURS, ""), *chosen_peers]]
    document = compare(contestants, aims, chosen.rounds)
    for one in contestants:
        one.close()
    show(document)
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
