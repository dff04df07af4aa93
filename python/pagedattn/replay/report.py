# SPDX-License-Identifier: Apache-2.0
"""What a replay found, as data, as plain text and as rich tables."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pagedattn
from pagedattn._units import show_bytes

from .settings import Settings
from .verify import Mismatch

_REFUSALS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a replay counted.  Fractions are of 1, times in seconds.

    Attributes
    ----------
    parts : dict
        Seconds by part; what is missing to `seconds` is scheduling and moving the step's small arrays.
    kv_bytes_read : int
        Keys and values that attention had to read: each call takes every sequence's whole cache once.
    waste_paged : float
        Empty slots among those of allocated blocks, over all steps.
    waste_at_max_length, waste_at_final_length : float
        The same had every sequence reserved contiguous room for the longest sequence of the trace, or for its own
        final length.
    hit_tokens : int
        Prompt tokens found in the prefix cache when their request was admitted.
    recomputed_tokens : int
        Tokens computed again after a preemption.
    largest_error : float
        Largest relative Euclidean error of a verified row.
    """

    settings: Settings
    device: str
    interrupted: bool
    mismatch: Mismatch | None
    requests: int
    completed: int
    refused: int
    refusals: list[str]
    prompt_tokens: int
    generated_tokens: int
    steps: int
    seconds: float
    parts: dict[str, float]
    kv_bytes_read: int
    num_blocks: int
    peak_blocks: int
    waste_paged: float
    waste_at_max_length: float
    waste_at_final_length: float
    max_length: int
    hit_tokens: int
    forks: int
    copies: int
    preemptions: int
    recomputed_tokens: int
    rows_verified: int
    largest_error: float
    tolerance: float
    layout: Any = dataclasses.field(repr=False, default=None)

    @property
    def time_split(self) -> dict[str, float]:
        """Seconds by part, the rest included."""
        return {**self.parts, "the rest": max(0.0, self.seconds - sum(self.parts.values()))}

    @property
    def manager_share(self) -> float:
        """Part of the whole time that was spent in the block manager's calls."""
        return self.parts["block manager"] / max(self.seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Prompt and generated tokens over the whole time."""
        return (self.prompt_tokens + self.generated_tokens) / max(self.seconds, 1e-9)

    @property
    def attention_bandwidth(self) -> float:
        """Bytes of keys and values that attention read a second."""
        return self.kv_bytes_read / max(self.parts["attention"], 1e-9)

    @property
    def hit_rate(self) -> float:
        """Part of the prompt tokens that the prefix cache held."""
        return self.hit_tokens / max(1, self.prompt_tokens)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON knows it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("layout", "parts"):
            del fields[name]
        fields["version"] = pagedattn.__version__
        fields["settings"] = dataclasses.asdict(self.settings)
        fields["mismatch"] = None if self.mismatch is None else _finite(dataclasses.asdict(self.mismatch))
        fields["seconds_by_part"] = self.time_split
        fields["block_manager_share"] = self.manager_share
        fields["tokens_per_second"] = self.tokens_per_second
        fields["kv_gigabytes_per_second"] = self.attention_bandwidth / 1e9
        fields["hit_rate"] = self.hit_rate
        return _finite(fields)

    def sections(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Titles with their rows of (name, value), for a reader."""
        return [
            ("Work", self._work()),
            ("Time", self._time()),
            ("Blocks", self._blocks()),
            ("Check", self._check()),
        ]

    def _work(self) -> list[tuple[str, str]]:
        requests = f"{self.completed} of {self.requests} completed"
        if self.refused:
            requests += f", {self.refused} refused"
        return [
            ("requests", requests + (", interrupted" if self.interrupted else "")),
            ("prompt tokens", f"{self.prompt_tokens}"),
            ("generated tokens", f"{self.generated_tokens}"),
            ("steps", f"{self.steps}"),
            ("tokens/s", f"{self.tokens_per_second:.0f}, prompt and generated"),
        ]

    def _time(self) -> list[tuple[str, str]]:
        total = max(self.seconds, 1e-9)
        rows = [("total", f"{self.seconds:.2f} s")]
        # Two decimals: the block manager's share is to be under 1 %.
        rows += [(part, f"{s:.2f} s  {100 * s / total:5.2f} %") for part, s in self.time_split.items()]
        rows.append(
            (
                "KV read by attention",
                f"{show_bytes(self.kv_bytes_read)}, {self.attention_bandwidth / 1e9:.2f} GB/s",
            )
        )
        return rows

    def _blocks(self) -> list[tuple[str, str]]:
        size = self.settings.block_size
        cache = show_bytes(self.num_blocks * self.settings.block_bytes)
        return [
            ("cache", f"{self.num_blocks} blocks of {size} tokens, {cache}"),
            ("peak in use", f"{self.peak_blocks} blocks, {_percent(self.peak_blocks / self.num_blocks)}"),
            ("waste, paged", f"{_percent(self.waste_paged)} of allocated slots (all steps)"),
            ("waste, contiguous at final length", f"{_percent(self.waste_at_final_length)}"),
            (
                "waste, contiguous at maximum length",
                f"{_percent(self.waste_at_max_length)} ({self.max_length} tokens each)",
            ),
            ("prefix-hit tokens", f"{self.hit_tokens}, {_percent(self.hit_rate)} of prompt tokens"),
            ("forked samples", f"{self.forks}"),
            ("copy-on-write copies", f"{self.copies} blocks"),
            ("preemptions", f"{self.preemptions}, {self.recomputed_tokens} tokens computed again"),
        ]

    def _check(self) -> list[tuple[str, str]]:
        if self.rows_verified == 0:
            return [("rows verified", "none")]
        error = f"{self.largest_error:.2e} (relative; allowed {self.tolerance:.0e})"
        return [("rows verified", f"{self.rows_verified}"), ("largest error", error)]

    def heading(self) -> str:
        """One line that says what ran where."""
        s = self.settings
        dtype = s.dtype if s.cache_dtype == s.dtype else f"{s.dtype} with {s.cache_dtype} cache"
        return (
            f"pagedattn replay on {self.device}: {s.layers} layers, {s.heads} heads, {s.kv_heads} KV heads of "
            f"{s.head_dim}, {dtype}"
        )

    def remarks(self) -> list[str]:
        """What the reader should not miss: the first refused requests."""
        lines = [f"refused: {reason}" for reason in self.refusals[:_REFUSALS_SHOWN]]
        hidden = len(self.refusals) - _REFUSALS_SHOWN
        if hidden > 0:
            lines.append(f"refused: {hidden} more")
        return lines

    def text(self) -> str:
        """The report as plain text."""
        lines = [self.heading()]
        for title, rows in self.sections():
            lines += ["", title]
            lines += [f"  {name:<36}{value}" for name, value in rows]
        remarks = self.remarks()
        if remarks:
            lines += ["", *remarks]
        return "\n".join(lines)

    def rich(self) -> Any:
        """The report as a rich renderable."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for title, rows in self.sections():
            table.add_row(Text(title, style="bold"), "")
            for name, value in rows:
                table.add_row(f"  {name}", Text(value))
        remarks = [Text(line, style="yellow") for line in self.remarks()]
        return Group(Text(self.heading(), style="bold"), Text(""), table, *remarks)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN.
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
