# SPDX-License-Identifier: Apache-2.0
"""The command line: one module a command, and what they share."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import pagedattn

from .bench import bench_command
from .options import AsJson
from .replay import replay_command
from .shared import endings
from .tune import tune_command

app = typer.Typer(
    name="pagedattn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Boxes and colours only where someone looks at them.
    rich_markup_mode="rich" if sys.stdout is not None and sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("replay", short_help="Replay a trace of requests, and check every step.")(replay_command)
app.command("bench", short_help="Time attention of a shape on this machine.")(bench_command)
app.command("tune", short_help="Recommend a block size for what you serve.")(tune_command)


def run() -> None:
    """Run the command that the process was started with."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a µ that the locale lacks must not cost a result
    app(prog_name="pagedattn")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pagedattn {pagedattn.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Attention over a paged KV cache."""


@app.command(short_help="Say what was built and what this machine has.")
def info(
    as_json: AsJson = False,
) -> None:
    """Say what was built, what this machine has, and which kernel serves which case."""
    with endings("info"):
        pagedattn.show_config(as_json=as_json)
