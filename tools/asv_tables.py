"""Read asv's results of record and put them into Markdown tables, a table for each class of benchmarks.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Value:
    """A result, and its quartiles where asv took samples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Record:
    """The results of the newest commit measured on a machine.

    Attributes
    ----------
    commit : str
        Its hash.
    machine : dict
        What asv knows of the machine.
    values : dict
        Benchmark name, such as ``decode.Decode.track_seconds``, to values by parameters.
    benchmarks : dict
        asv's description of each benchmark: names of parameters, unit.
    """

    commit: str
    machine: dict[str, Any]
    values: dict[str, dict[tuple[str, ...], Value]]
    benchmarks: dict[str, Any]


def load_record(results: Path, machine: str) -> Record | None:
    """Results of the newest commit in ``results/machine``; None where there are none."""
    files = [path for path in sorted((results / machine).glob("*.json")) if path.name != "machine.json"]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    if not runs:
        return None
    newest = max(runs, key=lambda run: (run["date"], run["commit_hash"]))["commit_hash"]
    values: dict[str, dict[tuple[str, ...], Value]] = {}
    for run in runs:
        if run["commit_hash"] == newest:
            for name, row in run["results"].items():
                found = _values(dict(zip(run["result_columns"], row, strict=False)))
                if found:
                    values[name] = found
    facts = json.loads((results / machine / "machine.json").read_text(encoding="utf-8"))
    benchmarks = json.loads((results / "benchmarks.json").read_text(encoding="utf-8"))
    return Record(newest, facts, values, benchmarks)


def tables(record: Record) -> list[str]:
    """Lines of Markdown: a heading for each module, a table for each of its classes."""
    lines: list[str] = []
    known = sorted(name for name in record.values if name in record.benchmarks)
    for module, names in itertools.groupby(known, key=lambda name: name.rsplit(".", 2)[0]):
        lines += [f"### {_words(module)}", ""]
        single = []
        for owner, methods in itertools.groupby(list(names), key=lambda name: name.rsplit(".", 1)[0]):
            of_class = list(methods)
            if record.benchmarks[of_class[0]]["param_names"]:
                lines += [f"**{_words(owner.rsplit('.', 1)[-1])}**", "", *_table(record, of_class), ""]
            else:
                single += of_class
        if single:
            rows = [[_title(name), _cell(record.values[name][()], record.benchmarks[name]["unit"])] for name in single]
            lines += [*markdown_table(["benchmark", "result"], rows), ""]
    return lines


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> list[str]:
    """Lines of a table: the first columns are text, the rest are figures."""
    rule = ["---" if column < text_columns else "---:" for column in range(len(header))]
    # A figure and its unit stay on one line.
    kept = [[*row[:text_columns], *(cell.replace(" ", "\u00a0") for cell in row[text_columns:])] for row in rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *kept)]


def show_seconds(seconds: float) -> str:
    """Seconds with three or four digits and a unit that suits them."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{_digits(seconds / 1e-9)} ns"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _values(row: dict[str, Any]) -> dict[tuple[str, ...], Value]:
    """Values by parameters; what failed (None) or does not apply (NaN) is left out."""
    combinations = list(itertools.product(*(row.get("params") or [])))
    results = row.get("result") or [None] * len(combinations)
    lows = row.get("stats_q_25") or results
    highs = row.get("stats_q_75") or results
    return {
        tuple(text.strip("'") for text in combination): Value(value, low, high)
        for combination, value, low, high in zip(combinations, results, lows, highs, strict=True)
        if value is not None and not math.isnan(value)
    }


def _table(record: Record, names: list[str]) -> list[str]:
    """A row for each set of parameters, a column for each method of the class."""
    units = {name: record.benchmarks[name]["unit"] for name in names}
    parameters = [name.replace("_", " ") for name in record.benchmarks[names[0]]["param_names"]]
    columns = [_column(name, unit) for name, unit in units.items()]
    keys = list(dict.fromkeys(key for name in names for key in record.values[name]))
    rows = [[*key, *(_cell(record.values[name].get(key), unit) for name, unit in units.items())] for key in keys]
    return markdown_table([*parameters, *columns], rows, text_columns=len(parameters))


def _title(name: str) -> str:
    """A benchmark without parameters: its class, and what its method adds to that."""
    owner, method = _words(name.split(".")[-2]), _method(name)
    return owner if owner.lower() == method.lower() else f"{owner}: {method}"


def _method(name: str) -> str:
    return name.rsplit(".", 1)[-1].split("_", 1)[1].replace("_", " ")


def _column(name: str, unit: str) -> str:
    """The method, with the unit where the cells do not tell it."""
    method = _method(name)
    return method if unit in ("seconds", "as named", "bytes", "") else f"{method}, {unit}"


def _cell(value: Value | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bytes":
        return f"{value.value / 1e6:.2f} MB"
    if unit != "seconds":
        return f"{value.value:.{6 if unit == 'as named' else 4}g}"
    spread = max(value.high - value.value, value.value - value.low) / value.value if value.value else 0.0
    return show_seconds(value.value) + (f" ± {100 * spread:.0f} %" if spread >= 0.005 else "")


def _words(name: str) -> str:
    """``block_manager`` and ``GatherKV`` as people write them."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ").split()
    words = [part.upper() if part.lower() in ("cpu", "cuda", "kv") else part.lower() for part in parts]
    return " ".join([words[0][0].upper() + words[0][1:], *words[1:]])
