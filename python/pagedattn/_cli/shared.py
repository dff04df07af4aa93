# SPDX-License-Identifier: Apache-2.0
"""What the commands share: exit codes, signals, and where output may go."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer

WRONG_RESULT, USAGE = 1, 2


class UsageError(ValueError):
    """An option cannot be served; the message names it."""


@contextmanager
def signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the work after the current step; a second one ends the process at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        previous[each] = signal.signal(each, note)
    try:
        yield received
    finally:
        restore()


def check_writable(option: str, path: Path | None) -> None:
    """Refuse an output file that cannot be written before the work is done, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"{option} must name a file in a directory that exists; got {path}")


def fail(command: str, message: str) -> NoReturn:
    """Say what is wrong with the request and leave."""
    print(f"{command}: {message}", file=sys.stderr)
    raise typer.Exit(USAGE)
