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

import pagedattn
from pagedattn._device import BackendError
from pagedattn.bench.accuracy import WrongResultError

WRONG_RESULT, USAGE = 1, 2

_MAX_REQUESTS = 10**8  # more than published traces have


class UsageError(ValueError):
    """An option cannot be served; the message names it."""


@contextmanager
def endings(command: str, *refused: type[Exception]) -> Iterator[None]:
    """What ends a command early becomes a line on standard error and an exit code.

    Parameters
    ----------
    command : str
        What the line begins with.
    refused : exception types
        Of options and files that cannot be served, beside those of every command.
    """
    refusals: tuple[type[Exception], ...] = (UsageError, BackendError, pagedattn.PagedAttnError, OSError, *refused)
    try:
        yield
    except WrongResultError as error:
        print(f"{command}: wrong result: {error}", file=sys.stderr)
        raise typer.Exit(WRONG_RESULT) from None
    except refusals as error:
        fail(command, str(error))
    except MemoryError as error:
        fail(command, f"out of memory: {str(error) or 'ask for fewer or shorter sequences'}")
    except KeyboardInterrupt:
        print(f"{command}: stopped", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None


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


def check_requests(requests: int | None) -> None:
    """Refuse a --requests that is no number of requests."""
    if requests is not None and not 1 <= requests <= _MAX_REQUESTS:
        raise UsageError(f"--requests must be from 1 to {_MAX_REQUESTS}; got {requests}")


def check_writable(option: str, path: Path | None) -> None:
    """Refuse an output file that cannot be written before the work is done, not after it."""
    if path is None or path.is_char_device() or path.is_fifo():
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{option} must name a file in a directory that exists; got {path}")
    target = path.resolve()  # what a link points to
    existed = target.exists()
    try:
        target.open("ab").close()
    except OSError as error:
        raise UsageError(f"{option} must name a file that can be written; got {path}: {error.strerror}") from None
    if not existed:
        target.unlink()


def fail(command: str, message: str) -> NoReturn:
    """Say what is wrong with the request and leave."""
    print(f"{command}: {message}", file=sys.stderr)
    raise typer.Exit(USAGE)
