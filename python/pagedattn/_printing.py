# SPDX-License-Identifier: Apache-2.0
"""Reports on standard output: colours and the terminal's width where there is one, plain text elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_WIDTH = 132  # of plain text, which nobody wraps; a table that needs more gets it


def table_width(table: Table, console: Console) -> int:
    """Columns in which nothing of a table is cut off, whatever the console's width."""
    return Measurement.get(console, console.options.update(width=1 << 16), table).maximum


def print_report(parts: Sequence[Text | Table], console: Console | None = None) -> None:
    """Print the parts of a report on a console, by default standard output."""
    console = console or Console()
    if console.is_terminal:
        console.print(Group(*parts))
        return
    width = max(_WIDTH, *(table_width(part, console) for part in parts if isinstance(part, Table)))
    plain = Console(file=io.StringIO(), width=width, no_color=True, highlight=False)
    with plain.capture() as capture:
        plain.print(Group(*parts))
    for line in capture.get().splitlines():
        print(line.rstrip(), file=console.file)
