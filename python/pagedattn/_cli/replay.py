# SPDX-License-Identifier: Apache-2.0
"""``pagedattn replay`` runs a request trace."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pagedattn._device import choose_backend
from pagedattn._units import counted
from pagedattn.bench.plot_page import PlotError, check_ending
from pagedattn.replay import Report, Request, Settings, SettingsError, TraceError, read_trace, replay, synthetic_trace
from pagedattn.replay.progress import show_progress
from pagedattn.replay.settings import parse_bytes
from pagedattn.replay.synthetic import DEFAULT_REQUESTS

from .options import BackendName, BlockSize, HeadDim, Heads, KvDType, KvHeads, Layers
from .shared import WRONG_RESULT, check_requests, check_writable, endings, fail, signals


def replay_command(
    trace: Annotated[
        Path | None,
        typer.Argument(help="Mooncake JSONL or Azure CSV file; a made-up trace if none is named.", show_default=False),
    ] = None,
    backend: BackendName = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16.", show_default="float32 on cpu, float16 on cuda"),
    ] = None,
    kv_dtype: KvDType = None,
    layers: Layers = 2,
    heads: Heads = 8,
    kv_heads: KvHeads = 2,
    head_dim: HeadDim = 64,
    block_size: BlockSize = 16,
    num_blocks: Annotated[
        int | None, typer.Option(help="Blocks of the cache.", show_default="512, or room for the two longest")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Size of the cache instead of --num-blocks, such as 512MiB.", show_default=False),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Sequences that run at a time.")] = 32,
    chunk: Annotated[int, typer.Option(help="Prompt tokens computed in one step at most.")] = 512,
    requests: Annotated[
        int | None,
        typer.Option(help="The first N requests only.", show_default=f"all; {DEFAULT_REQUESTS} made-up ones"),
    ] = None,
    length_scale: Annotated[float, typer.Option(help="Multiplies every length.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Chooses tokens, vectors and the rows to verify.")] = 0,
    verify: Annotated[int, typer.Option(help="Rows of each step compared with a dense computation.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    svg: Annotated[
        Path | None, typer.Option(help="Draw the cache at its fullest into this file.", show_default=False)
    ] = None,
) -> None:
    """Replay a request trace through the block manager and the kernels, and check the results.

    Exit code 1 means that a result was wrong, 2 that an option or the trace was; 130 after Ctrl-C.
    """
    with endings("replay", SettingsError, TraceError, PlotError):
        chosen, reason = choose_backend(backend)
        settings = Settings(
            backend=chosen,
            dtype=dtype or ("float16" if chosen == "cuda" else "float32"),
            kv_dtype=kv_dtype,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            num_blocks=num_blocks,
            memory=None if memory is None else parse_bytes(memory),
            max_batch=max_batch,
            chunk=chunk,
            seed=seed,
            verify=verify,
        )
        check_writable("--svg", svg)
        if svg is not None and svg.suffix:  # none promises nothing: /dev/stdout
            check_ending("--svg", svg, (".svg",))
        work = _load(trace, requests, length_scale, seed)
        print(f"replay: {counted(len(work), 'request')} on the {chosen} backend ({reason})", file=sys.stderr)
        with signals() as received, show_progress(len(work)) as on_step:
            report = replay(work, settings, on_step=on_step, stop=lambda: bool(received), keep_layout=svg is not None)
        _print(report, as_json=as_json)
        if svg is not None:
            _draw(report, svg)
    if report.mismatch is not None:
        print(f"replay: {report.mismatch}", file=sys.stderr)
        raise typer.Exit(WRONG_RESULT)
    if received:
        raise typer.Exit(128 + received[0])
    if not report.completed:
        fail("replay", "no request was completed")


def _load(trace: Path | None, requests: int | None, length_scale: float, seed: int) -> list[Request]:
    check_requests(requests)
    if not 0 < length_scale < float("inf"):
        raise SettingsError(f"--length-scale must be a positive number; got {length_scale}")
    if trace is None:
        return synthetic_trace(requests or DEFAULT_REQUESTS, length_scale=length_scale, seed=seed)
    return read_trace(trace, requests=requests, length_scale=length_scale, seed=seed)


def _print(report: Report, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    elif sys.stdout.isatty():
        Console().print(report.rich())
    else:
        print(report.text())


def _draw(report: Report, path: Path) -> None:
    from pagedattn._svg import render

    if report.layout is None:
        print("replay: nothing ran, so there is nothing to draw", file=sys.stderr)
        return
    title = f"The paged cache at its fullest: {report.peak_blocks} of {report.num_blocks} blocks in use"
    path.write_text(render(report.layout, title=title), encoding="utf-8")
