# SPDX-License-Identifier: Apache-2.0
"""What tuning found, as data and as a table."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

import pagedattn
from pagedattn._units import counted, size_unit, three_digits, time_unit
from pagedattn.bench.timing import Timing

from .choice import Candidate, Choice, choose
from .footprint import Footprint
from .model import Model
from .workload import Workload

TABLE_ITEM_SIZE = 4  # block tables are int32


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


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured; `choice` is the answer."""

    device: str
    backend: str
    work: Workload
    model: Model
    batch: list[int]
    chunks: list[tuple[int, int]]
    seed: int
    rows: list[Row]
    remarks: list[str]

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

    @property
    def choice(self) -> Choice:
        """What the rule says to it."""
        return choose(self.candidates(), unit=self.unit)

    def bytes(self, slots: float) -> float:
        """Bytes of that many slots in all layers."""
        return slots * self.model.slot_bytes * self.model.layers

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON knows it."""
        choice = self.choice
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
            "recommended": choice.block_size,
            "reason": choice.reason,
            "noise": choice.noise,
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
        sequences = counted(len(self.batch), "sequence")
        batch = f"decode of {sequences} of {min(self.batch)} to {max(self.batch)} tokens (mean {mean:.0f})"
        if work.shared is None:
            return [*lines, f"{work.source}: {batch}"]
        new = sum(tokens for tokens, _ in self.chunks)
        return [
            *lines,
            f"{work.source}: {counted(len(work.prompts), 'request')}, means of {work.prompts.mean():.0f} prompt and "
            f"{work.outputs.mean():.0f} output tokens",
            f"{batch}; prefill of {new} tokens of {counted(len(self.chunks), 'prompt')}",
        ]

    def lines(self) -> list[tuple[str, list[str]]]:
        """What the table says of the block sizes: a name with its unit, and a cell for each."""
        rows = self.rows
        taken = [row.footprint for row in rows]
        lines = [_times("decode call", [row.decode.median for row in rows])]
        if self.work.shared is not None:
            lines.append(_times("prefill call", [row.prefill.median for row in rows if row.prefill is not None]))
        lines += [
            _times(f"attention {self.unit}", [self.attention(row)[0] for row in rows]),
            ("waste, %", [f"{100 * each.waste:.2f}" for each in taken]),
            _sizes("waste a sequence", [self.bytes(each.unused_slots) for each in taken]),
        ]
        if self.work.shared is not None:
            lines.append(("prompts found, %", [f"{100 * (each.found or 0.0):.2f}" for each in taken]))
        return [
            *lines,
            _sizes("held a sequence", [self.bytes(each.held_slots) for each in taken]),
            ("entries a sequence", [f"{each.blocks:.1f}" for each in taken]),
            _sizes("tables a batch", [row.table_bytes for row in rows]),
            _times("manager a step", [row.manager_seconds for row in rows]),
        ]

    def parts(self) -> list[Text | Table]:
        """The report for rich to print."""
        choice = self.choice
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("block size", no_wrap=True)
        for row in self.rows:
            best = row.block_size == choice.block_size
            title = f"*{row.block_size}" if best else str(row.block_size)
            table.add_column(title, justify="right", no_wrap=True, style="bold" if best else "")
        for name, cells in self.lines():
            table.add_row(name, *cells)
        first, *others = self.heading()
        parts: list[Text | Table] = [Text(first, style="bold"), *(Text(line) for line in others), Text(), table, Text()]
        parts += [Text(f"Recommended: blocks of {choice.block_size}.", style="bold"), Text(choice.reason)]
        return [*parts, *(Text(f"note: {remark}", style="yellow") for remark in self.remarks)]


def _times(name: str, seconds: Sequence[float]) -> tuple[str, list[str]]:
    factor, unit = time_unit(min(seconds))
    return f"{name}, {unit}", [three_digits(factor * value) for value in seconds]


def _sizes(name: str, sizes: Sequence[float]) -> tuple[str, list[str]]:
    size, unit = size_unit(max(sizes))
    return f"{name}, {unit}", [f"{value / size:.4g}" for value in sizes]


def _timing(timing: Timing) -> dict[str, Any]:
    return {
        "seconds": timing.median,
        "low": timing.low,
        "high": timing.high,
        "samples": list(timing.samples),
        "method": timing.method,
    }
