# SPDX-License-Identifier: Apache-2.0
"""``pagedattn bench`` measures a shape on this machine, beside other people's attention."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pagedattn._device import Device, choose_backend
from pagedattn._progress import show_progress
from pagedattn._units import counted
from pagedattn.bench.cases import GROUPS, Case, CaseError, find_cases
from pagedattn.bench.lengths import FORMS, LengthsError, parse_lengths
from pagedattn.bench.measure import measure
from pagedattn.bench.peers import PEERS, find_peers
from pagedattn.bench.plot_page import PlotError, check_plot
from pagedattn.bench.report import print_report

from .options import AsJson, BackendName, BlockSize, DType, HeadDim, Heads, KvDType, KvHeads, Quick
from .shared import UsageError, check_writable, endings

_DEFAULT_LENGTHS = {"cpu": "8x4096", "cuda": "64x4096"}
_SHAPE = ("heads", "kv_heads", "head_dim", "block_size", "dtype", "kv_dtype", "causal")


def bench_command(
    ctx: typer.Context,
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            "--lengths",
            help=f"Tokens of each sequence: {FORMS}. May be given several times.",
            show_default="8x4096 on cpu, 64x4096 on cuda",
        ),
    ] = None,
    q_lens: Annotated[
        list[str] | None,
        typer.Option(
            "--q-lens",
            help="Query tokens of each sequence, in the same forms; one number is for all. `all` is a whole prefill.",
            show_default="1",
        ),
    ] = None,
    heads: Heads = 32,
    kv_heads: KvHeads = 8,
    head_dim: HeadDim = 128,
    block_size: BlockSize = 16,
    dtype: DType = "bfloat16",
    kv_dtype: KvDType = None,
    causal: Annotated[bool, typer.Option(help="A query token sees only what came before it.")] = True,
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"A named case, or a group of them ({', '.join(GROUPS)}), instead of a shape."),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(help=f"Measure a peer too: all, {', '.join(PEERS)}. May be given several times.")
    ] = None,
    backend: BackendName = "auto",
    quick: Quick = False,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the data.")] = 0,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the roofline with the cases on it (svg, png or pdf).", show_default=False)
    ] = None,
) -> None:
    """Time attention of a shape, as a share of what this machine gives, beside the peers that are installed.

    Each result is compared with float64 before it is timed. Exit code 1: ours was wrong; 2: an option was; 130
    after Ctrl-C.
    """
    with endings("bench", CaseError, LengthsError, PlotError):
        chosen, reason = choose_backend(backend)
        if case and (lengths or q_lens):
            raise UsageError("--case names whole cases: give it or --lengths and --q-lens, not both")
        shape = [name for name in _SHAPE if str(getattr(ctx.get_parameter_source(name), "name", "")) == "COMMANDLINE"]
        if case and shape:
            option = shape[0].replace("_", "-")
            raise UsageError(f"--case names whole cases: --{option} is for a shape of your own")
        if case:
            cases = find_cases(case)
        else:
            make = partial(
                Case,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                block_size=block_size,
                dtype=dtype,
                kv_dtype=kv_dtype or dtype,
                causal=causal,
            )
            cases = [make(*batch) for batch in _batches(lengths or [_DEFAULT_LENGTHS[chosen]], q_lens or ["1"], seed)]
        peers = find_peers(against or [])
        check_writable("--plot", plot)
        if plot is not None:
            check_plot(plot)
        print(f"bench: {counted(len(cases), 'case')} on the {chosen} backend ({reason})", file=sys.stderr)
        with show_progress("bench", "cases", len(cases), seconds_between_lines=0) as on_case:
            document = measure(cases, Device(chosen), peers, quick=quick, seed=seed, on_case=on_case)
        if as_json:
            print(json.dumps(document, indent=1))
        else:
            print_report(document)
        if plot is not None:
            from pagedattn.bench.plot import plot_roofline

            plot_roofline(document, plot)


def _batches(
    lengths: list[str], q_lens: list[str], seed: int
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name, lengths and query lengths of each batch that was asked for."""
    if len(q_lens) not in (1, len(lengths)):
        raise UsageError(
            f"--q-lens must be given once, or once for each of {len(lengths)} --lengths; got {len(q_lens)}"
        )
    for spec, q_spec in zip(lengths, q_lens * len(lengths) if len(q_lens) == 1 else q_lens, strict=True):
        kv = parse_lengths(spec, seed=seed, name="--lengths")
        q = kv if q_spec == "all" else parse_lengths(q_spec, seed=seed, name="--q-lens")
        if len(q) == 1:
            q *= len(kv)
        if len(q) != len(kv):
            raise UsageError(f"--q-lens {q_spec} names {len(q)} sequences, --lengths {spec} names {len(kv)}")
        yield (spec if q_spec == "1" else f"{q_spec}@{spec}"), kv, q
