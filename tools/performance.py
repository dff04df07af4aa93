"""Make the generated part of docs/performance from the results of record, or check that it is still true.

SPDX-License-Identifier: Apache-2.0

    python tools/performance.py            write docs/performance/generated
    python tools/performance.py --check    change nothing; fail, with the difference, where it is stale

Reads asv_bench/peers/MACHINE.json (what `pagedattn bench --json --against all` printed), asv_bench/peers/managers/
MACHINE.json (what asv_bench/compare_managers.py wrote) and asv_bench/results/MACHINE (asv's).  Writing needs pagedattn
and its `plot` extra.  The check needs no matplotlib: pages must be equal, and each picture must bear the digest of the
document it was drawn from, since other versions of matplotlib draw other bytes.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asv_tables import Record, load_record, markdown_table, tables
from pagedattn.bench.plot import best_peer, digest, plot_relative_times, plot_roofline

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = "pagedattn"
SCHEMA = 1
SUMMARY = "summary.md"
MANAGERS = "managers.md"
DECODE, PREFILL = "decode", "prefill"

RATES = {"GB/s": ("bytes_per_second", 1e9), "TFLOP/s": ("flops_per_second", 1e12), "GFLOP/s": ("flops_per_second", 1e9)}

Draw = Callable[[Path], None]


class RecordError(Exception):
    """A result of record cannot be read; the message names the file."""


# --- reading -----------------------------------------------------------------------------------------------------


def load_documents(folder: Path) -> dict[str, dict[str, Any]]:
    """Bench documents by machine."""
    documents = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("schema") != SCHEMA:
            raise RecordError(f"{path.name}: expected schema {SCHEMA}, got {document.get('schema')}")
        documents[path.stem] = document
    return documents


def load_records(folder: Path) -> dict[str, Record]:
    """asv's results by machine."""
    names = sorted(path.parent.name for path in folder.glob("*/machine.json"))
    found = {name: load_record(folder, name) for name in names}
    return {name: record for name, record in found.items() if record is not None}


# --- pages -------------------------------------------------------------------------------------------------------


def summary_page(documents: dict[str, dict[str, Any]], records: dict[str, Record]) -> str:
    """One line a machine and kind of case, and the list of the machines' pages."""
    machines = sorted({*documents, *records})
    if not machines:
        return "There are no results of record yet.\n"
    rows = []
    for document in documents.values():
        for kind in (DECODE, PREFILL):
            ratios = list(_ratios(document, kind).values())
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                fastest = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"
                device = str(document["machine"]["device"])
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                rows.append([device, document["date"][:10], kind, fastest, f"{mean:.2f}", spread])
    header = ["machine", "measured", "cases", "faster than every peer in", "time over the best peer's", "least to most"]
    lines = [*markdown_table(header, rows, text_columns=3), ""] if rows else []
    # The page that includes this one lies a folder above it.
    entries = [f"generated/{machine}" for machine in machines]
    return "\n".join([*lines, "```{toctree}", ":maxdepth: 1", "", *entries, "```", ""])


def managers_page(documents: dict[str, dict[str, Any]]) -> str:
    """What the block manager costs beside others, a table a machine: best and median of the rounds, in microseconds."""
    lines = []
    for machine, document in documents.items():
        contestants = document["contestants"]
        rows = []
        for unit in document["units"]:
            results = [unit["results"].get(one["name"]) for one in contestants]
            cells = [
                f"{_significant(min(seconds))} ({_significant(statistics.median(seconds))})" if seconds else "–"
                for seconds in results
            ]
            rows.append([unit["name"], *cells, f"{unit['aim'] * 1e6:g}"])
        versions = ", ".join(dict.fromkeys(one["version"] for one in contestants))
        lines += [
            f"Measured on {document['date'][:10]} on `{machine}`, Python {document['python']}: {versions}. "
            f"µs, the best of {_rounds(document)} rounds in turns, and their median.",
            "",
            *markdown_table(["operation", *(one["title"] for one in contestants), "aim"], rows),
            "",
        ]
    return "\n".join(lines)


def _significant(seconds: float) -> str:
    """Microseconds with two or three digits."""
    value = seconds * 1e6
    return f"{value:.0f}" if value >= 100 or value == 0 else f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _rounds(document: dict[str, Any]) -> int:
    return max(len(seconds) for unit in document["units"] for seconds in unit["results"].values())


def machine_page(machine: str, document: dict[str, Any] | None, record: Record | None) -> str:
    """Everything measured on one machine."""
    title = document["machine"]["device"] if document else record.machine.get("cpu", machine) if record else machine
    lines = [f"# {title}", ""]
    if document:
        lines += _bench_sections(machine, document)
    if record:
        lines += [
            "## The asv suite",
            "",
            f"Medians of asv's own run, of commit `{record.commit[:10]}`{_on(record.machine)}; "
            "± is the larger distance to a quartile.",
            "",
            *tables(record),
        ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _on(machine: dict[str, Any]) -> str:
    """What asv knows of a machine, where it was told."""
    return f" on {machine['cpu']}" if machine.get("cpu") else ""


def _bench_sections(machine: str, document: dict[str, Any]) -> list[str]:
    lines = [f"Measured on {document['date'][:10]} with pagedattn {document['pagedattn']}.", ""]
    for kind, rate in ((DECODE, "GB/s"), (PREFILL, "TFLOP/s" if document["backend"] == "cuda" else "GFLOP/s")):
        cases = [case for case in document["cases"] if case["kind"] == kind]
        if cases:
            lines += [f"## {kind.capitalize()}", ""]
            if _ratios(document, kind):
                lines += [f"![Time over the best peer's, {kind} cases]({machine}-{kind}.svg)", ""]
            lines += [*_times(document, cases, rate), ""]
    if _has_times(document):
        lines += ["## Share of the roof", "", f"![Roofline and share of the roof]({machine}-roofline.svg)", ""]
    lines += ["## Ceilings, machine and peers", "", *_ceilings(document), "", *_facts(document), ""]
    lines += [*_peers(document), "", "## Cases", "", *_cases(document), ""]
    for heading, cell in (
        ("Relative error against float64", _error),
        ("Host cost of a call, µs", _host),
        ("Distance of the quartiles over the median", _spread),
    ):
        lines += [f"## {heading}", "", *_by_peer(document, document["cases"], cell), ""]
    return lines + _reasons(document)


def _times(document: dict[str, Any], cases: list[dict[str, Any]], rate: str) -> list[str]:
    """Microseconds of everyone, the least of several in bold, then what ours reaches."""

    def row(case: dict[str, Any]) -> list[str]:
        results = _results(case)
        seconds = {name: result["seconds"] for name, result in results.items()}
        least = min(seconds.values(), default=0.0)
        cells = [
            "–" if name not in seconds
            else f"**{_microseconds(seconds[name])}**" if seconds[name] == least and len(seconds) > 1
            else _microseconds(seconds[name])
            for name in names
        ]  # fmt: skip
        ours = results.get(OURS)
        if ours is None:
            return [case["name"], *cells, "–", "–", "–"]
        reached = ours[key] / scale
        best = best_peer(case)
        ratio = f"{ours['seconds'] / best:.2f}" if best else "–"
        return [case["name"], *cells, f"{reached:.4g}", f"{100 * ours['share']:.0f} %", ratio]

    names = _names(document)
    key, scale = RATES[rate]
    header = ["µs", *names.values(), f"ours, {rate}", "of the roof", "over the best peer"]
    return markdown_table(header, map(row, cases))


def _by_peer(document: dict[str, Any], cases: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    names = _names(document)
    rows = [
        [case["name"], *(cell(_results(case)[name]) if name in _results(case) else "–" for name in names)]
        for case in cases
    ]
    return markdown_table(["", *names.values()], rows)


def _error(result: dict[str, Any]) -> str:
    return f"{result['error']:.1e}"


def _host(result: dict[str, Any]) -> str:
    host = result.get("host_seconds")
    return "–" if host is None else _microseconds(host)


def _spread(result: dict[str, Any]) -> str:
    return f"{100 * (result['high'] - result['low']) / result['seconds']:.1f} %"


def _ceilings(document: dict[str, Any]) -> list[str]:
    ceilings = document["ceilings"]
    rows = [
        ["reading memory", f"{ceilings['read'] / 1e9:.4g} GB/s"],
        ["copying memory, both ways counted", f"{ceilings['copy'] / 1e9:.4g} GB/s"],
        ["matrix product", _flops(ceilings["matmul"])],
    ]
    for key, text in (("host_to_device", "host to device, pinned"), ("device_to_host", "device to host, pinned")):
        if ceilings.get(key):
            rows.append([text, f"{ceilings[key] / 1e9:.4g} GB/s"])
    what = "an empty kernel in a graph" if document["backend"] == "cuda" else "a call without keys"
    rows.append([what, f"{_microseconds(ceilings['launch'])} µs"])
    for size, speed in sorted((int(size), speed) for size, speed in (ceilings.get("read_at") or {}).items()):
        rows.append([f"reading {size / (1 << 20):g} MiB again and again", f"{speed / 1e9:.4g} GB/s"])
    return markdown_table(["ceiling", "measured in the same run"], rows)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.4g} GFLOP/s"


def _facts(document: dict[str, Any]) -> list[str]:
    facts = [[name.replace("_", " "), str(value)] for name, value in document["machine"].items() if value is not None]
    return markdown_table(["machine", ""], facts, text_columns=2)


def _peers(document: dict[str, Any]) -> list[str]:
    rows = [[peer["title"], peer["version"] or f"missing: {peer['missing']}"] for peer in document["peers"]]
    return markdown_table(["peer", "version"], rows, text_columns=2) if rows else ["No peer was measured."]


def _cases(document: dict[str, Any]) -> list[str]:
    rows = [
        [case["name"], case["shape"], f"{case['bytes'] / 1e6:.4g}", f"{case['flops'] / 1e9:.4g}"]
        for case in document["cases"]
    ]
    return markdown_table(["case", "shape", "MB to move", "GFLOP"], rows, text_columns=2)


def _reasons(document: dict[str, Any]) -> list[str]:
    """Who has no time for which case, and why."""
    titles = {OURS: OURS} | {peer["name"]: peer["title"] for peer in document["peers"]}
    cases: dict[str, list[str]] = {}
    for case in document["cases"]:
        for result in case["results"]:
            if "reason" in result:
                cases.setdefault(f"{titles[result['peer']]}: {result['reason']}", []).append(case["name"])
    if not cases:
        return []
    return ["## Not measured", "", *(f"- {reason} ({', '.join(names)})" for reason, names in cases.items()), ""]


def _names(document: dict[str, Any]) -> dict[str, str]:
    """Titles of those who have a time, ours first."""
    timed = {name for case in document["cases"] for name in _results(case)}
    titles = {OURS: OURS} | {peer["name"]: peer["title"] for peer in document["peers"]}
    return {name: title for name, title in titles.items() if name in timed or name == OURS}


def _results(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["peer"]: result for result in case["results"] if "seconds" in result}


def _has_times(document: dict[str, Any]) -> bool:
    return any(_results(case) for case in document["cases"])


def _ratios(document: dict[str, Any], kind: str) -> dict[str, float]:
    """Our time over the best peer's, by case."""
    return {
        case["name"]: _results(case)[OURS]["seconds"] / best_peer(case)
        for case in document["cases"]
        if case["kind"] == kind and OURS in _results(case) and best_peer(case)
    }


def _microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


# --- pictures ----------------------------------------------------------------------------------------------------


def pictures(documents: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], Draw]]:
    """File name, document and drawing of each picture."""
    for machine, document in documents.items():
        if _has_times(document):
            yield f"{machine}-roofline.svg", document, lambda path, d=document: plot_roofline(d, path)  # type: ignore[misc]
        for kind in (DECODE, PREFILL):
            if _ratios(document, kind):
                draw: Draw = lambda path, d=document, k=kind: plot_relative_times(d, path, k)  # type: ignore[misc]  # noqa: E731
                yield f"{machine}-{kind}.svg", document, draw


# --- the command -------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Write or check, as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where something is stale")
    parser.add_argument("--records", type=Path, default=REPOSITORY / "asv_bench", help="has peers/ and results/")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs/performance/generated")
    chosen = parser.parse_args(arguments)
    try:
        documents = load_documents(chosen.records / "peers")
        managers = load_documents(chosen.records / "peers/managers")
    except RecordError as error:
        print(f"performance: {error}", file=sys.stderr)
        return 2
    records = load_records(chosen.records / "results")
    pages = {SUMMARY: summary_page(documents, records)}
    if managers:
        pages[MANAGERS] = managers_page(managers)
    for machine in sorted({*documents, *records}):
        pages[f"{machine}.md"] = machine_page(machine, documents.get(machine), records.get(machine))
    if chosen.check:
        return check(chosen.out, pages, documents)
    write(chosen.out, pages, documents)
    return 0


def write(out: Path, pages: dict[str, str], documents: dict[str, dict[str, Any]]) -> None:
    """Write pages and pictures, and remove what is no more."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    drawn = set(pages)
    for name, _, draw in pictures(documents):
        draw(out / name)
        drawn.add(name)
    for path in out.iterdir():
        if path.name not in drawn:
            path.unlink()


def check(out: Path, pages: dict[str, str], documents: dict[str, dict[str, Any]]) -> int:
    """Say what is stale; 1 where something is."""
    stale = []
    for name, text in pages.items():
        committed = (out / name).read_text(encoding="utf-8") if (out / name).exists() else ""
        if committed != text:
            stale.append(name)
            lines = committed.splitlines(True), text.splitlines(True)
            sys.stdout.writelines(difflib.unified_diff(*lines, f"committed {name}", "the results of record"))
    expected = set(pages)
    for name, document, _ in pictures(documents):
        expected.add(name)
        if not (out / name).exists() or digest(document) not in (out / name).read_text(encoding="utf-8"):
            stale.append(name)
    stale += sorted({path.name for path in out.glob("*")} - expected)
    if stale:
        print(f"\nStale: {', '.join(stale)}. Run `python tools/performance.py`.")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
