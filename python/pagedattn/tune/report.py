# SPDX-License-Identifier: Apache-2.0
"""What tuning found, as data and as a table."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

import pagedattn
from pagedattn.bench.timing import Timing

from .choice import Candidate, Choice, show_seconds, show_size
from .footprint import Footprint
from .model import Model
from .workload import Workload

TABLE_ITEM_SIZE = 4  # block tables are int32
_WIDTH = 132  # of plain text, which nobody wraps


@dataclass(frozen=True, slots=True)
class Row:
    """One block size.

    Attributes
    ----------
    decode : Timing
        Of one call for the batch, in one layer.
    prefill : Timing or None
        Of one call for the chunks, in one layer; None where there are no prompts.
    manager_seconds : float
        Time of the block manager in a decode step.
    table_shape : tuple of int
        Rows and columns of the batch's block tables.
    error : float
        Largest relative error of a checked result.
    """

    block_size: int
    decode: Timing
    prefill: Timing | None
    manager_seconds: float
    table_shape: tuple[int, int]
    footprint: Footprint
    error: float

    @property
    def table_bytes(self) -> int:
        """Bytes of the batch's block tables."""
        return self.table_shape[0] * self.table_shape[1] * TABLE_ITEM_SIZE


@dataclass(slots=True)
class Report:
    """Everything that tuning found; `choice` is the answer."""

    device: str
    backend: str
    work: Workload
    model: Model
    batch: list[int]
    chunks: list[tuple[int, int]]
    seed: int
    rows: list[Row]
    remarks: list[str]
    choice: Choice = field(default_factory=lambda: Choice(0, "", 0.0))

    @property
    def unit(self) -> str:
        """What :meth:`attention` is the time of."""
        return "a decode step" if self.work.shared is None else "a request"

    def attention(self, row: Row) -> tuple[float, float, float]:
        """Seconds of attention in all layers (median, lower and upper quartile) of a request, or of a decode step.

        A request's share is its part of the batch in each of its decode steps, and its part of a chunk for each prompt
        token that it does not find cached.
        """
        decodes, prefills = 1.0, 0.0
        if row.prefill is not None:
            decodes = float(self.work.outputs.mean()) / len(self.batch)
            prefills = row.footprint.computed_tokens / sum(new for new, _ in self.chunks)

        def total(decode: float, prefill: float) -> float:
            return self.model.layers * (decodes * decode + prefills * prefill)

        if row.prefill is None:
            return total(row.decode.median, 0), total(row.decode.low, 0), total(row.decode.high, 0)
        return (
            total(row.decode.median, row.prefill.median),
            total(row.decode.low, row.prefill.low),
            total(row.decode.high, row.prefill.high),
        )

    def candidates(self) -> list[Candidate]:
        """The block sizes as the rule sees them."""
        return [
            Candidate(row.block_size, *self.attention(row), self.bytes(row.footprint.held_slots)) for row in self.rows
        ]

    def bytes(self, slots: float) -> float:
        """Bytes of that many slots in all layers."""
        return slots * self.model.slot_bytes * self.model.layers

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON knows it."""
        return {
            "schema": 1,
            "pagedattn": pagedattn.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "backend": self.backend,
            "device": self.device,
            "workload": {
                "source": self.work.source,
                "requests": None if self.work.shared is None else len(self.work.prompts),
                "prompt_tokens": None if self.work.shared is None else int(self.work.prompts.sum()),
                "decode_steps": self.work.num_steps,
            },
            "model": dataclasses.asdict(self.model),
            "batch": self.batch,
            "chunks": [{"new": new, "length": length} for new, length in self.chunks],
            "seed": self.seed,
            "block_sizes": [self._row_dict(row) for row in self.rows],
            "unit": self.unit,
            "recommended": self.choice.block_size,
            "reason": self.choice.reason,
            "noise": self.choice.noise,
            "remarks": self.remarks,
        }

    def _row_dict(self, row: Row) -> dict[str, Any]:
        taken = row.footprint
        seconds, low, high = self.attention(row)
        return {
            "block_size": row.block_size,
            "decode": _timing(row.decode),
            "prefill": None if row.prefill is None else _timing(row.prefill),
            "attention": {"seconds": seconds, "low": low, "high": high},
            "manager_seconds": row.manager_seconds,
            "held_bytes": self.bytes(taken.held_slots),
            "allocated_bytes": self.bytes(taken.allocated_slots),
            "unused_bytes": self.bytes(taken.unused_slots),
            "waste": taken.waste,
            "table_entries": taken.blocks,
            "table_bytes": row.table_bytes,
            "found": taken.found,
            "error": row.error,
        }

    def heading(self) -> list[str]:
        """What was measured where."""
        m, work = self.model, self.work
        dtype = m.dtype if m.kv_dtype == m.dtype else f"{m.dtype} with {m.kv_dtype} cache"
        lines = [
            f"pagedattn tune on {self.device}: {m.heads} heads, {m.kv_heads} KV heads of {m.head_dim}, "
            f"{m.layers} layers, {dtype}"
        ]
        mean = sum(self.batch) / len(self.batch)
        sequences = _count(len(self.batch), "sequence")
        batch = f"decode of {sequences} of {min(self.batch)} to {max(self.batch)} tokens (mean {mean:.0f})"
        if work.shared is None:
            return [*lines, f"{work.source}: {batch}"]
        new = sum(tokens for tokens, _ in self.chunks)
        return [
            *lines,
            f"{work.source}: {_count(len(work.prompts), 'request')}, means of {work.prompts.mean():.0f} prompt and "
            f"{work.outputs.mean():.0f} output tokens",
            f"{batch}; prefill of {new} tokens of {_count(len(self.chunks), 'prompt')}",
        ]

    def columns(self) -> list[tuple[str, list[str]]]:
        """Titles, in two lines, with their cells."""
        rows = self.rows
        columns = [
            ("block\nsize", [str(row.block_size) for row in rows]),
            ("decode\na call", [show_seconds(row.decode.median) for row in rows]),
        ]
        if self.work.shared is not None:
            prefills = [row.prefill for row in rows if row.prefill is not None]
            columns.append(("prefill\na call", [show_seconds(timing.median) for timing in prefills]))
        columns += [
            (f"attention\n{self.unit}", [show_seconds(self.attention(row)[0]) for row in rows]),
            ("waste\n", [_percent(row.footprint.waste) for row in rows]),
            ("waste\na sequence", [show_size(self.bytes(row.footprint.unused_slots)) for row in rows]),
        ]
        if self.work.shared is not None:
            columns.append(("prompts\nfound", [_percent(row.footprint.found or 0.0) for row in rows]))
        columns += [
            ("held\na sequence", [show_size(self.bytes(row.footprint.held_slots)) for row in rows]),
            ("entries\na sequence", [f"{row.footprint.blocks:.1f}" for row in rows]),
            ("tables\na batch", [show_size(row.table_bytes) for row in rows]),
            ("manager\na step", [show_seconds(row.manager_seconds) for row in rows]),
        ]
        return columns

    def rich(self) -> Group:
        """The report as a rich renderable."""
        columns = self.columns()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title, _ in columns:
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for index, row in enumerate(self.rows):
            best = row.block_size == self.choice.block_size
            cells = [column[index] for _, column in columns]
            table.add_row(*cells, "recommended" if best else "", style="bold" if best else None)
        first, *others = self.heading()
        parts: list[Text | Table] = [Text(first, style="bold"), *(Text(line) for line in others), table]
        parts += [Text(f"Recommended: blocks of {self.choice.block_size}.", style="bold"), Text(self.choice.reason)]
        return Group(*parts, *(Text(f"note: {remark}", style="yellow") for remark in self.remarks))


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report: colours and the terminal's width where there is one, plain text elsewhere."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH, no_color=True, highlight=False)
    console.print(report.rich())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _percent(part: float) -> str:
    return f"{100 * part:.2f} %"


def _timing(timing: Timing) -> dict[str, Any]:
    return {
        "seconds": timing.median,
        "low": timing.low,
        "high": timing.high,
        "samples": list(timing.samples),
        "method": timing.method,
    }
