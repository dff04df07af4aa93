# SPDX-License-Identifier: Apache-2.0
"""The command line: one module a command, and what they share."""

from __future__ import annotations

import sys

import typer

import pagedattn

from .bench import bench_command
from .options import AsJson
from .replay import replay_command
from .tune import tune_command

app = typer.Typer(
    name="pagedattn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Boxes and colours only where someone looks at them.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)
app.command("replay")(replay_command)
app.command("bench")(bench_command)
app.command("tune")(tune_command)


def run() -> None:
    """Run the command that the process was started with."""
    app(prog_name="pagedattn")


@app.callback()
def _main() -> None:
    """Attention over a paged KV cache."""


@app.command()
def info(
    as_json: AsJson = False,
) -> None:
    """Say what was built, what this machine has, and which kernel serves which case."""
    pagedattn.show_config(as_json=as_json)
