# SPDX-License-Identifier: Apache-2.0
"""The paged cache as a picture: block tables on the left, physical blocks on the right, arrows between them.

A request has one colour.  Its virtual pages are drawn in order, each filled as far as it holds tokens and numbered with
the block it lies in; a block has the colours of all the requests that hold it.  Sizes follow the number of pages and
blocks; where there are too many to tell apart, a cell stands for several and only some arrows are drawn.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

WIDTH = 1000
MARGIN = 24
TOP = 92  # title and panel headings
LEGEND = 46
LABEL_WIDTH = 92
LEFT_WIDTH = 400  # block tables, labels included
RIGHT_WIDTH = 400  # physical blocks
MAX_PANEL_HEIGHT = 560
MAX_CELLS = 1200  # of each panel; beyond that a cell stands for several blocks
MAX_REQUESTS = 24
MAX_ARROWS = 72
LEAST_LABELLED = 15  # a cell this wide has room for a number

# Told apart by most colour-blind readers, and on white and on dark paper alike.
COLOURS = (
    "#4477aa", "#ee7733", "#228833", "#aa3377", "#33a0c4", "#ccab2e",
    "#cc3311", "#7755bb", "#009988", "#e377a2", "#8c6d46", "#6b8e23",
)  # fmt: skip
PAPER, FRAME, INK, FAINT = "#ffffff", "#d0d7de", "#24292f", "#6e7781"
FREE_FILL, FREE_EDGE = "#eceff2", "#d5dae0"
CACHED_FILL, CACHED_EDGE = "#fdf3d3", "#c9a94a"
HIDDEN = "#9aa4af"  # requests that have no row of their own
FONT = "ui-sans-serif, system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class _Request:
    seq: int
    num_tokens: int
    num_computed: int
    table: list[int]
    swapped: bool
    colour: str


@dataclass(frozen=True)
class _Cell:
    """A square of either panel; `group` is the page or block it begins with."""

    x: float
    y: float
    size: float
    group: int


@dataclass
class _Canvas:
    prefix: str
    parts: list[str] = field(default_factory=list)
    patterns: dict[tuple[str, ...], str] = field(default_factory=dict)

    def add(self, text: str) -> None:
        self.parts.append(text)

    def text(self, x: float, y: float, text: str, size: float, colour: str = INK, **attributes: str) -> None:
        extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}"{extra}>{escape(text)}</text>')

    def rect(self, cell: _Cell, fill: str, edge: str, edge_width: float = 1.0, *, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="3 2"' if dashed else ""
        self.add(
            f'<rect x="{cell.x:.1f}" y="{cell.y:.1f}" width="{cell.size:.1f}" height="{cell.size:.1f}" '
            f'rx="{cell.size / 9:.1f}" fill="{fill}" stroke="{edge}" stroke-width="{edge_width:g}"{dash}/>'
        )

    def stripes(self, colours: tuple[str, ...]) -> str:
        """The fill of a block that several requests hold: diagonal stripes of their colours."""
        if colours not in self.patterns:
            self.patterns[colours] = f"{self.prefix}-p{len(self.patterns)}"
        return f"url(#{self.patterns[colours]})"

    def definitions(self) -> Iterator[str]:
        for colours, name in self.patterns.items():
            width = 6.0 if len(colours) < 4 else 4.0
            period = width * len(colours)
            bars = "".join(
                f'<rect x="{i * width:g}" width="{width:g}" height="{period:g}" fill="{colour}"/>'
                for i, colour in enumerate(colours)
            )
            yield (
                f'<pattern id="{name}" width="{period:g}" height="{period:g}" patternUnits="userSpaceOnUse" '
                f'patternTransform="rotate(45)">{bars}</pattern>'
            )


def render(layout: Mapping[str, Any], *, title: str = "") -> str:
    """Draw a paged cache.

    Parameters
    ----------
    layout : mapping
        What `BlockManager.layout` returned.
    title : str, optional
        The heading.

    Returns
    -------
    str
        An SVG document, a thousand units wide.
    """
    requests, hidden = _requests(layout)
    per_cell = max(1, math.ceil(layout["num_blocks"] / MAX_CELLS))
    blocks = _grid(layout["num_blocks"], per_cell)
    rows, pages_per_cell = _rows(requests)
    bottom = max([cell.y + cell.size for cell in blocks] + [y + size for y, size, _ in rows])

    canvas = _Canvas("pa" + format(zlib.crc32(repr((title, requests)).encode()), "08x"))
    _draw_headings(canvas, layout, title, per_cell, pages_per_cell)
    _draw_blocks(canvas, layout, requests, blocks, per_cell)
    drawn, total = _draw_requests(canvas, layout["block_size"], requests, rows, blocks, per_cell, pages_per_cell)
    _draw_legend(canvas, bottom + 30, _notes(hidden, drawn, total))
    height = bottom + LEGEND + MARGIN
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" font-family="{FONT}" role="img">',
            f"<title>{escape(title or 'Paged KV cache')}</title>",
            "<defs>",
            *canvas.definitions(),
            "</defs>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="12" fill="{PAPER}" '
            f'stroke="{FRAME}"/>',
            *canvas.parts,
            "</svg>\n",
        ]
    )


# --- what is drawn -------------------------------------------------------------------------------------------------


def _requests(layout: Mapping[str, Any]) -> tuple[list[_Request], list[_Request]]:
    """The requests that get a row, and the others: those without blocks, and the smallest where there are many."""
    offsets = layout["table_offsets"]
    everyone = [
        _Request(
            int(seq),
            int(layout["num_tokens"][i]),
            int(layout["num_computed_tokens"][i]),
            [int(block) for block in layout["tables"][offsets[i] : offsets[i + 1]]],
            bool(layout["is_swapped"][i]),
            COLOURS[i % len(COLOURS)],
        )
        for i, seq in enumerate(layout["seq_ids"])
    ]
    largest = sorted((r for r in everyone if r.table), key=lambda r: -len(r.table))[:MAX_REQUESTS]
    shown = {r.seq for r in largest}
    return [r for r in everyone if r.seq in shown], [r for r in everyone if r.seq not in shown]


def _notes(hidden: list[_Request], drawn: int, total: int) -> str:
    notes = []
    waiting = sum(not r.table for r in hidden)
    if waiting:
        notes.append(f"{waiting} waiting without blocks")
    if len(hidden) > waiting:
        notes.append(f"{len(hidden) - waiting} smaller requests in grey")
    if drawn < total:
        notes.append(f"{drawn} of {total} arrows drawn")
    return " · ".join(notes)


# --- where it goes -------------------------------------------------------------------------------------------------


def _grid(num_blocks: int, per_cell: int) -> list[_Cell]:
    """Cells of the physical blocks: as large as fits, in rows of a round number where there are several rows."""
    count = math.ceil(num_blocks / per_cell)
    best_columns, best_size = count, 0.0
    for columns in (1, 2, 3, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50):
        rows = math.ceil(count / columns)
        size = min(RIGHT_WIDTH / columns, MAX_PANEL_HEIGHT / rows, 72.0)
        if size > best_size + 0.01:
            best_columns, best_size = columns, size
    gap = max(1.5, best_size * 0.16)
    left = WIDTH - MARGIN - RIGHT_WIDTH + (RIGHT_WIDTH - best_columns * best_size + gap) / 2
    return [
        _Cell(left + i % best_columns * best_size, TOP + i // best_columns * best_size, best_size - gap, i * per_cell)
        for i in range(count)
    ]


def _rows(requests: list[_Request]) -> tuple[list[tuple[float, float, list[_Cell]]], int]:
    """For each request its top, its height and the cells of its pages; and how many pages a cell stands for."""
    pages_per_cell = 1
    room = LEFT_WIDTH - LABEL_WIDTH
    while sum(math.ceil(len(r.table) / pages_per_cell) for r in requests) > MAX_CELLS:
        pages_per_cell *= 2
    for pitch in [*range(48, 7, -2), 7, 6, 5, 4, 3]:
        per_line = max(1, room // pitch)
        lines = [math.ceil(math.ceil(len(r.table) / pages_per_cell) / per_line) for r in requests]
        spacing = pitch * 0.42 + 4
        if sum(max(n * pitch, 13.0) + spacing for n in lines) <= MAX_PANEL_HEIGHT:
            break
    gap = max(1.0, pitch * 0.14)
    rows = []
    y = float(TOP)
    for request, n in zip(requests, lines, strict=True):
        cells = [
            _Cell(
                MARGIN + LABEL_WIDTH + i % per_line * pitch,
                y + i // per_line * pitch,
                pitch - gap,
                i * pages_per_cell,
            )
            for i in range(math.ceil(len(request.table) / pages_per_cell))
        ]
        rows.append((y, max(n * pitch, 13.0), cells))
        y += max(n * pitch, 13.0) + spacing
    return rows, pages_per_cell


# --- drawing -------------------------------------------------------------------------------------------------------


def _draw_headings(canvas: _Canvas, layout: Mapping[str, Any], title: str, per_cell: int, pages_per_cell: int) -> None:
    held = int((layout["ref_counts"] > 0).sum())
    free = int(((layout["ref_counts"] == 0) & ~layout["is_cached"]).sum())
    unused = layout["num_blocks"] - held - free
    canvas.text(MARGIN, 36, title or "Paged KV cache", 17, font_weight="600")
    left = "Block tables: the pages of each request" + (f" (a cell is {pages_per_cell})" if pages_per_cell > 1 else "")
    right = (
        f"{layout['num_blocks']} blocks of {layout['block_size']} tokens: {held} held, {unused} cached, {free} free"
        + (f" (a cell is {per_cell})" if per_cell > 1 else "")
    )
    canvas.text(MARGIN, TOP - 20, left, 13, FAINT)
    canvas.text(WIDTH - MARGIN - RIGHT_WIDTH / 2, TOP - 20, right, 13, FAINT, text_anchor="middle")


def _holders(layout: Mapping[str, Any], requests: list[_Request]) -> dict[int, list[str]]:
    holders: dict[int, list[str]] = {}
    for request in requests:
        if request.swapped:
            continue
        for block in request.table:
            if block >= 0:
                holders.setdefault(block, []).append(request.colour)
    return holders


def _draw_blocks(
    canvas: _Canvas, layout: Mapping[str, Any], requests: list[_Request], cells: list[_Cell], per_cell: int
) -> None:
    holders = _holders(layout, requests)
    fill_levels = _fill_levels(layout["block_size"], requests)
    for cell in cells:
        group = range(cell.group, min(cell.group + per_cell, layout["num_blocks"]))
        count = max(int(layout["ref_counts"][b]) for b in group)
        if count == 0:
            cached = any(layout["is_cached"][b] for b in group)
            canvas.rect(cell, CACHED_FILL if cached else FREE_FILL, CACHED_EDGE if cached else FREE_EDGE, dashed=cached)
            if per_cell == 1:
                _number(canvas, cell, str(cell.group), CACHED_EDGE if cached else "#aab2bb")
            continue
        colours = tuple(dict.fromkeys(c for b in group for c in holders.get(b, ()))) or (HIDDEN,)
        level = 1.0 if per_cell > 1 else fill_levels.get(cell.group, 1.0)
        shared = count > 1
        _filled(canvas, cell, canvas.stripes(colours[:5]) if shared and len(colours) > 1 else colours[0], level)
        canvas.rect(cell, "none", INK if shared else colours[0], max(1.0, cell.size / 18) if shared else 1.0)
        if per_cell == 1:
            _number(canvas, cell, str(cell.group), "#ffffff", halo=shared)
        if shared and cell.size >= 12:
            _badge(canvas, cell, count)


def _fill_levels(block_size: int, requests: list[_Request]) -> dict[int, float]:
    """How far a request's last block is filled: the only kind that is not full."""
    levels: dict[int, float] = {}
    for request in requests:
        if request.swapped or request.num_computed % block_size == 0 or request.table[-1] < 0:
            continue
        level = request.num_computed % block_size / block_size
        levels[request.table[-1]] = max(level, levels.get(request.table[-1], 0.0))
    return levels


def _draw_requests(
    canvas: _Canvas,
    block_size: int,
    requests: list[_Request],
    rows: list[tuple[float, float, list[_Cell]]],
    blocks: list[_Cell],
    per_cell: int,
    pages_per_cell: int,
) -> tuple[int, int]:
    """Rows and arrows; returns how many arrows were drawn, and of how many."""
    arrows = [
        (request, page, blocks[request.table[page.group] // per_cell])
        for request, (_, _, pages) in zip(requests, rows, strict=True)
        for page in pages
        if not request.swapped and request.table[page.group] >= 0
    ]
    drawn = _thinned(arrows)
    for request, page, block in drawn:
        _draw_arrow(canvas, request.colour, page, block, len(drawn))
    for request, (y, _, pages) in zip(requests, rows, strict=True):
        _draw_label(canvas, request, y, pages[0].size)
        for page in pages:
            _draw_page(canvas, request, page, block_size, pages_per_cell)
    return len(drawn), len(arrows)


def _thinned(arrows: list[tuple[_Request, _Cell, _Cell]]) -> list[tuple[_Request, _Cell, _Cell]]:
    """All arrows where they are few; else those that begin a run of neighbouring blocks, and of these every n-th."""
    if len(arrows) <= MAX_ARROWS:
        return arrows
    breaks = [
        arrow
        for before, arrow in zip([None, *arrows[:-1]], arrows, strict=True)
        if before is None or before[0] is not arrow[0] or not 0 <= arrow[2].group - before[2].group <= 1
    ]
    return breaks[:: math.ceil(len(breaks) / MAX_ARROWS)]


def _draw_arrow(canvas: _Canvas, colour: str, page: _Cell, block: _Cell, count: int) -> None:
    x0, y0 = page.x + page.size / 2, page.y + page.size
    x1, y1 = block.x, block.y + block.size / 2
    bend = max(60.0, (x1 - x0) * 0.45)
    opacity = 0.75 if count <= 24 else 0.5
    width = 1.6 if count <= 24 else 1.0
    canvas.add(
        f'<path d="M{x0:.1f} {y0:.1f}C{x0 + bend * 0.35:.1f} {y0 + 22:.1f} {x1 - bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}" '
        f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"/>'
    )
    head = 5.0 if count <= 24 else 3.2
    canvas.add(
        f'<path d="M{x1 + 1:.1f} {y1:.1f}l{-head * 1.5:.1f} {-head * 0.75:.1f}v{head * 1.5:.1f}z" fill="{colour}"/>'
    )


def _draw_label(canvas: _Canvas, request: _Request, y: float, size: float) -> None:
    pending = f"/{request.num_tokens}" if request.num_tokens > request.num_computed else ""
    tokens = f"{request.num_computed}{pending} {'on host' if request.swapped else 'tokens'}"
    if size >= 24:
        canvas.text(MARGIN, y + 15, f"request {request.seq}", 13, request.colour, font_weight="600")
        canvas.text(MARGIN, y + 29, tokens, 10.5, FAINT)
    else:
        canvas.text(MARGIN, y + 10, f"{request.seq}", 11, request.colour, font_weight="600")
        canvas.text(MARGIN + LABEL_WIDTH - 8, y + 10, tokens, 9, FAINT, text_anchor="end")


def _draw_page(canvas: _Canvas, request: _Request, page: _Cell, block_size: int, pages_per_cell: int) -> None:
    block = request.table[page.group]
    if block < 0:
        canvas.rect(page, "none", FREE_EDGE, dashed=True)
        return
    tokens = request.num_computed - page.group * block_size
    level = min(1.0, tokens / (block_size * pages_per_cell))
    if request.swapped:
        canvas.rect(page, PAPER, request.colour, dashed=True)
        _number(canvas, page, str(block), request.colour)
        return
    _filled(canvas, page, request.colour, level)
    canvas.rect(page, "none", request.colour)
    if pages_per_cell == 1:
        _number(canvas, page, str(block), "#ffffff")


def _filled(canvas: _Canvas, cell: _Cell, fill: str, level: float) -> None:
    """A cell filled from the left as far as it holds tokens; the rest is a pale ground."""
    radius = cell.size / 9
    shape = f'x="{cell.x:.1f}" y="{cell.y:.1f}" height="{cell.size:.1f}" rx="{radius:.1f}"'
    if level < 1.0:
        canvas.add(f'<rect {shape} width="{cell.size:.1f}" fill="{PAPER}"/>')
        canvas.add(f'<rect {shape} width="{cell.size:.1f}" fill="{fill}" fill-opacity="0.35"/>')
    canvas.add(f'<rect {shape} width="{max(cell.size * level, 2 * radius):.1f}" fill="{fill}"/>')


def _number(canvas: _Canvas, cell: _Cell, text: str, colour: str, *, halo: bool = False) -> None:
    if cell.size < LEAST_LABELLED:
        return
    size = min(cell.size * 0.36, cell.size * 1.35 / max(2, len(text)), 17)
    attributes = {"text_anchor": "middle"}
    if colour == "#ffffff":
        # A dark rim keeps white digits readable on pale colours, stripes and half-filled cells.
        attributes |= {"stroke": INK, "stroke_width": f"{size / (5 if halo else 7):.1f}", "stroke_opacity": "0.55",
                       "paint_order": "stroke"}  # fmt: skip
    canvas.text(cell.x + cell.size / 2, cell.y + cell.size / 2 + size * 0.36, text, size, colour, **attributes)


def _badge(canvas: _Canvas, cell: _Cell, count: int) -> None:
    """How many requests hold the block, on its upper right corner."""
    size = min(11.0, max(6.5, cell.size * 0.26))
    x, y = cell.x + cell.size - size * 0.35, cell.y + size * 0.35
    canvas.add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size * 0.82:.1f}" fill="{INK}"/>')
    canvas.text(x, y + size * 0.34, str(count), size, "#ffffff", text_anchor="middle", font_weight="600")


def _draw_legend(canvas: _Canvas, y: float, notes: str) -> None:
    x = float(MARGIN)
    size = 14.0

    def entry(text: str) -> _Cell:
        nonlocal x
        cell = _Cell(x, y - 11, size, 0)
        canvas.text(x + size + 6, y, text, 11.5, FAINT)
        x += size + 22 + 6.1 * len(text)
        return cell

    cell = entry("held")
    canvas.rect(cell, COLOURS[0], COLOURS[0])
    cell = entry("partly filled")
    _filled(canvas, cell, COLOURS[0], 0.5)
    canvas.rect(cell, "none", COLOURS[0])
    cell = entry("shared, with its count")
    canvas.rect(cell, canvas.stripes(COLOURS[:2]), INK, 1.4)
    canvas.rect(entry("cached, not in use"), CACHED_FILL, CACHED_EDGE, dashed=True)
    canvas.rect(entry("free"), FREE_FILL, FREE_EDGE)
    if notes:
        canvas.text(WIDTH - MARGIN, y, notes, 11.5, FAINT, text_anchor="end")
