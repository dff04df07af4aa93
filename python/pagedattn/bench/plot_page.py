# SPDX-License-Identifier: Apache-2.0
"""The paper of the plots: a page filled from the top, everyone's mark and colour, and names that keep clear of others.

Everything is placed in points of the page, so that names can be kept apart before anything is drawn.  matplotlib is
optional and is imported where a picture is made.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS = "pagedattn"
SUFFIXES = (".svg", ".png", ".pdf")

INK, FAINT, GRID, ROOF = "#24292f", "#6e7781", "#e3e7eb", "#8c959f"
OUR_COLOUR = "#0072b2"
# Okabe and Ito's colours, which colour-blind readers tell apart; and no peer is told by its colour alone.
PEER_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
PEER_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")

# Points, 72 to the inch.  The width is that of the site's text, so that nothing is scaled down there.
WIDTH = 590
MARGIN = 14
TITLE = 46
AXIS = 36  # ticks and name of an axis
LEGEND_LINE = 16
FONT = 8.5
CHARACTER = 0.61 * FONT  # of a name, on average at most


class PlotError(ValueError):
    """The picture cannot be drawn; the message names the option."""


def check_ending(option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file whose name promises what will not be in it."""
    if path.suffix.lower() not in suffixes:
        raise PlotError(f"{option} must name a file that ends in {', '.join(suffixes)}; got {path.name}")


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn, before anything is measured for it.

    Raises
    ------
    PlotError
        The name does not end in .svg, .png or .pdf, or matplotlib is not installed.
    """
    check_ending("--plot", path, SUFFIXES)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError("--plot needs matplotlib: pip install 'pagedattn[plot]'") from None


def digest(document: dict[str, Any]) -> str:
    """What an SVG bears as its identifier, so that a picture of other figures is known without drawing it again."""
    plain = json.loads(json.dumps(document))  # what was measured just now bears what its file will
    return "sha256:" + hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Style:
    """How the points of a peer look: ours filled, all others hollow."""

    title: str
    marker: str
    colour: str
    ours: bool = False

    def options(self, size: float) -> dict[str, Any]:
        """Options of `Axes.plot` for marks of about `size` points."""
        return {
            "linestyle": "none",
            "marker": self.marker,
            "markersize": size,
            "markeredgecolor": "white" if self.ours else self.colour,
            "markeredgewidth": 0.5 if self.ours else 1.2,
            "markerfacecolor": self.colour if self.ours else "none",  # a peer's mark stays seen where ours is as fast
            "zorder": 4 if self.ours else 5,
        }


class Page:
    """A figure filled from the top, with a header and a legend of those who have a time.

    Parameters
    ----------
    document : dict
        The bench document.
    path : Path
        Where `save` writes.
    height : float
        Points between header and legend.
    """

    def __init__(self, document: dict[str, Any], path: Path, height: float) -> None:
        from matplotlib.figure import Figure

        self.document = document
        self.path = path
        self.styles = _styles(document)
        self._columns = _legend_columns(self.styles)
        self.height = TITLE + height + LEGEND_LINE * math.ceil(len(self.styles) / self._columns) + 12
        self.top = float(TITLE)
        self.figure = Figure(figsize=(WIDTH / 72, self.height / 72), facecolor="white")
        self._draw_header()
        self._draw_legend()

    def axes(self, left: float, right: float, height: float) -> Axes:
        """Axes of a height in points, under what is there already."""
        self.top += height
        bottom = (self.height - self.top) / self.height
        axes = self.figure.add_axes((left / WIDTH, bottom, (WIDTH - left - right) / WIDTH, height / self.height))
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=FONT, labelcolor=INK, color=FAINT)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(size=FONT, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        return axes

    def skip(self, height: float) -> None:
        """Leave a height in points free."""
        self.top += height

    def save(self) -> None:
        """Write the file, with neither date nor version in it: the same document gives the same bytes."""
        import matplotlib

        kind = self.path.suffix.lower()[1:]
        metadata: dict[str, dict[str, Any]] = {
            "svg": {"Date": None, "Creator": None, "Identifier": digest(self.document)},
            "png": {"Software": None},
            "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        }
        with matplotlib.rc_context({"svg.hashsalt": OURS, "svg.fonttype": "none"}):
            self.figure.savefig(self.path, format=kind, dpi=160, metadata=metadata[kind])

    def _draw_header(self) -> None:
        device = str(self.document["machine"].get("device", self.document["backend"]))
        facts = f"pagedattn {self.document['pagedattn']}, {str(self.document['date'])[:10]}"
        for text, size, colour, down in ((device, 11, INK, 18), (facts, FONT, FAINT, 31)):
            self.figure.text(MARGIN / WIDTH, 1 - down / self.height, text, size=size, color=colour)

    def _draw_legend(self) -> None:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], label=style.title, **style.options(6.5)) for style in self.styles.values()]
        self.figure.legend(
            handles=handles, loc="lower center", ncols=self._columns, frameon=False, fontsize=FONT, labelcolor=INK,
            handletextpad=0.3, columnspacing=1.6,
        )  # fmt: skip


class LogScale:
    """A logarithmic axis of `length` points from `low`, with `room` points for names beyond `high`."""

    def __init__(self, low: float, high: float, length: float, room: float = 0) -> None:
        self.low = low
        self.per_decade = (length - room) / math.log10(high / low)
        self.high = self.value(length)

    def points(self, value: float) -> float:
        """Points from the low end."""
        return math.log10(value / self.low) * self.per_decade

    def value(self, points: float) -> float:
        """The value at so many points from the low end."""
        return float(self.low * 10 ** (points / self.per_decade))


def spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart by at least `gap`, as little as can be (least squares), between `low` and `high`.

    Where they do not fit, the gap shrinks.

    Examples
    --------
    >>> spread([10.0, 50.0, 10.0], gap=4.0, low=0.0, high=60.0)
    [8.0, 50.0, 12.0]
    >>> spread([1.0, 1.0], gap=4.0, low=0.0, high=60.0)
    [0.0, 4.0]
    """
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda index: places[index])
    # Without the gaps it is a monotone fit: neighbours in the wrong order share their mean.
    runs: list[list[float]] = []
    for rank, index in enumerate(order):
        runs.append([places[index] - rank * gap])
        while len(runs) > 1 and _mean(runs[-2]) > _mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    fit = [_mean(run) for run in runs for _ in run]
    moved = list(places)
    for rank, index in enumerate(order):
        moved[index] = min(max(fit[rank], low), high - (len(order) - 1) * gap) + rank * gap
    return moved


def _mean(run: list[float]) -> float:
    return sum(run) / len(run)


def _legend_columns(styles: dict[str, Style]) -> int:
    widths = [34 + CHARACTER * len(style.title) for style in styles.values()]
    room = WIDTH - 2 * MARGIN
    return len(widths) if sum(widths) <= room else max(1, int(room / max(widths)))


def _styles(document: dict[str, Any]) -> dict[str, Style]:
    """Everyone who has a time, ours first, the peers in the document's order."""
    timed = {result["peer"] for case in document["cases"] for result in case["results"] if "seconds" in result}
    titles = {peer["name"]: peer.get("title") or peer["name"] for peer in document["peers"] if peer["name"] != OURS}
    styles = {OURS: Style(OURS, "o", OUR_COLOUR, ours=True)}
    # By the place in the document, not among those with a time: a peer looks the same in all pictures of a machine.
    for place, (name, title) in enumerate(titles.items()):
        marker, colour = PEER_MARKERS[place % len(PEER_MARKERS)], PEER_COLOURS[place % len(PEER_COLOURS)]
        styles[name] = Style(title, marker, colour)
    return {name: style for name, style in styles.items() if name in timed}
