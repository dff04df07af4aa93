# SPDX-License-Identifier: Apache-2.0
"""Runs cases: inputs, accuracy, then ours and the peers in turns, into one document."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import pagedattn
from pagedattn._device import Device

from .accuracy import PEER_ALLOWANCE, Reference, WrongResultError, check, reference_rows
from .cases import Case
from .ceilings import Ceilings, machine_facts, measure_ceilings
from .inputs import Inputs, check_memory
from .paged_roof import PagedRoof
from .peers import Peer, Prepared, UnsupportedError
from .timing import Timer, Timing, make_timer

OURS = "pagedattn"
_ROOF = ""  # among what is timed in turns
SCHEMA = 1


def measure(
    cases: Sequence[Case],
    device: Device,
    peers: Sequence[Peer] = (),
    *,
    quick: bool = False,
    seed: int = 0,
    on_case: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure cases on a device, ours beside the peers.

    Parameters
    ----------
    cases : sequence of Case
    device : Device
    peers : sequence of Peer
        A peer that is missing, cannot do a case, fails or is wrong is named with the reason; it never stops the run.
    quick : bool
        Few samples: to see that everything works.
    seed : int
        Of the inputs.
    on_case : callable, optional
        Called with how many cases are done and what is measured next.

    Returns
    -------
    dict
        Plain data for JSON: ``schema``, ``pagedattn``, ``date``, ``backend``, ``machine``, ``ceilings``, ``peers`` and
        ``cases``, times in seconds, rates in bytes and operations a second.  A decode case on the CPU has
        ``paged_read``, the rate of only reading its blocks, and each of its results ``paged_share``, what it reaches of
        that.

    Raises
    ------
    WrongResultError
        Our own result is wrong.
    CaseError
        A case does not fit into memory.
    """
    report = on_case or (lambda _done, _what: None)
    for case in cases:
        check_memory(case, device)
    missing = {peer.name: peer.missing(device.backend) for peer in peers}
    here = [peer for peer in peers if not missing[peer.name]]
    versions = {peer.name: peer.version() for peer in here}
    report(0, "ceilings")
    ceilings = measure_ceilings(device, quick=quick)
    timer = make_timer(device, quick=quick)
    rows = []
    for done, case in enumerate(cases):
        report(done, case.name)
        device.release()  # what the case before has left
        rows.append(_measure_case(case, device, here, ceilings, timer, seed))
    return {
        "schema": SCHEMA,
        "pagedattn": pagedattn.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": device.backend,
        "machine": machine_facts(device),
        "ceilings": ceilings.to_dict(),
        "peers": [
            {
                "name": peer.name,
                "title": peer.title,
                "version": versions.get(peer.name),
                "missing": missing[peer.name] or None,
            }
            for peer in peers
        ],
        "cases": rows,
    }


def _measure_case(
    case: Case, device: Device, peers: Sequence[Peer], ceilings: Ceilings, timer: Timer, seed: int
) -> dict[str, Any]:
    inputs = Inputs(case, device, seed)
    reference = reference_rows(inputs)
    ours = Prepared(inputs.attend(), inputs.out)
    calls, errors = {OURS: ours}, {OURS: check(inputs, ours.call, ours.out, reference)}
    reasons: dict[str, str] = {}
    for peer in peers:
        try:
            calls[peer.name], errors[peer.name] = _prepare(peer, inputs, reference)
        except (UnsupportedError, WrongResultError) as error:
            reasons[peer.name] = str(error)
        except Exception as error:
            # Whatever another project raises, its case has a reason and ours a time.
            reasons[peer.name] = _failure(error)
    device.synchronize_all()
    roof = PagedRoof(inputs) if device.backend == "cpu" and case.is_decode else None
    beside = {} if roof is None else {_ROOF: Prepared(roof, inputs.out)}
    timings = _time(timer, calls | beside, reasons)
    paged_rate = None if roof is None else roof.num_bytes / timings.pop(_ROOF).median
    results: list[dict[str, Any]] = []
    for name, timing in timings.items():
        # Once more: who answers only the first call has no time either.
        try:
            allowance = 1.0 if name == OURS else PEER_ALLOWANCE
            check(inputs, calls[name].call, calls[name].out, reference, allowance=allowance)
        except WrongResultError as error:
            if name == OURS:
                raise
            reasons[name] = f"after timing: {error}"
            continue
        host = _host_call(inputs, name, calls[name])
        host_time = None if host is None else timer.host_time(host)
        entry = {
            "peer": name,
            **_result(case, ceilings, timing),
            "error": errors[name],
            "host_seconds": None if host_time is None else host_time.least,
            "host_median": None if host_time is None else host_time.median,
        }
        if paged_rate is not None:
            entry["paged_share"] = case.bytes / paged_rate / timing.median
        results.append(entry)
    results += [{"peer": name, "reason": reason} for name, reason in reasons.items()]
    return {
        "name": case.name,
        "shape": case.shape,
        "kind": "decode" if case.is_decode else "prefill",
        "bytes": case.bytes,
        "flops": case.flops,
        "paged_read": paged_rate,
        "results": results,
    }


def _prepare(peer: Peer, inputs: Inputs, reference: Reference) -> tuple[Prepared, float]:
    prepared = peer.prepare(inputs)
    return prepared, check(inputs, prepared.call, prepared.out, reference, allowance=PEER_ALLOWANCE)


def _time(timer: Timer, calls: dict[str, Prepared], reasons: dict[str, str]) -> dict[str, Timing]:
    """Time all in turns; where a peer fails in that, ours alone, and each peer beside it that does not fail."""
    try:
        return timer.time(calls)
    except Exception:
        timings = timer.time({OURS: calls[OURS]})
    for name, prepared in calls.items():
        if name != OURS:
            try:
                timings |= timer.time({name: prepared})
            except Exception as error:
                reasons[name] = _failure(error)
    return timings


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]


def _result(case: Case, ceilings: Ceilings, timing: Timing) -> dict[str, Any]:
    seconds = timing.median
    least, bound = ceilings.bound(case)
    return {
        "seconds": seconds,
        "low": timing.low,
        "high": timing.high,
        "samples": list(timing.samples),
        "method": timing.method,
        "bytes_per_second": case.bytes / seconds,
        "flops_per_second": case.flops / seconds,
        "bound": bound,
        "share": least / seconds,
    }


def _host_call(inputs: Inputs, name: str, prepared: Prepared) -> Prepared | None:
    """What tells the host's cost of a call: on CUDA the call, which only enqueues.

    On the CPU, where a call is all host, it is ours with lengths of 0, which leaves checking, dispatching and starting
    the threads; not with many query tokens, whose outputs it would fill with zeros.
    """
    if inputs.device.backend == "cuda":
        return prepared
    if name != OURS or not inputs.case.is_decode:
        return None
    return Prepared(inputs.attend(seq_lens=np.zeros(len(inputs.case.kv_lens), np.int32)), inputs.out)
