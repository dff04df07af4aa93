# SPDX-License-Identifier: Apache-2.0
"""Pictures of a bench document: the cases under the machine's roof, and everyone's time beside the best peer's.

Decode cases of one group size have one arithmetic intensity, so a roofline stacks them on a line.  Their names stand in
a column beside the stack, and a chart under the roofline spreads the cases out, a row each, by their share of the roof.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plot_page import (
    AXIS,
    CHARACTER,
    FAINT,
    FONT,
    GRID,
    INK,
    MARGIN,
    OUR_COLOUR,
    OURS,
    ROOF,
    WIDTH,
    LogScale,
    Page,
    PlotError,
    Style,
    check_plot,
    digest,
    spread,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PlotError", "best_peer", "check_plot", "digest", "plot_relative_times", "plot_roofline"]

# Points, 72 to the inch.
ROOFLINE_LEFT = 50
ROOFLINE_WIDTH = WIDTH - ROOFLINE_LEFT - MARGIN
ROOFLINE_HEIGHT = 300
ROW = 16  # of the charts with a row for each case
FIGURES = 52  # our figures at the end of the rows
BETWEEN = 16
NAME_GAP = 10.5  # between names above each other
MAX_NAME = 30  # characters


def plot_roofline(document: dict[str, Any], path: Path) -> None:
    """Draw the cases under the roof of the machine, and under it the share of the roof that each reaches.

    Parameters
    ----------
    document : dict
        What ``pagedattn bench --json`` prints, schema 1.
    path : Path
        Ends in .svg, .png or .pdf.  The same document gives the same SVG, byte by byte.

    Raises
    ------
    PlotError
        The suffix is another one, matplotlib is missing, or no case has a time.
    """
    check_plot(path)
    cases = _timed(document)
    page = Page(document, path, ROOFLINE_HEIGHT + BETWEEN + 2 * AXIS + ROW * len(cases))
    _draw_roofline(page.axes(ROOFLINE_LEFT, MARGIN, ROOFLINE_HEIGHT), document["ceilings"], cases, page.styles)
    page.skip(AXIS + BETWEEN)
    shares = [{r["peer"]: 100 * r["share"] for r in case["results"] if "share" in r} for case in cases]
    axes = _draw_rows(page, _row_names(cases), shares, figure="{:.0f} %")
    axes.set_xlim(0, 1.02 * max(100.0, *(share for row in shares for share in row.values())))
    axes.axvline(100, color=ROOF, linewidth=1.5)
    axes.set_xlabel("share of the roof, % (more is better)")
    page.save()


def plot_relative_times(document: dict[str, Any], path: Path, kind: str) -> None:
    """Draw the times of the cases of one kind over the best peer's, a row each.

    Parameters
    ----------
    document : dict
        What ``pagedattn bench --json`` prints, schema 1.
    path : Path
        Ends in .svg, .png or .pdf.
    kind : {"decode", "prefill"}
        Which cases.

    Raises
    ------
    PlotError
        The suffix is another one, matplotlib is missing, or no case of this kind has a peer's time.
    """
    check_plot(path)
    cases = [case for case in _timed(document) if case["kind"] == kind and best_peer(case)]
    if not cases:
        raise PlotError(f"--plot: no {kind} case has the time of a peer")
    page = Page(document, path, AXIS + ROW * len(cases))
    ratios = [{r["peer"]: r["seconds"] / best_peer(case) for r in case["results"] if "seconds" in r} for case in cases]
    axes = _draw_rows(page, _row_names(cases), ratios, figure="{:.2f}")
    values = [ratio for row in ratios for ratio in row.values()]
    axes.set_xscale("log")
    axes.set_xlim(min(0.9, min(values) / 1.06), max(1.15, max(values) * 1.06))
    _plain_ticks(axes)
    axes.axvline(1, color=ROOF, linewidth=1.5)
    axes.set_xlabel("time over the best peer's, logarithmic (less is better)")
    page.save()


def best_peer(case: dict[str, Any]) -> float:
    """Seconds of the fastest peer of a case; 0 where none has a time."""
    return min((r["seconds"] for r in case["results"] if r["peer"] != OURS and "seconds" in r), default=0.0)


def _timed(document: dict[str, Any]) -> list[dict[str, Any]]:
    cases = [case for case in document["cases"] if any("seconds" in result for result in case["results"])]
    if not cases:
        raise PlotError("--plot: no case has a time")
    return cases


def _row_names(cases: list[dict[str, Any]]) -> list[str]:
    names = [str(case["name"]) for case in cases]
    return [name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…" for name in names]


# --- charts with a row for each case -----------------------------------------------------------------------------


def _draw_rows(page: Page, names: list[str], values: list[dict[str, float]], figure: str) -> Axes:
    """A row for each case, a point for each peer, and at the end our figure."""
    left = 20 + CHARACTER * max(len(name) for name in names)
    axes = page.axes(max(ROOFLINE_LEFT, left), FIGURES, ROW * len(names))
    for row, of_peers in enumerate(values):
        if of_peers:
            ends = [min(of_peers.values()), max(of_peers.values())]
            axes.plot(ends, [row, row], color="#c3cad1", linewidth=1.2, zorder=3)
        for name, style in page.styles.items():
            if name in of_peers:
                axes.plot(of_peers[name], row, clip_on=False, **style.options(6.5))
        if OURS in of_peers:
            axes.text(
                1.015, row, figure.format(of_peers[OURS]), transform=axes.get_yaxis_transform(), va="center_baseline",
                size=FONT, color=OUR_COLOUR, weight="bold",
            )  # fmt: skip
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#f6f8fa", linewidth=0, zorder=0)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID)
    return axes


def _plain_ticks(axes: Axes) -> None:
    """Factors that people think in, as plain numbers."""
    low, high = axes.get_xlim()
    tenths = tuple(tenth / 10 for tenth in range(1, 21))
    factors = tenths if high / low < 2.5 else (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 20, 50, 100)
    ticks = [factor for factor in factors if low <= factor <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


# --- the roofline ------------------------------------------------------------------------------------------------


def _draw_roofline(axes: Axes, ceilings: dict[str, Any], cases: list[dict[str, Any]], styles: dict[str, Style]) -> None:
    read, matmul = ceilings["read"], ceilings["matmul"]
    intensities = [case["flops"] / case["bytes"] for case in cases]
    rates = [{r["peer"]: case["flops"] / r["seconds"] for r in case["results"] if "seconds" in r} for case in cases]
    names = _row_names(cases)
    room = 30 + CHARACTER * max(len(name) for name in names)
    lowest = min(min(intensities) / 2.2, matmul / _cache_rate(ceilings) / 20)
    x = LogScale(lowest, max(*intensities, 1.6 * matmul / read), ROOFLINE_WIDTH, room)
    every = [rate for of_peers in rates for rate in of_peers.values()]
    # What lies in a processor's cache is read faster than memory, and may be above the roof.
    y = LogScale(min(min(every) / 1.6, matmul / 30), max(2.2 * matmul, 1.3 * max(every)), ROOFLINE_HEIGHT)

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(x.low, x.high)
    axes.set_ylim(y.low, y.high)
    axes.grid(color=GRID)
    _draw_roof(axes, x, y, ceilings)
    _name_cases(axes, x, y, names, intensities, [of.get(OURS, max(of.values())) for of in rates], read, matmul)
    for intensity, of_peers in zip(intensities, rates, strict=True):
        for name, style in styles.items():
            if name in of_peers:
                # A crowd: what is ours lies on top of the rest.
                mark = style.options(7.5) | {"zorder": 7} if style.ours else style.options(5)
                axes.plot(intensity, of_peers[name], **mark)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    unit, per_second = (1e12, "TFLOP/s") if matmul >= 1e13 else (1e9, "GFLOP/s")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / unit:g}")
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("arithmetic intensity, FLOP a byte")
    axes.set_ylabel(f"{per_second} (more is better)")


def _draw_roof(axes: Axes, x: LogScale, y: LogScale, ceilings: dict[str, Any]) -> None:
    """The slopes of memory and, dashed, of the processor's cache; the flat of the matrix product; their figures."""
    read, matmul = ceilings["read"], ceilings["matmul"]
    cached = _cache_rate(ceilings)
    for speed, source, line in ((read, "memory", "-"), (cached, "cache", "--")):
        if source == "memory" or speed > 1.5 * read:
            corners = [x.low, matmul / speed, x.high]
            roof = [min(speed * intensity, matmul) for intensity in corners]
            axes.plot(corners, roof, color=INK, linewidth=1.4 if source == "memory" else 0.9, linestyle=line, zorder=3)
            _name_slope(axes, x, y, speed, matmul, f"reading {source}: {_rate(speed, 'B')}")
    corners = [x.low, matmul / cached, x.high]
    axes.fill_between(
        corners, [min(cached * c, matmul) for c in corners], y.high, color="#f3f5f7", linewidth=0, zorder=1.5
    )
    place: dict[str, Any] = {"xytext": (-4, 4), "textcoords": "offset points", "ha": "right", "zorder": 6}
    axes.annotate(f"matrix product: {_rate(matmul, 'FLOP')}", (x.high, matmul), size=FONT, color=FAINT, **place)


def _name_slope(axes: Axes, x: LogScale, y: LogScale, speed: float, matmul: float, name: str) -> None:
    """Along the slope, in the middle of what is seen of it."""
    middle = math.sqrt(max(x.low, y.low / speed) * matmul / speed)
    angle = math.degrees(math.atan2(y.per_decade, x.per_decade))
    axes.annotate(
        name, (middle, middle * speed), xytext=(-4, 5), textcoords="offset points", ha="center", va="bottom",
        rotation=angle, rotation_mode="anchor", size=FONT, color=FAINT, zorder=6,
    )  # fmt: skip


def _cache_rate(ceilings: dict[str, Any]) -> float:
    """Bytes a second of the buffer that is read fastest: a processor's caches, where they were measured."""
    return float(max((ceilings.get("read_at") or {}).values(), default=ceilings["read"]))


def _rate(value: float, unit: str) -> str:
    return f"{value / 1e12:.3g} T{unit}/s" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}/s"


def _name_cases(
    axes: Axes, x: LogScale, y: LogScale, names: list[str], intensities: list[float], rates: list[float],
    read: float, matmul: float,
) -> None:  # fmt: skip
    """The names in columns to the right of the points, each with a line to its point."""
    points = [(x.points(intensity), y.points(rate)) for intensity, rate in zip(intensities, rates, strict=True)]
    label_room = 34 + CHARACTER * max(len(name) for name in names)
    for stack in _stacks([px for px, _ in points], label_room):
        column = max(points[index][0] for index in stack) + 22
        highest = y.points(min(read * x.value(column), matmul)) - 9
        # What is farther off gets a lower name, so that the lines fan out and do not cross.
        wanted = [points[index][1] - 0.2 * (column - points[index][0]) for index in stack]
        heights = spread(wanted, NAME_GAP, 6, highest)
        for index, height in zip(stack, heights, strict=True):
            across = [points[index][0] / ROOFLINE_WIDTH, (column - 3) / ROOFLINE_WIDTH]
            up = [points[index][1] / ROOFLINE_HEIGHT, height / ROOFLINE_HEIGHT]
            axes.plot(across, up, transform=axes.transAxes, color="#b6bec6", linewidth=0.7, zorder=3.5)
            axes.text(
                column / ROOFLINE_WIDTH, up[1], names[index], transform=axes.transAxes, size=FONT, color=INK,
                va="center_baseline", zorder=6,
            )  # fmt: skip


def _stacks(places: list[float], room: float) -> list[list[int]]:
    """Indices of points in groups with at least `room` between them, from left to right."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    stacks: list[list[int]] = []
    for index in order:
        if stacks and places[index] - places[stacks[-1][-1]] < room:
            stacks[-1].append(index)
        else:
            stacks.append([index])
    return stacks
