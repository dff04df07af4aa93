# SPDX-License-Identifier: Apache-2.0
"""The document of a measurement as a table, on a terminal or as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagedattn import _printing
from pagedattn._printing import table_width

from .measure import OURS

# Columns that a narrow terminal does without, the first of them first.
_DISPENSABLE = ("host µs", "error", "quartiles", "of paged roof")


def print_report(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a measurement; a terminal too narrow for all columns gets fewer, and is told which are missing."""
    console = console or Console()
    table, left_out = _table(document), 0
    while console.is_terminal and left_out < len(_DISPENSABLE) and table_width(table, console) > console.width:
        left_out += 1
        table = _table(document, without=_DISPENSABLE[:left_out])
    parts: list[Text | Table] = [*_heading(document), table, Text(""), *_remarks(document)]
    if left_out:
        missing = ", ".join(_DISPENSABLE[:left_out])
        parts.append(Text(f"not shown, for want of width: {missing}; --json has everything", style="yellow"))
    _printing.print_report(parts, console)


def _heading(document: Mapping[str, Any]) -> list[Text]:
    heading = f"pagedattn {document['pagedattn']} on {document['machine']['device']} ({document['backend']})"
    return [Text(heading, style="bold"), Text(_ceilings(document)), Text("")]


def _remarks(document: Mapping[str, Any]) -> list[Text]:
    lines = []
    for peer in document["peers"]:
        if peer["missing"]:
            lines.append(Text(f"{peer['title']} is not here: {peer['missing']}", style="yellow"))
        else:
            lines.append(Text(f"{peer['title']}: {peer['version']}"))
    return lines + [Text(line, style="yellow") for line in _reasons(document)]


def _ceilings(document: Mapping[str, Any]) -> str:
    c = document["ceilings"]
    facts = [
        f"read {rate(c['read'], 'B')}",
        f"copy {rate(c['copy'], 'B')} (both ways counted)",
        f"matmul {rate(c['matmul'], 'FLOP')}",
    ]
    if c["host_to_device"]:
        facts.append(f"host to device {rate(c['host_to_device'], 'B')}, back {rate(c['device_to_host'], 'B')}")
    what = "an empty launch" if document["backend"] == "cuda" else "an empty call"
    return "ceilings measured now: " + ", ".join([*facts, f"{what} {microseconds(c['launch'])} µs"])


def _table(document: Mapping[str, Any], without: Sequence[str] = ()) -> Table:
    """One row for each case and each one measured; a column that has nothing to say is left out."""
    titles = {OURS: OURS} | {peer["name"]: peer["title"] for peer in document["peers"]}
    several = any(len(_timed(case)) > 1 for case in document["cases"])
    cells = {id(result): _cells(case, result, several) for case in document["cases"] for result in _timed(case)}
    names = next(iter(cells.values()))
    columns = [name for name in names if name not in without and any(row[name] for row in cells.values())]

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("case", no_wrap=True)
    table.add_column("by", min_width=len(OURS))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for case in document["cases"]:
        timed = _timed(case)
        fastest = min(result["seconds"] for result in timed)
        for result in timed:
            table.add_row(
                case["name"] if result is timed[0] else "",
                titles[result["peer"]],
                *(cells[id(result)][name] for name in columns),
                style="bold" if several and result["seconds"] == fastest else None,
                end_section=several and result is timed[-1],
            )
    return table


def _timed(case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [result for result in case["results"] if "seconds" in result]


def _cells(case: Mapping[str, Any], result: Mapping[str, Any], several: bool) -> dict[str, str]:
    """A result in the table, by the name of the column."""
    ours = next(each["seconds"] for each in _timed(case) if each["peer"] == OURS)
    paged = result.get("paged_share")  # of decode on the CPU, and not in older documents
    return {
        "µs": microseconds(result["seconds"]),
        "quartiles": f"{microseconds(result['low'])}..{microseconds(result['high'])}",
        "rate": case_rate(case, result),
        "of ceiling": f"{100 * result['share']:.0f} %",
        "of paged roof": "" if paged is None else f"{100 * paged:.0f} %",
        "× ours": f"{result['seconds'] / ours:.2f}" if several else "",
        "error": f"{result['error']:.1e}",
        "host µs": _host(result),
    }


def _host(result: Mapping[str, Any]) -> str:
    least, median = result["host_seconds"], result.get("host_median")  # no median in older documents
    if least is None:
        return ""
    return microseconds(least) if median is None else f"{microseconds(least)}..{microseconds(median)}"


def _reasons(document: Mapping[str, Any]) -> list[str]:
    titles = {peer["name"]: peer["title"] for peer in document["peers"]}
    lines: dict[str, list[str]] = {}
    for case in document["cases"]:
        for result in case["results"]:
            if "reason" in result:
                lines.setdefault(f"{titles[result['peer']]}: {result['reason']}", []).append(case["name"])
    return [f"not by {line} ({', '.join(names)})" for line, names in lines.items()]


def case_rate(case: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """GB/s of a case that memory bounds, TFLOP/s (or GFLOP/s) of one that arithmetic bounds."""
    if result["bound"] == "memory":
        return rate(case["bytes"] / result["seconds"], "B")
    return rate(case["flops"] / result["seconds"], "FLOP")


def rate(value: float, unit: str) -> str:
    """A rate for people: ``3.11 TB/s``, ``89.5 GFLOP/s``."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}/s"
        value /= 1000
    return f"{value:.3g} T{unit}/s" if value < 1000 else f"{value:.0f} T{unit}/s"


def microseconds(seconds: float) -> str:
    """Microseconds with three digits or all before the point: ``4.61``, ``12.4``, ``2860``."""
    value = seconds * 1e6
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"
