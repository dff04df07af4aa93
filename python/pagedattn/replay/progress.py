# SPDX-License-Identifier: Apache-2.0
"""Live progress on a terminal, and a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from .engine import Progress

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REFRESHES = 0.1


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[Progress], None]]:
    """A callback for :func:`replay` that shows on standard error where it stands."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer()
        return
    columns = (
        TextColumn("requests"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, facts="")
        last = 0.0

        def update(progress: Progress) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_REFRESHES:
                last = now
                bar.update(task, completed=progress.requests_done, facts=_facts(progress))

        yield update


def _line_printer() -> Callable[[Progress], None]:
    last = time.monotonic()

    def update(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            done = f"{progress.requests_done}/{progress.requests} requests"
            print(f"replay: {done}  {_facts(progress)}", file=sys.stderr, flush=True)

    return update


def _facts(progress: Progress) -> str:
    rate = progress.tokens / max(progress.seconds, 1e-9)
    return (
        f"{rate:.0f} tokens/s  {progress.blocks_in_use}/{progress.num_blocks} blocks  "
        f"{100 * progress.hit_rate:.0f} % prefix hits"
    )
