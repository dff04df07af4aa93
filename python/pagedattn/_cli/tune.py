# SPDX-License-Identifier: Apache-2.0
"""``pagedattn tune`` compares block sizes for a model and what it serves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pagedattn._device import Device, choose_backend
from pagedattn._printing import print_report
from pagedattn._progress import show_progress
from pagedattn._units import counted
from pagedattn.bench.cases import CaseError
from pagedattn.bench.lengths import FORMS, LengthsError, parse_lengths
from pagedattn.bench.plot_page import PlotError, check_plot
from pagedattn.bench.timing import make_timer
from pagedattn.replay import TraceError, read_trace
from pagedattn.tune import Model, TuneError, Workload, lengths_workload, trace_workload, tune
from pagedattn.tune.measure import DEFAULT_BATCH, DEFAULT_BLOCK_SIZES, DEFAULT_CHUNK, check_options, num_steps
from pagedattn.tune.plot import plot_trade

from .options import AsJson, BackendName, DType, HeadDim, Heads, KvDType, KvHeads, Layers, Quick
from .shared import UsageError, check_requests, check_writable, endings

_BLOCK_SIZES = ",".join(str(size) for size in DEFAULT_BLOCK_SIZES)


def tune_command(
    trace: Annotated[
        Path | None, typer.Argument(help="Mooncake JSONL or Azure CSV file; or give --lengths.", show_default=False)
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help=f"Tokens of running sequences instead of a trace: {FORMS}.", show_default=False),
    ] = None,
    heads: Heads = 32,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    layers: Layers = 32,
    dtype: DType = "bfloat16",
    kv_dtype: KvDType = None,
    block_sizes: Annotated[str, typer.Option(help="Block sizes to compare, joined by commas.")] = _BLOCK_SIZES,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Sequences decoded at a time.",
            show_default=f"{DEFAULT_BATCH['cpu']} on cpu, {DEFAULT_BATCH['cuda']} on cuda, fewer if memory is short",
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Prompt tokens computed in one call; a trace only.",
            show_default=f"{DEFAULT_CHUNK['cpu']} on cpu, {DEFAULT_CHUNK['cuda']} on cuda",
        ),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="The first N requests of the trace only.", show_default="all")
    ] = None,
    length_scale: Annotated[
        float | None, typer.Option(help="Multiplies every length of the trace.", show_default="1")
    ] = None,
    backend: BackendName = "auto",
    quick: Quick = False,
    seed: Annotated[int, typer.Option(min=0, help="Draws the batch and the data.")] = 0,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the trade into this file (svg, png or pdf).", show_default=False)
    ] = None,
) -> None:
    """Measure block sizes on the lengths that you serve, and recommend one.

    Each result is compared with float64 before it is timed. Exit code 1: a result was wrong; 2: an option was; 130
    after Ctrl-C.
    """
    with endings("tune", TuneError, CaseError, LengthsError, TraceError, PlotError):
        chosen, reason = choose_backend(backend)
        model = Model(heads, kv_heads, head_dim, layers, dtype, kv_dtype or dtype)
        sizes = _parse_sizes(block_sizes)
        check_options(sizes, batch, chunk)
        check_writable("--plot", plot)
        if plot is not None:
            check_plot(plot)
        work = _load(trace, lengths, requests, length_scale, chunk, seed)
        device = Device(chosen)
        print(f"tune: {counted(len(sizes), 'block size')} on the {chosen} backend ({reason})", file=sys.stderr)
        with show_progress("tune", "steps", num_steps(work, sizes), seconds_between_lines=0) as on_step:
            report = tune(
                work,
                model,
                device,
                make_timer(device, quick=quick),
                block_sizes=sizes,
                batch=batch,
                chunk=chunk,
                seed=seed,
                on_step=on_step,
            )
        if as_json:
            print(json.dumps(report.to_dict(), indent=2))
        else:
            print_report(report.parts())
        if plot is not None:
            plot_trade(report, plot)


def _parse_sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(f"--block-sizes must be whole numbers joined by commas, such as 16,64; got {text}")
    return [int(part) for part in parts]


def _load(
    trace: Path | None,
    lengths: str | None,
    requests: int | None,
    length_scale: float | None,
    chunk: int | None,
    seed: int,
) -> Workload:
    if (trace is None) == (lengths is None):
        raise UsageError("name a trace file or give --lengths" + ("" if trace is None else ", not both"))
    if lengths is not None:
        for option, value in (("--requests", requests), ("--length-scale", length_scale), ("--chunk", chunk)):
            if value is not None:
                raise UsageError(f"{option} is for a trace; --lengths has no requests")
        return lengths_workload(lengths, parse_lengths(lengths, seed=seed, name="--lengths"))
    assert trace is not None
    check_requests(requests)
    scale = 1.0 if length_scale is None else length_scale
    if not 0 < scale < float("inf"):
        raise UsageError(f"--length-scale must be a positive number; got {scale}")
    return trace_workload(trace.name, read_trace(trace, requests=requests, length_scale=scale, seed=seed))
