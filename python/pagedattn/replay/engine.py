# SPDX-License-Identifier: Apache-2.0
"""How a step runs: copy what must be copied, and in each layer write the new keys and values, then attend.

One ragged ``paged_attention`` call a layer serves the prefill chunks and the decoding sequences together.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pagedattn
from pagedattn import BlockManager, StepBatch
from pagedattn._device import ELEMENT, STORAGE, Device

from .caches import make_caches
from .clock import Clock
from .model import Model
from .occupancy import Occupancy
from .report import Report
from .scheduler import Scheduler, Sequence, Step
from .settings import Settings
from .traces import Request
from .verify import TOLERANCE, Mismatch, dense_row, relative_error


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a replay stands."""

    requests_done: int
    requests: int
    tokens: int
    seconds: float
    blocks_in_use: int
    num_blocks: int
    hit_rate: float


@dataclass(slots=True)
class _Probe:
    """A result that will be compared with the dense computation."""

    sequence: Sequence
    row: int
    position: int
    layer: int
    head: int
    actual: NDArray[np.float64] | None = None


def replay(
    requests: SequenceOf[Request],
    settings: Settings,
    *,
    on_step: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    keep_layout: bool = False,
) -> Report:
    """Run a trace to its end, to the first wrong result, or until `stop` says so.

    Parameters
    ----------
    requests : sequence of Request
        The trace, at least one request; see :func:`read_trace` and :func:`synthetic_trace`.
    settings : Settings
        The model's shape, the cache's size and the limits.
    on_step : callable, optional
        Told after each step where the replay stands.
    stop : callable, optional
        Asked before each step; true ends the replay, and the report covers what was done.
    keep_layout : bool
        Keep the block manager's layout at the fullest moment in the report.

    Returns
    -------
    Report
        With `mismatch` set if a row differed from the dense computation.

    Raises
    ------
    SettingsError
        If the backend is not there or the cache does not fit into memory.

    Examples
    --------
    >>> from pagedattn.replay import Settings, replay, synthetic_trace
    >>> report = replay(synthetic_trace(3, length_scale=0.1), Settings(layers=1, num_blocks=64))
    >>> report.completed, report.mismatch
    (3, None)
    """
    engine = Engine(requests, settings)
    interrupted = False
    while engine.mismatch is None:
        if stop is not None and stop():
            interrupted = True
            break
        if not engine.step(keep_layout=keep_layout):
            break
        if on_step is not None:
            on_step(engine.progress())
    return engine.report(interrupted=interrupted)


class Engine:
    """The caches, the model, the scheduler, and what is counted while they run."""

    def __init__(self, requests: SequenceOf[Request], settings: Settings) -> None:
        self.mismatch: Mismatch | None = None
        self._requests = len(requests)
        self._settings = settings
        self._max_length = max(request.final_length for request in requests)
        num_blocks = settings.pool_size(self._max_length)
        self._device = Device(settings.backend)
        self._caches = make_caches(self._device, settings, num_blocks)
        self._model = Model(settings, self._device)
        self.manager = BlockManager(num_blocks, settings.block_size)
        self._rng = np.random.default_rng([settings.seed, 0x5EED])
        rows = (settings.rows(num_blocks), settings.heads, settings.head_dim)
        out = self._device.xp.empty(rows, STORAGE[settings.dtype])
        self._out = out.view(ELEMENT[settings.dtype])
        scale = self._model.kv_scale
        self._cache_options: dict[str, Any] = (
            {"kv_dtype": settings.kv_dtype, "k_scale": scale, "v_scale": scale} if settings.quantised else {}
        )
        self._steps = 0
        self._kv_bytes = 0
        self._copies = 0
        self._rows_verified = 0
        self._largest_error = 0.0
        self._occupancy = Occupancy(settings.block_size)
        self._layout: Any = None
        self._clock = Clock(self._device.synchronize)
        widest = min(num_blocks, settings.blocks(self._max_length))
        batch = StepBatch(settings.max_batch, widest, settings.rows(num_blocks))
        self._scheduler = Scheduler(requests, settings, self.manager, batch, self._clock)

    def step(self, *, keep_layout: bool = False) -> bool:
        """Run one step; false if the trace is done."""
        step = self._scheduler.next_step()
        if step is None:
            return False
        self._steps += 1
        if self._record_occupancy(step) and keep_layout:
            self._layout = self.manager.layout()
        probes = self._choose_probes(step)
        self._execute(step, probes)
        with self._clock("verification"):
            self._judge(probes)
        self._scheduler.commit(step)
        return True

    def _record_occupancy(self, step: Step) -> bool:
        running = self._scheduler.running
        stored = {s.id: s.computed for s in running}
        own_tail = {s.id for s in running if not s.shares_tail}
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            stored[sequence.id] += count
            # Its first write after a fork has copied the block it shared.
            own_tail.add(sequence.id)
        return self._occupancy.record(
            in_use=self.manager.num_blocks - self.manager.num_free_blocks,
            stored=stored.values(),
            own=[stored[name] for name in own_tail],
            final=[len(s.tokens) for s in running],
        )

    def _execute(self, step: Step, probes: list[_Probe]) -> None:
        settings, put = self._settings, self._device.put
        arrays = step.arrays
        pairs = zip(step.sequences, step.counts, strict=True)
        digests = put(np.concatenate([s.digests[s.computed : s.computed + n] for s, n in pairs]))
        tables, lengths = put(arrays.block_tables), put(arrays.seq_lens)
        starts, slots = put(arrays.query_start_loc), put(arrays.slot_mapping)
        self._kv_bytes += int(arrays.seq_lens.sum(dtype=np.int64)) * settings.token_bytes * settings.layers
        if len(arrays.copies):
            self._copies += len(arrays.copies)
            with self._clock("cache writes"):
                pagedattn.copy_blocks([cache for pair in self._caches for cache in pair], put(arrays.copies))
        out = self._out[: len(digests)]
        for layer, (k_cache, v_cache) in enumerate(self._caches):
            with self._clock("making vectors"):
                q, k, v = self._model.project(digests, layer)
            with self._clock("cache writes"):
                pagedattn.reshape_and_cache(k, v, k_cache, v_cache, slots, **self._cache_options)
            with self._clock("attention"):
                pagedattn.paged_attention(
                    q, k_cache, v_cache, tables, lengths, query_start_loc=starts, out=out, **self._cache_options
                )
            with self._clock("verification"):
                for probe in probes:
                    if probe.layer == layer:
                        probe.actual = self._row(out, probe)

    def _row(self, out: Any, probe: _Probe) -> NDArray[np.float64]:
        bits = out[probe.row, probe.head].view(STORAGE[self._settings.dtype])
        row: NDArray[np.float64] = self._device.get(bits).view(ELEMENT[self._settings.dtype]).astype(np.float64)
        return row

    def _choose_probes(self, step: Step) -> list[_Probe]:
        settings, draw = self._settings, self._rng.integers
        ends = np.cumsum(step.counts)
        probes = []
        for row in draw(ends[-1], size=settings.verify):
            which = int(np.searchsorted(ends, row, side="right"))
            sequence = step.sequences[which]
            position = sequence.computed + int(row - ends[which]) + step.counts[which]
            probes.append(_Probe(sequence, int(row), position, int(draw(settings.layers)), int(draw(settings.heads))))
        return probes

    def _judge(self, probes: list[_Probe]) -> None:
        tolerance = TOLERANCE[self._settings.dtype]
        for probe in probes:
            assert probe.actual is not None
            digests = probe.sequence.digests[: probe.position + 1]
            exact = dense_row(self._model, self._settings, digests, probe.layer, probe.head)
            error = relative_error(probe.actual, exact)
            self._rows_verified += 1
            # Written so that a NaN is a mismatch.
            if error <= tolerance:
                self._largest_error = max(self._largest_error, error)
                continue
            self._largest_error = error
            self.mismatch = Mismatch(
                step=self._steps,
                request=probe.sequence.request.index,
                sample=probe.sequence.sample,
                sequence=probe.sequence.id,
                position=probe.position,
                layer=probe.layer,
                head=probe.head,
                error=error,
                tolerance=tolerance,
            )
            return

    def progress(self) -> Progress:
        """Where the replay stands."""
        counts = self._scheduler.counts
        return Progress(
            requests_done=counts.completed + counts.refused,
            requests=self._requests,
            tokens=counts.prompt_tokens + counts.generated_tokens,
            seconds=self._clock.elapsed,
            blocks_in_use=self.manager.num_blocks - self.manager.num_free_blocks,
            num_blocks=self.manager.num_blocks,
            hit_rate=counts.hit_tokens / max(1, counts.prompt_tokens),
        )

    def report(self, *, interrupted: bool) -> Report:
        """What was done so far."""
        counts, occupancy = self._scheduler.counts, self._occupancy
        return Report(
            settings=self._settings,
            device=self._device.name,
            interrupted=interrupted,
            mismatch=self.mismatch,
            requests=self._requests,
            completed=counts.completed,
            refused=counts.refused,
            refusals=counts.refusals,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            steps=self._steps,
            seconds=self._clock.elapsed,
            parts=dict(self._clock.seconds),
            kv_bytes_read=self._kv_bytes,
            num_blocks=self.manager.num_blocks,
            peak_blocks=occupancy.peak_blocks,
            waste_paged=occupancy.waste_paged,
            waste_at_max_length=occupancy.waste_at_length(self._max_length),
            waste_at_final_length=occupancy.waste_at_final_length,
            max_length=self._max_length,
            hit_tokens=counts.hit_tokens,
            forks=counts.forks,
            copies=self._copies,
            preemptions=counts.preemptions,
            recomputed_tokens=counts.recomputed_tokens,
            rows_verified=self._rows_verified,
            largest_error=self._largest_error,
            tolerance=TOLERANCE[self._settings.dtype],
            layout=self._layout,
        )
