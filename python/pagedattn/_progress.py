# SPDX-License-Identifier: Apache-2.0
"""Live progress on a terminal, and a line now and then where there is none; always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_REFRESHES = 0.1


@contextmanager
def show_progress(
    command: str, unit: str, total: int, *, seconds_between_lines: float = 10.0
) -> Iterator[Callable[[int, str], None]]:
    """A callback that takes how much is done and a few facts about it, and shows them.

    Parameters
    ----------
    command : str
        What a line begins with where there is no terminal.
    unit : str
        What is counted, in the plural.
    total : int
        How many of them there are.
    seconds_between_lines : float
        A line that comes earlier after the last one is left out.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(command, unit, total, seconds_between_lines)
        return
    columns = (
        TextColumn(unit),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
    )
    # No thread that redraws by itself: it would take time from what is being measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total, facts="")
        last = 0.0

        def update(done: int, facts: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_REFRESHES:
                last = now
                bar.update(task, completed=done, facts=facts, refresh=True)

        yield update


def _line_printer(command: str, unit: str, total: int, seconds: float) -> Callable[[int, str], None]:
    last = time.monotonic()

    def update(done: int, facts: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            print(f"{command}: {done}/{total} {unit}  {facts}", file=sys.stderr, flush=True)

    return update
