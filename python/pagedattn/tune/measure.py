# SPDX-License-Identifier: Apache-2.0
"""Measuring block sizes: the same batch in blocks of each size, timed in turns, and checked before it is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

import pagedattn
from pagedattn._device import Device
from pagedattn._units import show_bytes
from pagedattn.bench.accuracy import check, reference_rows
from pagedattn.bench.inputs import Inputs
from pagedattn.bench.peers.base import Prepared
from pagedattn.bench.timing import Timer, Timing

from .choice import MOST_NOISE
from .footprint import footprint, table_shape
from .model import Model, TuneError
from .report import Report, Row
from .workload import Ints, Workload

DEFAULT_BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
DEFAULT_BATCH = {"cpu": 32, "cuda": 64}
DEFAULT_CHUNK = {"cpu": 256, "cuda": 2048}
MAX_BLOCK_SIZE = 1 << 16
MAX_BATCH = 1 << 16
MAX_CHUNK = 1 << 20

_CPU_BYTES = 4 << 30  # of caches at a time, unless a batch was asked for
_MANAGER_STEPS = 32


def tune(
    work: Workload,
    model: Model,
    device: Device,
    timer: Timer,
    *,
    block_sizes: Sequence[int] = DEFAULT_BLOCK_SIZES,
    batch: int | None = None,
    chunk: int | None = None,
    seed: int = 0,
    on_step: Callable[[int, str], None] = lambda done, what: None,
) -> Report:
    """Measure block sizes on a workload and recommend one.

    Parameters
    ----------
    work : Workload
    model : Model
    device : Device
    timer : Timer
        Its clock.
    block_sizes : sequence of int
        What to compare, each once.
    batch : int, optional
        Sequences decoded at a time.  By default 32 (CPU) or 64 (CUDA), fewer where their caches would take too much.
    chunk : int, optional
        Prompt tokens computed in one call; by default 256 (CPU) or 2048 (CUDA).
    seed : int
        Draws the batch and fills the caches.
    on_step : callable
        Gets the number of steps done, of :func:`num_steps`, and what comes next.

    Raises
    ------
    TuneError
        An option is out of range, or there is too little memory.
    WrongResultError
        A kernel's result was wrong.
    """
    check_options(block_sizes, batch, chunk)
    sizes = sorted(block_sizes)
    rng = np.random.default_rng(seed)
    remarks: list[str] = []
    bench = _Bench(model, device, timer, sizes, seed, on_step)

    lengths = _draw_batch(bench, work, batch, rng, remarks)
    decode, errors = bench.time("decode", np.ones_like(lengths), lengths)
    prefill: dict[int, Timing] = {}
    chunks: list[tuple[int, int]] = []
    if work.shared is not None:
        device.release()
        q_lens, kv_lens = _draw_chunks(bench, work, chunk, rng, remarks)
        chunks = list(zip(q_lens.tolist(), kv_lens.tolist(), strict=True))
        prefill, prefill_errors = bench.time("prefill", q_lens, kv_lens)
        errors = {size: max(errors[size], prefill_errors[size]) for size in sizes}

    bench.note("the block manager")
    rows = []
    for size in sizes:
        rows.append(
            Row(
                block_size=size,
                decode=decode[size],
                prefill=prefill.get(size),
                manager_seconds=_manager_seconds(lengths, size),
                table_shape=table_shape(lengths, size),
                footprint=footprint(work, size),
                error=errors[size],
            )
        )
    report = Report(
        device=device.name,
        backend=device.backend,
        work=work,
        model=model,
        batch=lengths.tolist(),
        chunks=chunks,
        seed=seed,
        rows=rows,
        remarks=remarks,
    )
    noisiest = max(report.candidates(), key=lambda c: c.spread)
    if noisiest.spread > MOST_NOISE:
        remarks.append(
            f"the times of blocks of {noisiest.block_size} scatter by {100 * noisiest.spread:.0f} %: "
            "repeat this when the machine is quieter"
        )
    return report


def num_steps(work: Workload, block_sizes: Sequence[int]) -> int:
    """How many steps :func:`tune` reports."""
    return (1 if work.shared is None else 2) * (len(block_sizes) + 1) + 1


class _Bench:
    """What stays the same from one batch to the next."""

    def __init__(
        self,
        model: Model,
        device: Device,
        timer: Timer,
        sizes: Sequence[int],
        seed: int,
        on_step: Callable[[int, str], None],
    ) -> None:
        self.model, self.device, self.timer, self.sizes, self.seed = model, device, timer, sizes, seed
        self._on_step = on_step
        self._done = 0

    def note(self, what: str) -> None:
        self._on_step(self._done, what)
        self._done += 1

    def time(self, name: str, q_lens: Ints, kv_lens: Ints) -> tuple[dict[int, Timing], dict[int, float]]:
        """Times and errors of one batch, by block size."""
        calls: dict[str, Prepared] = {}
        errors: dict[int, float] = {}
        for size in self.sizes:
            self.note(f"{name}: blocks of {size}")
            inputs = Inputs(
                self.model.case(f"{name}, blocks of {size}", q_lens.tolist(), kv_lens.tolist(), size),
                self.device,
                self.seed,
            )
            call = inputs.attend()
            errors[size] = check(inputs, call, inputs.out, reference_rows(inputs))
            calls[str(size)] = Prepared(call, inputs.out)
        self.note(f"{name}: timing")
        timings = without_drift(self.timer.time(calls))
        return {size: timings[str(size)] for size in self.sizes}, errors

    def bytes_of(self, q_lens: Ints, kv_lens: Ints) -> NDArray[np.float64]:
        """Bytes that the first 1, 2, ... sequences take in all block sizes."""
        slots = sum(-(-kv_lens // size) * float(size) for size in self.sizes)
        queries = q_lens * float(self.model.query_bytes * len(self.sizes))
        return np.cumsum(slots * self.model.slot_bytes + queries)

    def fitting(self, q_lens: Ints, kv_lens: Ints, budget: float) -> int:
        """How many of the first sequences fit in all block sizes at a time."""
        return int(np.searchsorted(self.bytes_of(q_lens, kv_lens), budget, side="right"))

    def budget(self, *, asked: bool = False) -> float:
        """Bytes that the caches may take: half of what is free, so that whoever else is here can live."""
        free = self.device.free_memory()
        half = float("inf") if free is None else free / 2
        return half if asked or self.device.backend == "cuda" else min(half, _CPU_BYTES)


def without_drift(timings: dict[str, Timing]) -> dict[str, Timing]:
    """The same times as if the machine had been equally fast in every turn.

    Sample number k of each call was taken in the same turn; what the middle of a turn deviates from the middle of all
    turns is the machine's doing and is divided out.
    """
    if len(timings) < 3:  # with one or two calls, the middle of a turn is the calls' own doing
        return timings
    turns = min(len(timing.samples) for timing in timings.values())
    samples = np.array([timing.samples[:turns] for timing in timings.values()])
    own = samples / np.median(samples, axis=1, keepdims=True)
    drift = np.median(own, axis=0)
    steady = samples / drift
    return {
        name: Timing(tuple(row.tolist()), timing.method)
        for row, (name, timing) in zip(steady, timings.items(), strict=True)
    }


def check_options(block_sizes: Sequence[int], batch: int | None, chunk: int | None) -> None:
    """Raise a TuneError that names the option which is out of range."""
    if (
        not block_sizes
        or len(set(block_sizes)) < len(block_sizes)
        or not all(1 <= s <= MAX_BLOCK_SIZE for s in block_sizes)
    ):
        got = ",".join(str(size) for size in block_sizes)
        raise TuneError(f"--block-sizes must be different numbers from 1 to {MAX_BLOCK_SIZE}; got {got or 'none'}")
    for option, value, most in (("--batch", batch, MAX_BATCH), ("--chunk", chunk, MAX_CHUNK)):
        if value is not None and not 1 <= value <= most:
            raise TuneError(f"{option} must be from 1 to {most}; got {value}")


def _draw_batch(bench: _Bench, work: Workload, batch: int | None, rng: np.random.Generator, remarks: list[str]) -> Ints:
    lengths = work.decode_lengths(batch or min(DEFAULT_BATCH[bench.device.backend], work.num_steps), rng)
    ones = np.ones_like(lengths)
    budget = bench.budget(asked=batch is not None)
    kept = bench.fitting(ones, lengths, budget)
    if kept == len(lengths):
        return lengths
    if batch is not None or kept == 0:
        raise _too_large("decode", ones, lengths, bench, budget)
    remarks.append(
        f"a batch of {kept} sequences instead of {len(lengths)}, so that all block sizes fit {show_bytes(budget)} of "
        "memory; --batch sets it"
    )
    return lengths[:kept]


def _draw_chunks(
    bench: _Bench, work: Workload, chunk: int | None, rng: np.random.Generator, remarks: list[str]
) -> tuple[Ints, Ints]:
    q_lens, kv_lens = work.chunks(chunk or DEFAULT_CHUNK[bench.device.backend], rng)
    budget = bench.budget(asked=chunk is not None)
    kept = bench.fitting(q_lens, kv_lens, budget)
    if kept == 0:
        raise _too_large("prefill", q_lens, kv_lens, bench, budget)
    if kept < len(kv_lens):
        remarks.append(
            f"prefill of {kept} prompts instead of {len(kv_lens)}, so that all block sizes fit {show_bytes(budget)}"
        )
    return q_lens[:kept], kv_lens[:kept]


def _too_large(name: str, q_lens: Ints, kv_lens: Ints, bench: _Bench, budget: float) -> TuneError:
    needed = float(bench.bytes_of(q_lens, kv_lens)[-1])
    return TuneError(
        f"{name}: {len(kv_lens)} sequences of up to {kv_lens.max()} tokens take {show_bytes(needed)} in "
        f"{len(bench.sizes)} block sizes, and may take {show_bytes(budget)} here: ask for a smaller --batch, --chunk "
        "or --length-scale, or fewer --block-sizes"
    )


def _manager_seconds(lengths: Ints, block_size: int) -> float:
    """Time of the block manager in one decode step of the batch."""
    blocks = int((-(-(lengths + _MANAGER_STEPS) // block_size)).sum())
    columns = table_shape(lengths + _MANAGER_STEPS, block_size)[1]
    manager = pagedattn.BlockManager(blocks, block_size)
    seqs = [manager.add(np.full(length, index, np.int32)) for index, length in enumerate(lengths.tolist())]
    manager.step(seqs, lengths)
    out = pagedattn.StepBatch(len(seqs), columns, len(seqs))
    ones = np.ones(len(seqs), np.int32)
    samples = []
    for _ in range(_MANAGER_STEPS):
        begin = time.perf_counter()
        manager.append(seqs, ones)
        manager.step(seqs, ones, out)
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)
