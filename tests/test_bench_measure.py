"""Measuring: inputs with poison, no time for a wrong answer, peers that may fail, and a document that says all of it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pagedattn
import pytest
from pagedattn import _core
from pagedattn._device import ELEMENT, STORAGE, Backend, Device
from pagedattn.bench import measure as measure_module
from pagedattn.bench.accuracy import WrongResultError, check, reference_rows
from pagedattn.bench.cases import LAYOUTS, Case, CaseError
from pagedattn.bench.ceilings import Ceilings, measure_ceilings
from pagedattn.bench.inputs import Inputs
from pagedattn.bench.measure import OURS, measure
from pagedattn.bench.paged_roof import PagedRoof, visible_blocks
from pagedattn.bench.peers import Peer, Prepared, UnsupportedError
from pagedattn.bench.report import microseconds, print_report, rate
from pagedattn.bench.timing import Timer, Timing, WallTimer
from rich.console import Console

CPU = Device("cpu")
SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 16, "block_size": 4}
CEILINGS = Ceilings(1e10, 2e10, 1e12, None, None, 5e-6)


def decode(dtype: str = "float32", kv_dtype: str | None = None) -> Case:
    return Case("decode", (9, 4, 1), (1, 1, 1), dtype=dtype, kv_dtype=kv_dtype or dtype, **SMALL)


def chunks(dtype: str = "float32") -> Case:
    return Case("chunks", (9, 30), (9, 17), dtype=dtype, kv_dtype=dtype, **SMALL)


# --- inputs and accuracy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3"),
     ("float16", "float8_e5m2"), ("float8_e4m3", "float8_e4m3"), ("float8_e5m2", "float8_e5m2")],
)  # fmt: skip
def test_inputs_are_shuffled_and_poisoned_and_our_answer_is_right(dtype: str, kv_dtype: str) -> None:
    case = decode(dtype, kv_dtype)
    inputs = Inputs(case, CPU)
    used = inputs.host_block_tables[inputs.host_block_tables >= 0]
    assert sorted(used) == list(range(case.num_blocks))
    assert (inputs.host_block_tables[2, 1:] == -1).all()
    last = inputs.host_block_tables[0, 2]
    for cache in (inputs.k_cache, inputs.v_cache):
        values = cache.astype(np.float32)
        assert np.isfinite(values[last, :1]).all()
        assert np.isnan(values[last, 1:]).all()
        assert np.isnan(values).sum() == (3 + 3) * 2 * 16  # of the first and the last sequence
    assert np.isnan(inputs.out.astype(np.float32)).all()
    error = check(inputs, inputs.attend(), inputs.out, reference_rows(inputs))
    assert 0 <= error < {"float32": 1e-6, "float16": 1e-3, "bfloat16": 4e-3}[case.out_dtype]


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, second, other = Inputs(chunks(), CPU, 1), Inputs(chunks(), CPU, 1), Inputs(chunks(), CPU, 2)
    assert np.array_equal(first.k_cache, second.k_cache, equal_nan=True)
    assert np.array_equal(first.q, second.q)
    assert not np.array_equal(first.q, other.q)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3"])
def test_blocks_laid_out_head_by_head_hold_the_same_tokens(kv_dtype: str) -> None:
    inputs, heads_first = (Inputs(replace(decode("bfloat16", kv_dtype), layout=layout), CPU) for layout in LAYOUTS)
    strides = heads_first.k_cache.strides
    assert strides[2] == inputs.case.block_size * strides[1]  # a head's tokens are neighbours
    for name in ("k_cache", "v_cache"):
        bits = (getattr(made, name).view(STORAGE[kv_dtype]) for made in (inputs, heads_first))
        np.testing.assert_array_equal(*bits)
    check(heads_first, heads_first.attend(), heads_first.out, reference_rows(heads_first))


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_is_asked_of_us_and_of_the_reference(causal: bool) -> None:
    case = replace(chunks(), window=3, causal=causal)
    inputs = Inputs(case, CPU)
    assert check(inputs, inputs.attend(), inputs.out, reference_rows(inputs)) < 1e-6
    without = Inputs(replace(case, window=None), CPU)
    with pytest.raises(WrongResultError):
        check(without, without.attend(), without.out, reference_rows(inputs))


@pytest.mark.parametrize("spoil", ["scaled", "row", "unwritten", "wrong block"])
def test_a_wrong_answer_is_seen(spoil: str) -> None:
    inputs = Inputs(chunks(), CPU)
    ours, reference = inputs.attend(), reference_rows(inputs)

    def wrong() -> None:
        if spoil == "wrong block":
            inputs.block_tables[1, 0] = inputs.block_tables[0, 0]
        ours()
        if spoil == "scaled":
            inputs.out *= np.float32(1.001)
        elif spoil == "row":
            inputs.out[0] = 0
        elif spoil == "unwritten":
            inputs.out[-1, -1, -1] = np.nan

    with pytest.raises(WrongResultError, match="chunks: "):
        check(inputs, wrong, inputs.out, reference)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(CaseError, match=r"huge: .* TiB, while .* are free"):
        Inputs(Case("huge", (1 << 32,), (1,)), CPU)


# --- clocks ------------------------------------------------------------------------------------------------------


def test_quartiles_and_median() -> None:
    timing = Timing((4.0, 1.0, 3.0, 2.0, 5.0), "wall clock")
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)
    assert (Timing((7.0,), "wall clock").low, Timing((7.0,), "wall clock").high) == (7.0, 7.0)


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []

    def spend(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            import time

            order.append(name)
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return call

    calls = {"slow": Prepared(spend("slow", 6e-3), None), "fast": Prepared(spend("fast", 3e-3), None)}
    timings = WallTimer(quick=True).time(calls)
    # At least what they take; a loaded machine may add to it.
    assert 6e-3 <= timings["slow"].median < 0.1
    assert 3e-3 <= timings["fast"].median < 0.1
    assert {len(timing.samples) for timing in timings.values()} == {5}
    assert order[-8:] == ["slow", "slow", "fast", "fast"] * 2  # the first of two is not timed


# --- ceilings ----------------------------------------------------------------------------------------------------


def test_the_larger_of_two_times_bounds_a_case() -> None:
    case = decode()
    seconds, bound = CEILINGS.bound(case)
    assert (seconds, bound) == (case.bytes / 1e10, "memory")
    assert Ceilings(1e15, 1.0, 1e6, None, None, 0.0).bound(case) == (case.flops / 1e6, "compute")


def test_a_small_footprint_is_held_against_the_cache_it_fits() -> None:
    ceilings = Ceilings(1e10, 1.0, 1.0, None, None, 0.0, {1 << 20: 9e10, 1 << 30: 1e10})
    assert ceilings.read_rate(1 << 19) == 9e10
    assert ceilings.read_rate(1 << 29) == 1e10
    assert CEILINGS.read_rate(1 << 19) == 1e10


def test_the_ceilings_of_this_machine_are_plausible() -> None:
    ceilings = measure_ceilings(CPU, quick=True)
    assert 1e8 < ceilings.read < 1e13
    assert 1e8 < ceilings.copy < 1e13
    assert 1e8 < ceilings.matmul < 1e14
    assert 1e-7 < ceilings.launch < 1e-2
    assert ceilings.host_to_device is None
    assert json.loads(json.dumps(ceilings.to_dict()))["read"] == ceilings.read


# --- the paged roof ----------------------------------------------------------------------------------------------


def test_the_paged_roof_reads_the_blocks_that_a_query_sees() -> None:
    case = replace(decode(), kv_lens=(90, 4, 1), window=20)
    inputs = Inputs(case, CPU)
    expected = []
    for row, kv_len in enumerate(case.kv_lens):
        seen = np.arange(max(0, kv_len - 20), kv_len) // case.block_size
        expected += list(inputs.host_block_tables[row, np.unique(seen)])
    assert visible_blocks(case, inputs.host_block_tables).tolist() == expected
    roof = PagedRoof(inputs)
    block_bytes = inputs.k_cache[0].nbytes + inputs.v_cache[0].nbytes
    assert roof.num_bytes % (block_bytes * len(expected)) == 0
    assert roof.num_bytes > (128 << 20)
    roof()


@pytest.mark.parametrize(
    "axes", [(0, 1, 2, 3, 4), (0, 1, 3, 2, 4), (1, 0, 2, 3, 4)], ids=["NHD", "HND", "side by side"]
)
def test_reading_blocks_leaves_nothing_out(rng: np.random.Generator, axes: tuple[int, ...]) -> None:
    shape = [2, 5, 4, 2, 8]
    words = rng.integers(0, 1 << 63, [shape[axis] for axis in axes], np.uint64)
    k_cache, v_cache = words.transpose(axes)
    blocks = np.array([3, 0, 3], np.int32)
    expected = sum(int(cache[block].sum(dtype=np.uint64)) for cache in (k_cache, v_cache) for block in blocks)
    assert _core.read_blocks(k_cache, v_cache, blocks, 1) == expected % 2**64
    assert _core.read_blocks(k_cache, v_cache, blocks, 3) == 3 * expected % 2**64


def test_reading_blocks_that_are_not_there_is_refused(rng: np.random.Generator) -> None:
    cache = rng.standard_normal((4, 16, 2, 8), np.float32)
    for bad in (-1, 4):
        with pytest.raises(pagedattn.InvalidArgumentError, match=rf"`blocks` must lie in 0 ... 3; got {bad}"):
            _core.read_blocks(cache, cache, np.array([0, bad], np.int32), 1)
    for gaps in (cache[:, ::2], cache[:, ::-1], cache[::-1], np.broadcast_to(cache[:1], cache.shape)):
        with pytest.raises(pagedattn.InvalidArgumentError, match="`v_cache` must hold at least one block"):
            _core.read_blocks(cache, gaps, np.array([0], np.int32), 1)
    with pytest.raises(pagedattn.InvalidArgumentError, match="`k_cache` must hold at least one block"):
        _core.read_blocks(cache[:0], cache, np.array([0], np.int32), 1)


# --- the whole ---------------------------------------------------------------------------------------------------


class FakeTimer(Timer):
    """Gives ours 2 ms, and others 1 ms."""

    def time(self, calls: Mapping[str, Prepared]) -> dict[str, Timing]:
        for prepared in calls.values():
            prepared.call()
        return {name: Timing((2e-3 if name == OURS else 1e-3,) * 3, "fake") for name in calls}

    def host_time(self, prepared: Prepared) -> Timing:
        prepared.call()
        return Timing((7e-6, 9e-6, 8e-6), "fake")


class FakePeer(Peer):
    name: ClassVar[str] = "fake"
    title: ClassVar[str] = "A fake"

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour

    def missing(self, backend: Backend) -> str:
        return "not installed: pip install fake" if self.behaviour == "missing" else ""

    def version(self) -> str:
        return "fake 1.0"

    def prepare(self, inputs: Inputs) -> Prepared:
        assert self.behaviour != "missing"
        if self.behaviour == "unsupported":
            raise UnsupportedError("lengths differ")
        if self.behaviour == "crashes":
            raise RuntimeError("out of luck\nand more")
        out = np.empty_like(inputs.out.view(STORAGE[inputs.case.dtype])).view(ELEMENT[inputs.case.dtype])
        ours = inputs.attend()
        calls = 0

        def call() -> None:
            nonlocal calls
            calls += 1
            if self.behaviour == "dies" and calls > 1:
                raise RuntimeError("the second call")
            ours()
            right = self.behaviour != "wrong" and not (self.behaviour == "once" and calls > 1)
            out[...] = inputs.out if right else 0

        return Prepared(call, out)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "measure_ceilings", lambda _device, quick: CEILINGS)
    monkeypatch.setattr(measure_module, "make_timer", lambda _device, quick: FakeTimer())


@pytest.mark.usefixtures("fast")
def test_ours_and_a_peer_in_one_document() -> None:
    seen: list[tuple[int, str]] = []
    document = measure([decode(), chunks()], CPU, [FakePeer("right")], on_case=lambda *what: seen.append(what))
    assert seen == [(0, "ceilings"), (0, "decode"), (1, "chunks")]
    assert json.loads(json.dumps(document)) == document
    assert document["peers"] == [{"name": "fake", "title": "A fake", "version": "fake 1.0", "missing": None}]
    assert document["pagedattn"] == pagedattn.__version__
    first, second = document["cases"]
    assert (first["kind"], second["kind"]) == ("decode", "prefill")
    ours, peer = first["results"]
    assert (ours["peer"], ours["seconds"], peer["peer"], peer["seconds"]) == ("pagedattn", 2e-3, "fake", 1e-3)
    assert ours["bytes_per_second"] == decode().bytes / 2e-3
    assert ours["share"] == pytest.approx(decode().bytes / 1e10 / 2e-3)
    # Reading the blocks alone took the roof 1 ms; only decode has one.
    assert first["paged_read"] == PagedRoof(Inputs(decode(), CPU)).num_bytes / 1e-3
    assert ours["paged_share"] == pytest.approx(decode().bytes / first["paged_read"] / 2e-3)
    assert peer["paged_share"] == pytest.approx(2 * ours["paged_share"])
    assert second["paged_read"] is None
    assert "paged_share" not in second["results"][0]
    assert 0 < ours["error"] < 1e-6
    assert peer["error"] == ours["error"]
    # A call on the CPU is all host: what it costs is measured without work, and not where filling `out` is work.
    assert (ours["host_seconds"], ours["host_median"]) == (7e-6, 8e-6)
    assert (peer["host_seconds"], peer["host_median"]) == (None, None)
    assert second["results"][0]["host_seconds"] is None


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("unsupported", "lengths differ"),
        ("crashes", "failed: RuntimeError: out of luck"),
        ("wrong", "relative error 1"),
        ("dies", "failed: RuntimeError: the second call"),
        ("once", "after timing: decode: relative error 1"),
    ],
)
def test_a_peer_without_an_answer_has_a_reason_and_no_time(behaviour: str, reason: str) -> None:
    document = measure([decode()], CPU, [FakePeer(behaviour)])
    ours, peer = document["cases"][0]["results"]
    assert ours["seconds"] == 2e-3
    assert set(peer) == {"peer", "reason"}
    assert reason in peer["reason"]
    assert "\n" not in peer["reason"]


@pytest.mark.usefixtures("fast")
def test_a_missing_peer_is_named() -> None:
    document = measure([decode()], CPU, [FakePeer("missing")])
    assert document["peers"][0]["missing"] == "not installed: pip install fake"
    assert document["peers"][0]["version"] is None
    assert len(document["cases"][0]["results"]) == 1
    text = report(document)
    assert "A fake is not here: not installed: pip install fake" in text


@pytest.mark.usefixtures("fast")
def test_ours_wrong_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagedattn, "paged_attention", lambda *_arrays, out, **_options: out.fill(0))
    with pytest.raises(WrongResultError):
        measure([decode()], CPU)


def report(document: dict[str, Any]) -> str:
    file = io.StringIO()
    print_report(document, Console(file=file))
    return file.getvalue()


@pytest.mark.usefixtures("fast")
def test_the_report_is_plain_text_without_a_terminal() -> None:
    text = report(measure([decode(), chunks()], CPU, [FakePeer("right")]))
    lines = text.splitlines()
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in lines)
    assert "read 10 GB/s, copy 20 GB/s (both ways counted), matmul 1 TFLOP/s, an empty call 5.00 µs" in lines[1]
    ours = next(line for line in lines if line.strip().startswith("decode"))
    assert ours.split()[:3] == ["decode", "pagedattn", "2000"]
    assert "1.00" in ours.split()
    peer = next(line for line in lines if "A fake  " in line)
    assert "1000" in peer.split()
    assert "0.50" in peer.split()


def document_with(name: str, title: str, *others: str) -> dict[str, Any]:
    result = {"low": 14.1e-6, "high": 14.9e-6, "share": 0.82, "bound": "compute", "error": 1.7e-3, "paged_share": 0.5}
    result |= {"seconds": 14.5e-6, "host_seconds": 2e-6, "host_median": 2.1e-6}
    names = ["pagedattn", *(f"peer{i}" for i in range(len(others)))]
    return {
        "pagedattn": "1.0", "backend": "cpu", "machine": {"device": title},
        "ceilings": {"read": 1e10, "copy": 1e10, "matmul": 1e11, "host_to_device": None, "launch": 2e-6},
        "peers": [{"name": n, "title": t, "missing": "", "version": t} for n, t in zip(names[1:], others, strict=True)],
        "cases": [{"name": name, "flops": 1e6, "bytes": 1e4, "results": [{**result, "peer": n} for n in names]}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("width", "peers", "missing"),
    [
        (120, (), None),
        (100, (), "host µs"),
        (80, (), "host µs, error, quartiles"),
        (80, ("torch SDPA, contiguous KV",), "host µs, error, quartiles, of paged roof"),
    ],
)
def test_a_narrow_terminal_gets_fewer_columns_and_no_number_is_cut_off(
    width: int, peers: tuple[str, ...], missing: str | None
) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    print_report(document_with("dec_1x64", "a processor", *peers), console)
    text = file.getvalue()
    assert "…" not in text
    row = next(line for line in text.splitlines() if line.strip().startswith("dec_1x64"))
    for part in ("pagedattn", "14.5", "69 GFLOP/s", "82 %"):
        assert part in row
    assert ("1.00" in row) == bool(peers)
    if missing is None:
        assert "not shown" not in text
    else:
        assert f"not shown, for want of width: {missing};" in " ".join(text.split())


def test_plain_text_is_as_wide_as_its_table() -> None:
    name = "+".join(f"uniform:{i}:1024:2048" for i in range(10, 20))
    row = next(line for line in report(document_with(name, "a processor")).splitlines() if line.startswith(name))
    assert row.endswith("2.00..2.10")


def test_numbers_are_for_people() -> None:
    assert [microseconds(s) for s in (4.612e-6, 12.44e-6, 99.96e-6, 2860.4e-6)] == ["4.61", "12.4", "100", "2860"]
    assert [rate(v, "B") for v in (12.0, 3.114e12, 89.46e9, 2.5e15)] == [
        "12 B/s",
        "3.11 TB/s",
        "89.5 GB/s",
        "2500 TB/s",
    ]
