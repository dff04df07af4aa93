# SPDX-License-Identifier: Apache-2.0
"""The document of a measurement as a table, on a terminal or as plain text."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .measure import OURS

_WIDTH = 132  # of plain text, which nobody wraps


def print_report(document: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a measurement: colours and the terminal's width where there is one, plain text elsewhere."""
    console = console or Console()
    if console.is_terminal:
        console.print(Group(*_parts(document)))
        return
    plain = Console(file=io.StringIO(), width=_WIDTH, no_color=True, highlight=False)
    with plain.capture() as capture:
        plain.print(Group(*_parts(document)))
    for line in capture.get().splitlines():
        print(line.rstrip(), file=console.file)


def _parts(document: Mapping[str, Any]) -> list[Any]:
    heading = f"pagedattn {document['pagedattn']} on {document['machine']['device']} ({document['backend']})"
    parts = [Text(heading, style="bold"), Text(_ceilings(document)), Text(""), _table(document), Text("")]
    for peer in document["peers"]:
        if peer["missing"]:
            parts.append(Text(f"{peer['title']} is not here: {peer['missing']}", style="yellow"))
        else:
            parts.append(Text(f"{peer['title']}: {peer['version']}"))
    parts += [Text(line, style="yellow") for line in _reasons(document)]
    return parts


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


def _table(document: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    table.add_column("by", no_wrap=True)
    paged = any(case.get("paged_read") for case in document["cases"])  # not in older documents
    for title in ("µs", "quartiles", "rate", "of ceiling", *(["of paged roof"] * paged), "× ours", "error", "host µs"):
        table.add_column(title, justify="right", no_wrap=True)
    several = len(document["peers"]) > 0
    titles = {OURS: OURS} | {peer["name"]: peer["title"] for peer in document["peers"]}
    for case in document["cases"]:
        timed = [result for result in case["results"] if "seconds" in result]
        ours = next(result["seconds"] for result in timed if result["peer"] == OURS)
        fastest = min(result["seconds"] for result in timed)
        for row, result in enumerate(timed):
            table.add_row(
                case["name"] if row == 0 else "",
                titles[result["peer"]],
                microseconds(result["seconds"]),
                f"{microseconds(result['low'])}..{microseconds(result['high'])}",
                case_rate(case, result),
                f"{100 * result['share']:.0f} %",
                *([f"{100 * result['paged_share']:.0f} %" if "paged_share" in result else ""] * paged),
                f"{result['seconds'] / ours:.2f}",
                f"{result['error']:.1e}",
                _host(result),
                style="bold" if several and result["seconds"] == fastest else None,
                end_section=several and row + 1 == len(timed),
            )
    return table


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
