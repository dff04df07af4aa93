# SPDX-License-Identifier: Apache-2.0
"""The trade as a picture: time of attention above, cache that a sequence holds below, over the block size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagedattn._units import size_unit, time_unit
from pagedattn.bench.plot_page import FAINT, FONT, GRID, INK, OUR_COLOUR, check_plot

from .choice import Candidate, Choice
from .report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (7.0, 5.2)


def plot_trade(report: Report, path: Path) -> None:
    """Draw time and footprint over the block size, the recommended one marked.

    Parameters
    ----------
    report : Report
    path : Path
        Ends in .svg, .png or .pdf.

    Raises
    ------
    PlotError
        The suffix is another one, or matplotlib is missing.
    """
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    candidates, choice = report.candidates(), report.choice
    figure = Figure(figsize=_INCHES, facecolor="white", layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _draw_times(above, candidates, choice, report.unit)
    _draw_footprints(below, candidates, choice, report)
    for axes in (above, below):
        axes.axvline(choice.block_size, color=OUR_COLOUR, alpha=0.18, linewidth=14, zorder=0)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=FONT, labelcolor=INK, color=FAINT)
    below.set_xscale("log", base=2)
    sizes = [candidate.block_size for candidate in candidates]
    below.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
    below.set_xticks(sizes, [str(size) for size in sizes])
    below.set_xticks([], minor=True)
    below.set_xlabel("tokens a block", size=FONT, color=INK)
    figure.suptitle(f"{report.work.source} on {report.device}", size=11, color=INK, parse_math=False)
    # Text stays text, and nothing in the file depends on the day.
    with matplotlib.rc_context({"svg.hashsalt": "pagedattn", "svg.fonttype": "none"}):
        kind = path.suffix.lower()[1:]
        figure.savefig(path, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)


def _draw_times(axes: Axes, candidates: list[Candidate], choice: Choice, unit_of: str) -> None:
    factor, unit = time_unit(min(candidate.seconds for candidate in candidates))
    sizes = [candidate.block_size for candidate in candidates]
    times = [factor * candidate.seconds for candidate in candidates]
    ends = [
        [factor * (candidate.seconds - candidate.low) for candidate in candidates],
        [factor * (candidate.high - candidate.seconds) for candidate in candidates],
    ]
    fastest = min(times)
    axes.axhspan(fastest, fastest * (1 + choice.noise), color="#dfe5ea", linewidth=0, zorder=0)
    axes.errorbar(sizes, times, ends, color=INK, linewidth=1.2, marker="o", markersize=4.5, capsize=3)
    axes.set_ylim(0, 1.18 * max(times))
    axes.set_title(
        "attention: median and quartiles; the band counts as equally fast", size=FONT, color=FAINT, loc="left"
    )
    axes.set_ylabel(f"{unit} {unit_of}", size=FONT, color=INK)
    _mark(axes, choice, times[sizes.index(choice.block_size)], f"recommended: {choice.block_size}")


def _draw_footprints(axes: Axes, candidates: list[Candidate], choice: Choice, report: Report) -> None:
    sizes = [candidate.block_size for candidate in candidates]
    size_of_unit, unit = size_unit(max(candidate.held_bytes for candidate in candidates))
    held = [candidate.held_bytes / size_of_unit for candidate in candidates]
    axes.plot(sizes, held, color=INK, linewidth=1.2, marker="o", markersize=4.5)
    axes.set_ylim(0, 1.18 * max(held))
    axes.set_title("cache that a running sequence holds", size=FONT, color=FAINT, loc="left")
    axes.set_ylabel(f"{unit} a sequence", size=FONT, color=INK)
    for row, size, value in zip(report.rows, sizes, held, strict=True):
        waste = f"{100 * row.footprint.waste:.1f} % waste"
        axes.annotate(
            waste, (size, value), xytext=(0, 9), textcoords="offset points", ha="center", size=7.5, color=FAINT
        )
    _mark(axes, choice, held[sizes.index(choice.block_size)], "")


def _mark(axes: Axes, choice: Choice, height: float, text: str) -> None:
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "size": FONT, "color": OUR_COLOUR}
    axes.plot(choice.block_size, height, marker="o", markersize=9, color=OUR_COLOUR, zorder=5)
    axes.annotate(text, (choice.block_size, height), xytext=(0, 10), weight="bold", **style)
