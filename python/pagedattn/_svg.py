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
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from pagedattn._units import counted

MARGIN = 24
TOP = 96  # title and panel headings
LINE = 22  # of the legend
LABEL_WIDTH = 92
MAX_LEFT_WIDTH = 440  # block tables, labels included
GUTTER = 150  # between the panels, where the arrows cross
MAX_RIGHT_WIDTH = 440  # physical blocks
LEGEND_WIDTH = 580
MAX_PANEL_HEIGHT = 560
MAX_PAGE, MAX_BLOCK = 52.0, 64.0  # pitch of the cells
MAX_CELLS = 1200  # of each panel; beyond that a cell stands for several blocks
MAX_REQUESTS = 24
MAX_ARROWS = 72
LEAST_LABELLED = 15.0  # a cell this wide has room for a number

# Told apart by most colour-blind readers, and on white and on dark paper alike.
COLOURS = (
    "#4477aa", "#ee7733", "#228833", "#aa3377", "#33a0c4", "#ccab2e", "#cc3311", "#7755bb",
    "#009988", "#e377a2", "#8c6d46", "#6b8e23", "#1f4e79", "#f2a65a", "#7fbf7f", "#6a1b4d",
    "#88ccee", "#8a7400", "#ef8a80", "#b6a3e0", "#00625a", "#97426b", "#c8ad8d", "#a8c256",
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


@dataclass(frozen=True)
class _Panel:
    """Cells in rows, with the gaps in which arrows run."""

    cells: list[_Cell]
    gap: float
    left: float
    right: float
    bottom: float


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
        An SVG document.
    """
    requests, hidden = _requests(layout)
    per_cell = max(1, math.ceil(layout["num_blocks"] / MAX_CELLS))
    rows, pages_per_cell = _rows(requests)
    left_panel = max((panel.right for panel in rows), default=float(MARGIN + LABEL_WIDTH + 120))
    rows_bottom = max((panel.bottom for panel in rows), default=float(TOP))
    blocks = _grid(layout["num_blocks"], per_cell, left_panel + GUTTER, rows_bottom - TOP)
    width = math.ceil(max(LEGEND_WIDTH, blocks.right) + MARGIN)
    bottom = max(blocks.bottom, rows_bottom) + 12

    canvas = _Canvas("pa" + format(zlib.crc32(repr((title, requests)).encode()), "08x"))
    labelled = all(page.size >= LEAST_LABELLED for row in rows for page in row.cells[:1])
    _draw_headings(canvas, layout, title, width, blocks, per_cell, pages_per_cell, labelled)
    drawn, total = _draw_arrows(canvas, requests, rows, blocks, left_panel, per_cell)
    _draw_blocks(canvas, layout, requests, blocks.cells, per_cell)
    _draw_requests(canvas, layout["block_size"], requests, rows, pages_per_cell)
    legend_lines = _draw_legend(canvas, width, bottom + 18, _notes(hidden, drawn, total))
    height = math.ceil(bottom + 14 + LINE * legend_lines)
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="{FONT}" role="img">',
            f"<title>{escape(title or 'Paged KV cache')}</title>",
            "<defs>",
            *canvas.definitions(),
            "</defs>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="12" fill="{PAPER}" '
            f'stroke="{FRAME}"/>',
            *canvas.parts,
            "</svg>\n",
        ]
    )


# --- what is drawn -------------------------------------------------------------------------------------------------


def _requests(layout: Mapping[str, Any]) -> tuple[list[_Request], list[_Request]]:
    """The requests that get a row and a colour, and the others: those without blocks, and the smallest of many."""
    offsets = layout["table_offsets"]
    everyone = [
        _Request(
            int(seq),
            int(layout["num_tokens"][i]),
            int(layout["num_computed_tokens"][i]),
            [int(block) for block in layout["tables"][offsets[i] : offsets[i + 1]]],
            bool(layout["is_swapped"][i]),
            HIDDEN,
        )
        for i, seq in enumerate(layout["seq_ids"])
    ]
    largest = sorted((r for r in everyone if r.table), key=lambda r: -len(r.table))[:MAX_REQUESTS]
    chosen = {r.seq for r in largest}
    shown = [r for r in everyone if r.seq in chosen]
    return (
        [replace(r, colour=colour) for r, colour in zip(shown, COLOURS, strict=False)],
        [r for r in everyone if r.seq not in chosen],
    )


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


def _grid(num_blocks: int, per_cell: int, left: float, height: float) -> _Panel:
    """Cells of the physical blocks: as large as fits, in a shape that suits the other panel's height."""
    wanted = min(1.35, max(0.7, MAX_RIGHT_WIDTH / max(height, 1.0)))
    count = math.ceil(num_blocks / per_cell)

    def pitch_of(columns: int) -> float:
        rows = math.ceil(count / columns)
        return min(MAX_RIGHT_WIDTH / columns, MAX_PANEL_HEIGHT / rows, MAX_BLOCK)

    def merit(columns: int) -> float:
        aspect = columns / math.ceil(count / columns)
        return pitch_of(columns) * (1 - 0.15 * abs(math.log(aspect / wanted)))

    columns = max((c for c in (1, 2, 3, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50) if c <= count), key=merit)
    pitch = pitch_of(columns)
    gap = max(1.5, pitch * 0.18)
    cells = [
        _Cell(left + i % columns * pitch, TOP + gap + i // columns * pitch, pitch - gap, i * per_cell)
        for i in range(count)
    ]
    return _Panel(cells, gap, left, left + columns * pitch - gap, cells[-1].y + cells[-1].size)


def _rows(requests: list[_Request]) -> tuple[list[_Panel], int]:
    """The pages of each request, in as many lines as they need; and how many pages a cell stands for."""
    pages_per_cell = 1
    while sum(math.ceil(len(r.table) / pages_per_cell) for r in requests) > MAX_CELLS:
        pages_per_cell *= 2
    counts = [math.ceil(len(r.table) / pages_per_cell) for r in requests]
    room = MAX_LEFT_WIDTH - LABEL_WIDTH
    for pitch in [*range(int(MAX_PAGE), 7, -2), 7, 6, 5, 4, 3]:
        per_line = max(1, room // pitch)
        spacing = pitch * 0.3 + 6
        heights = [max(math.ceil(n / per_line) * pitch, 13.0) for n in counts]
        if sum(heights) + spacing * len(heights) <= MAX_PANEL_HEIGHT:
            break
    gap = max(1.0, pitch * 0.16)
    left = float(MARGIN + LABEL_WIDTH)
    rows = []
    y = float(TOP)
    for n, height in zip(counts, heights, strict=True):
        cells = [
            _Cell(left + i % per_line * pitch, y + i // per_line * pitch, pitch - gap, i * pages_per_cell)
            for i in range(n)
        ]
        rows.append(_Panel(cells, gap, left, left + min(n, per_line) * pitch - gap, y + height))
        y += height + spacing
    return rows, pages_per_cell


# --- drawing -------------------------------------------------------------------------------------------------------


def _draw_headings(
    canvas: _Canvas,
    layout: Mapping[str, Any],
    title: str,
    width: float,
    blocks: _Panel,
    per_cell: int,
    pages_per_cell: int,
    labelled: bool,
) -> None:
    held = int((layout["ref_counts"] > 0).sum())
    free = int(((layout["ref_counts"] == 0) & ~layout["is_cached"]).sum())
    unused = layout["num_blocks"] - held - free
    title = title or "Paged KV cache"
    size = min(17.0, (width - 2 * MARGIN) / (0.62 * len(title)))
    canvas.text(MARGIN, 38, title, round(size, 1), font_weight="600")
    pages = (
        "each page names its block"
        if labelled and pages_per_cell == 1
        else "a cell is " + counted(pages_per_cell, "page")
    )
    of = f", a cell is {per_cell}" if per_cell > 1 else ""
    for x, heading, detail in (
        (MARGIN, "Block tables", pages),
        (blocks.left, f"{layout['num_blocks']} blocks of {layout['block_size']} tokens{of}",
         f"{held} held, {unused} cached, {free} free"),
    ):  # fmt: skip
        canvas.text(x, TOP - 30, heading, 13, INK, font_weight="600")
        canvas.text(x, TOP - 14, detail, 11.5, FAINT)


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
    canvas: _Canvas, block_size: int, requests: list[_Request], rows: list[_Panel], pages_per_cell: int
) -> None:
    for request, row in zip(requests, rows, strict=True):
        _draw_label(canvas, request, row.cells[0].y, row.cells[0].size)
        for page in row.cells:
            _draw_page(canvas, request, page, block_size, pages_per_cell)


def _draw_arrows(
    canvas: _Canvas, requests: list[_Request], rows: list[_Panel], blocks: _Panel, left_panel: float, per_cell: int
) -> tuple[int, int]:
    """From pages to blocks; returns how many arrows were drawn, and of how many."""
    arrows = [
        (request, page, blocks.cells[request.table[page.group] // per_cell])
        for request, row in zip(requests, rows, strict=True)
        for page in row.cells
        if not request.swapped and request.table[page.group] >= 0
    ]
    drawn = _thinned(arrows)
    lanes = {request.seq: lane for lane, request in enumerate(requests)}
    few = len(drawn) <= 24
    for request, page, block in drawn:
        # A lane of its own in the gaps keeps the lines of two requests apart.
        lane = (lanes[request.seq] * 0.382) % 1.0 - 0.5
        _draw_arrow(canvas, request.colour, page, block, left_panel, blocks, lane, few)
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


def _draw_arrow(
    canvas: _Canvas, colour: str, page: _Cell, block: _Cell, left_panel: float, blocks: _Panel, lane: float, few: bool
) -> None:
    """Down from the page, along the gap below it, across the gutter, along the gap above the block, and into it."""
    width, opacity = (1.6, 0.85) if few else (1.0, 0.6)
    x0, y0 = page.x + page.size / 2, page.y + page.size
    x1, y1 = block.x + block.size / 2 + lane * block.size * 0.5, block.y
    below = y0 + max(1.0, page.size * 0.09) + lane * 1.5
    above = y1 - blocks.gap * (0.55 + 0.4 * lane)
    bend = min(blocks.gap, page.size * 0.2)
    start, end = left_panel + 6, blocks.left - 8
    middle = (start + end) / 2
    canvas.add(
        f'<path d="M{x0:.1f} {y0:.1f}Q{x0:.1f} {below:.1f} {x0 + bend:.1f} {below:.1f}H{start:.1f}'
        f"C{middle:.1f} {below:.1f} {middle:.1f} {above:.1f} {end:.1f} {above:.1f}H{x1 - bend:.1f}"
        f'Q{x1:.1f} {above:.1f} {x1:.1f} {y1:.1f}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}"/>'
    )
    head = min(4.5, block.size * 0.1)
    canvas.add(f'<path d="M{x1:.1f} {y1 + 0.5:.1f}l{-head:.1f} {-head * 1.3:.1f}h{2 * head:.1f}z" fill="{colour}"/>')


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


def _draw_legend(canvas: _Canvas, width: float, y: float, notes: str) -> int:
    """Returns the number of its lines."""
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
    if not notes:
        return 1
    lines = 1 if LEGEND_WIDTH + 6.2 * len(notes) < width - MARGIN else 2
    canvas.text(width - MARGIN if lines == 1 else MARGIN, y + LINE * (lines - 1), notes, 11.5, FAINT,
                text_anchor="end" if lines == 1 else "start")  # fmt: skip
    return lines
