# SPDX-License-Identifier: Apache-2.0
"""``python -m pagedattn`` and the ``pagedattn`` command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What the `cli` extra brings; anything else that is missing is a fault and keeps its traceback.
_EXTRA = ("typer", "rich")


@contextmanager
def _quiet_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process at once: while modules are imported there is nothing to clean up.

    An exception would not do, for a compiled module makes an ImportError of it.
    """
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler:  # ignored, say, in the background of a script
        yield
        return
    signal.signal(signal.SIGINT, lambda number, _frame: os._exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def main() -> None:
    """Run the command line."""
    if sys.stdout is None:
        print("pagedattn: standard output is closed; >/dev/null discards it", file=sys.stderr)
        sys.exit(2)
    try:
        with _quiet_ctrl_c():
            from pagedattn._cli import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        sys.exit(f"pagedattn: the command line needs {missing}: pip install 'pagedattn[cli]'")
    try:
        run()
    except KeyboardInterrupt:  # before a command has begun, or after its end
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
