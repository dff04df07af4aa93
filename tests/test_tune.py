"""Choosing a block size: the rule, the arithmetic of footprints, what a prefix cache finds, and the command.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pagedattn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagedattn._cli import app
from pagedattn._device import Device
from pagedattn.bench.accuracy import WrongResultError
from pagedattn.bench.peers.base import Prepared
from pagedattn.bench.timing import Timer, Timing
from pagedattn.replay import Request, read_trace, synthetic_trace
from pagedattn.tune import Candidate, Model, TuneError, Workload, choose, lengths_workload, trace_workload, tune
from pagedattn.tune.footprint import footprint, table_shape
from pagedattn.tune.measure import num_steps, without_drift
from pagedattn.tune.sharing import found_tokens, shared_prefixes
from typer.testing import CliRunner

TINY = Model(heads=2, kv_heads=1, head_dim=16, layers=2, dtype="float32", kv_dtype="float32")
TINY_SHAPE = ["--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--layers", "2", "--dtype", "float32"]
TINY_OPTIONS = [*TINY_SHAPE, "--backend", "cpu", "--quick"]


class FakeTimer(Timer):
    """Gives each block size the time that it is told to."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.seconds = seconds
        self.calls: list[list[str]] = []

    def time(self, calls: Mapping[str, Prepared]) -> dict[str, Timing]:
        self.calls.append(list(calls))
        return {name: Timing((self.seconds[int(name)],) * 5, "told") for name in calls}

    def host_time(self, prepared: Prepared) -> Timing:
        raise NotImplementedError


def candidate(block_size: int, seconds: float, held: float, spread: float = 0.0) -> Candidate:
    return Candidate(block_size, seconds, seconds * (1 - spread / 2), seconds * (1 + spread / 2), held)


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_of_equally_fast_sizes_the_one_with_the_least_cache_is_taken() -> None:
    choice = choose([candidate(16, 1.02, 100), candidate(64, 1.0, 110), candidate(256, 1.01, 150)])
    assert choice.block_size == 16
    assert "2.0 % more than the fastest (64)" in choice.reason
    assert "Blocks of 64 hold 10.0 % more" in choice.reason


def test_a_size_that_is_slower_than_noise_is_not_taken_however_little_it_holds() -> None:
    choice = choose([candidate(8, 1.2, 50), candidate(16, 1.0, 100), candidate(32, 1.0, 120)])
    assert choice.block_size == 16
    assert "the shortest time" in choice.reason
    assert "Blocks of 8 take 20.0 % longer" in choice.reason


def test_within_one_percent_of_footprint_the_larger_block_wins() -> None:
    choice = choose([candidate(8, 1, 1000), candidate(16, 1, 1003), candidate(32, 1, 1009), candidate(64, 1, 1030)])
    assert choice.block_size == 32
    assert "Blocks of 16 hold 0.6 % less, with tables twice as long" in choice.reason
    assert "blocks of 64 hold 2.1 % more" in choice.reason


def test_shorter_tables_are_not_bought_with_a_slower_measurement() -> None:
    choice = choose([candidate(16, 1.0, 1000, 0.1), candidate(32, 1.05, 1005, 0.1), candidate(64, 1.0, 1100, 0.1)])
    assert choice.block_size == 16
    assert "Blocks of 32 take 5.0 % longer and hold 0.5 % more" in choice.reason


def test_a_faster_size_that_holds_too_much_is_not_said_to_take_longer() -> None:
    choice = choose([candidate(16, 1.02, 1000), candidate(32, 1.02, 1005), candidate(64, 1.0, 1014)])
    assert choice.block_size == 32
    assert choice.reason.endswith("blocks of 64 hold 0.9 % more.")


def test_noise_is_the_quartile_spread_but_neither_below_3_nor_above_10_percent() -> None:
    def taken(difference: float, spread: float) -> int:
        return choose([candidate(16, 1 + difference, 100, spread), candidate(64, 1, 200, spread)]).block_size

    assert [taken(d, 0.0) for d in (0.029, 0.031)] == [16, 64]
    assert [taken(d, 0.07) for d in (0.06, 0.08)] == [16, 64]
    assert [taken(d, 0.50) for d in (0.09, 0.11)] == [16, 64]


def test_one_candidate_is_the_choice_and_none_is_an_error() -> None:
    assert choose([candidate(16, 1, 1)]).block_size == 16
    with pytest.raises(ValueError, match="at least one"):
        choose([])


@given(
    st.dictionaries(
        st.sampled_from([2**k for k in range(12)]),
        st.tuples(st.floats(1e-6, 10), st.floats(1, 1e12), st.floats(0, 1)),
        min_size=1,
    ),
    st.randoms(),
)
def test_the_choice_is_fast_and_light_whatever_the_order(rows, random) -> None:
    candidates = [candidate(size, *row) for size, row in rows.items()]
    choice = choose(candidates)
    best = next(c for c in candidates if c.block_size == choice.block_size)
    fastest = min(c.seconds for c in candidates)
    assert best.seconds <= 1.1 * fastest * (1 + 1e-9)
    fast_for_sure = [c for c in candidates if c.seconds <= 1.03 * fastest]
    assert best.held_bytes <= 1.01 * min(c.held_bytes for c in fast_for_sure) * (1 + 1e-9)
    random.shuffle(candidates)
    assert choose(candidates) == choice


# --- footprints -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=8),
    st.integers(1, 50),
)
def test_a_footprint_is_the_mean_over_all_decode_steps(requests: list[tuple[int, int, int]], size: int) -> None:
    prompts, outputs, shared = (np.array(column, np.int64) for column in zip(*requests, strict=True))
    shared = np.minimum(shared, prompts)
    allocated, used, found = [], [], []
    for prompt, output, common in zip(prompts, outputs, shared, strict=True):
        for length in range(prompt + 1, prompt + output + 1):
            allocated.append(size * math.ceil(length / size))
            used.append(length)
            found.append(min(common, prompt - 1) // size * size)
    taken = footprint(Workload("", prompts, outputs, shared), size)
    assert taken.allocated_slots == pytest.approx(np.mean(allocated))
    assert taken.used_slots == pytest.approx(np.mean(used))
    assert taken.held_slots == pytest.approx(np.mean(allocated) - np.mean(found))
    assert taken.blocks == pytest.approx(np.mean(allocated) / size)
    assert taken.waste == pytest.approx(1 - sum(used) / sum(allocated))
    cached = np.minimum(shared, prompts - 1) // size * size
    assert taken.found == pytest.approx(cached.sum() / prompts.sum())
    assert taken.computed_tokens == pytest.approx((prompts - cached).mean())


def test_plain_lengths_are_met_as_they_are_and_have_no_prompts() -> None:
    work = lengths_workload("", [1, 16, 17])
    assert sorted(work.decode_lengths(3, np.random.default_rng(0))) == [1, 16, 17]
    taken = footprint(work, 16)
    assert taken.allocated_slots == pytest.approx((16 + 16 + 32) / 3)
    assert taken.waste == pytest.approx(1 - 34 / 64)
    assert taken.found is None
    assert set(work.decode_lengths(100, np.random.default_rng(0))) == {1, 16, 17}


def test_very_long_sequences_do_not_overflow() -> None:
    count = 100_000
    work = Workload("", np.full(count, 10**7), np.full(count, 10**7), np.zeros(count, np.int64))
    taken = footprint(work, 1)
    assert taken.allocated_slots == taken.used_slots == pytest.approx(1.5e7, rel=1e-6)


def test_a_table_has_a_row_a_sequence_and_the_longest_ones_blocks() -> None:
    assert table_shape(np.array([1, 33, 32]), 16) == (3, 3)
    assert table_shape(np.array([1, 33, 32]), 64) == (3, 1)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=6), st.integers(0, 9))
def test_a_drawn_length_is_one_of_a_request_while_it_decodes(requests: list[tuple[int, int]], seed: int) -> None:
    prompts, outputs = (np.array(column, np.int64) for column in zip(*requests, strict=True))
    work = Workload("", prompts, outputs, np.zeros_like(prompts))
    every_step = [p + g for p, o in requests for g in range(1, o + 1)]
    assert sorted(work.decode_lengths(work.num_steps, np.random.default_rng(seed))) == sorted(every_step)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_drawn_chunks_fill_a_call_with_parts_of_prompts(
    requests: list[tuple[int, int]], tokens: int, seed: int
) -> None:
    prompts, shared = (np.array(column, np.int64) for column in zip(*requests, strict=True))
    work = Workload("", prompts, np.ones_like(prompts), np.minimum(shared, prompts))
    starts = np.minimum(work.shared, prompts - 1)
    q_lens, kv_lens = work.chunks(tokens, np.random.default_rng(seed))
    assert q_lens.sum() == min(tokens, (prompts - starts).sum())
    for new, length in zip(q_lens.tolist(), kv_lens.tolist(), strict=True):
        begin = length - new
        assert any(
            start <= begin and (begin - start) % tokens == 0 and length <= prompt
            for prompt, start in zip(prompts.tolist(), starts.tolist(), strict=True)
        )


# --- sharing ----------------------------------------------------------------------------------------------------------

# Two that share 512 tokens, one that is the start of the first, one that repeats it, and one on its own.
MOONCAKE = (
    (1000, 4, [1, 2]),
    (700, 4, [1, 3]),
    (600, 4, [1, 2]),
    (1000, 4, [1, 2]),
    (100, 4, [9]),
)
# Of the second prompt 512 tokens, of the third 599 (never the last one), of the fourth 999; in whole blocks.
FOUND = {1: 512 + 599 + 999, 100: 500 + 500 + 900, 512: 3 * 512, 513: 0 + 513 + 513, 600: 0 + 0 + 600, 1000: 0}


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    names = ("input_length", "output_length", "hash_ids")
    lines = [json.dumps({"timestamp": 0, **dict(zip(names, row, strict=True))}) for row in MOONCAKE]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,60,20\n0,60,20\n0,90,5\n")
    return path


def found_by_the_manager(requests: list[Request], size: int) -> list[int]:
    blocks = sum(-(-request.prompt_length // size) for request in requests)
    manager = pagedattn.BlockManager(blocks, size)
    found = []
    for request in requests:
        seq = manager.add(request.prompt())
        cached = manager.num_cached_tokens(seq)
        found.append(cached // size * size)
        manager.step([seq], [request.prompt_length - cached])
        manager.free([seq])
    return found


@pytest.mark.parametrize("size", FOUND)
def test_a_mooncake_trace_is_found_in_whole_blocks(mooncake: Path, size: int) -> None:
    requests = read_trace(mooncake)
    work = trace_workload("", requests)
    assert work.shared is not None
    found = found_tokens(work.prompts, work.shared, size)
    assert found.sum() == FOUND[size]
    assert found.tolist() == found_by_the_manager(requests, size)
    assert footprint(work, size).found == pytest.approx(FOUND[size] / 3400)


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from([3, 20, 21])), min_size=1, max_size=4),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([4, 7, 16]),
)
def test_the_block_manager_finds_what_the_segments_say(prompts: list[list[tuple[int, int]]], size: int) -> None:
    requests = [
        # Streams are 64-bit keys: small numbers would give alike tokens.
        Request(i, *(np.array(c, t) for c, t in zip(zip(*rows, strict=True), (np.uint64, np.int64), strict=True)), 1)
        for i, rows in enumerate([(2**61 + 2**59 * stream, length) for stream, length in rows] for rows in prompts)
    ]
    lengths = np.array([request.prompt_length for request in requests], np.int64)
    found = found_tokens(lengths, shared_prefixes(requests), size)
    assert found.tolist() == found_by_the_manager(requests, size)


def test_the_block_manager_finds_what_the_segments_of_a_made_up_trace_say() -> None:
    requests = synthetic_trace(60, length_scale=0.5)
    work = trace_workload("", requests)
    assert work.shared is not None
    found = found_tokens(work.prompts, work.shared, 16)
    assert found.sum() > 0
    assert found.tolist() == found_by_the_manager(requests, 16)


def test_an_azure_trace_shares_nothing(azure: Path) -> None:
    work = trace_workload("", read_trace(azure))
    assert work.shared is not None
    assert not work.shared.any()
    assert footprint(work, 1).found == 0


# --- measuring --------------------------------------------------------------------------------------------------------


def test_the_rule_decides_on_what_was_measured(mooncake: Path) -> None:
    work = trace_workload("mine", read_trace(mooncake))
    steps: list[int] = []
    timer = FakeTimer({8: 3.0, 32: 1.0, 256: 1.0})
    report = tune(
        work,
        TINY,
        Device("cpu"),
        timer,
        block_sizes=[256, 8, 32],
        batch=3,
        chunk=100,
        on_step=lambda done, what: steps.append(done),
    )
    assert report.choice.block_size == 32
    assert timer.calls == [["8", "32", "256"]] * 2  # all of a case in turns
    assert steps == list(range(num_steps(work, [256, 8, 32])))
    assert [row.block_size for row in report.rows] == [8, 32, 256]
    assert len(report.batch) == 3
    assert sum(new for new, _ in report.chunks) == 100
    for row in report.rows:
        # Two layers; 4 steps in a batch of 3; of each hundred of prompt tokens to be computed a call.
        seconds = timer.seconds[row.block_size] * 2 * (4 / 3 + row.footprint.computed_tokens / 100)
        assert report.attention(row)[0] == pytest.approx(seconds)
        assert 0 < row.error < 1e-5
        assert row.manager_seconds > 0
        assert row.table_bytes == 4 * 3 * math.ceil(max(report.batch) / row.block_size)


def test_plain_lengths_are_decoded_only() -> None:
    timer = FakeTimer({16: 1.0, 64: 1.0})
    report = tune(lengths_workload("3x40", [40] * 3), TINY, Device("cpu"), timer, block_sizes=[16, 64])
    assert report.batch == [40] * 3
    assert [row.prefill for row in report.rows] == [None, None]
    assert report.attention(report.rows[0])[0] == 2.0
    assert report.choice.block_size == 16  # 48 slots against 64
    # K and V of a head of 16 float32 elements, in two layers.
    assert report.bytes(1) == 2 * 16 * 4 * 2


def test_drift_that_meets_all_calls_is_divided_out() -> None:
    drift = np.array([1.0, 1.5, 0.8, 1.2, 2.0])
    timings = {name: Timing(tuple(seconds * drift), "told") for name, seconds in (("a", 1.0), ("b", 1.1), ("c", 3.0))}
    steady = without_drift(timings)
    for name, seconds in (("a", 1.0), ("b", 1.1), ("c", 3.0)):
        assert steady[name].high == pytest.approx(steady[name].low)
        assert steady[name].median == pytest.approx(timings[name].median)
        assert steady[name].median == pytest.approx(seconds * 1.2)


def test_a_scatter_that_only_one_call_has_stays() -> None:
    calm = Timing((1.0,) * 5, "told")
    restless = Timing((1.0, 1.4, 0.7, 1.2, 0.9), "told")
    steady = without_drift({"a": calm, "b": calm, "c": restless})
    assert steady["c"] == restless
    assert without_drift({"a": restless}) == {"a": restless}


def test_a_scattering_measurement_is_remarked() -> None:
    class Restless(FakeTimer):
        def time(self, calls: Mapping[str, Prepared]) -> dict[str, Timing]:
            return {name: Timing((1.0, 1.0, 1.5, 1.5), "told") for name in calls}

    report = tune(lengths_workload("40", [40]), TINY, Device("cpu"), Restless({}), block_sizes=[16, 64])
    assert any("scatter by 40 %" in remark for remark in report.remarks)


def test_a_batch_that_would_take_too_much_memory_is_cut_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = 2 * (64 * TINY.slot_bytes + TINY.query_bytes)  # bytes of one in both block sizes
    monkeypatch.setattr(Device, "free_memory", lambda self: 1 << 30)
    monkeypatch.setattr("pagedattn.tune.measure._CPU_BYTES", 3.5 * sequence)
    work = lengths_workload("32x64", [64] * 32)
    timer = FakeTimer({16: 1.0, 64: 1.0})
    report = tune(work, TINY, Device("cpu"), timer, block_sizes=[16, 64])
    assert len(report.batch) == 3
    assert any("a batch of 3 sequences instead of 32" in remark for remark in report.remarks)
    # Asked for, it is served in full or not at all.
    assert len(tune(work, TINY, Device("cpu"), timer, block_sizes=[16, 64], batch=32).batch) == 32
    monkeypatch.setattr(Device, "free_memory", lambda self: 10_000)
    with pytest.raises(TuneError, match="decode: 32 sequences of up to 64 tokens take"):
        tune(work, TINY, Device("cpu"), timer, block_sizes=[16, 64], batch=32)
    with pytest.raises(TuneError, match="decode: 32 sequences"):
        tune(work, TINY, Device("cpu"), timer, block_sizes=[16, 64])


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagedattn, "paged_attention", lambda q, *arrays, out, **options: out.fill(1.0))
    timer = FakeTimer({16: 1.0})
    with pytest.raises(WrongResultError, match="decode, blocks of 16: relative error"):
        tune(lengths_workload("40", [40]), TINY, Device("cpu"), timer, block_sizes=[16])
    assert timer.calls == []


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_trace_is_tuned_on_the_gpu(mooncake: Path) -> None:
    code, out, err = run(
        mooncake, "--head-dim", "64", "--backend", "cuda", "--quick", "--json", "--block-sizes", "16,64"
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["backend"] == "cuda"
    assert document["recommended"] in (16, 64)
    assert all(row["decode"]["seconds"] > 0 and row["prefill"]["seconds"] > 0 for row in document["block_sizes"])


# --- the command ------------------------------------------------------------------------------------------------------


def run(*options: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["tune", *map(str, options)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_the_trade_and_the_answer(azure: Path) -> None:
    code, out, err = run(azure, *TINY_OPTIONS, "--block-sizes", "16,64", "--batch", "2", "--chunk", "32")
    assert code == 0, err
    for part in (
        "3 requests",
        "decode of 2 sequences",
        "prefill of 32 tokens",
        "waste",
        "entries",
        "tables",
        "manager",
    ):
        assert part in out
    (header,) = (line.split()[2:] for line in out.splitlines() if line.startswith("block size"))
    assert header in (["*16", "64"], ["16", "*64"])
    (best,) = (size[1:] for size in header if size.startswith("*"))
    assert f"Recommended: blocks of {best}." in out
    assert "\x1b" not in out + err
    assert "tune: 2 block sizes on the cpu backend" in err
    assert "tune: 0/7 steps  decode: blocks of 16" in err


def test_the_table_of_the_default_sizes_fits_a_terminal_of_80_columns() -> None:
    code, out, err = run("--lengths", "logn:4:60:200", *TINY_OPTIONS)
    assert code == 0, err
    table = out[out.index("block size") : out.index("Recommended")].splitlines()
    assert len(table) > 8
    assert max(len(line.rstrip()) for line in table) <= 80


def test_json_is_the_document_alone(mooncake: Path) -> None:
    code, out, err = run(mooncake, *TINY_OPTIONS, "--block-sizes", "100,512", "--length-scale", "1", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["schema"] == 1
    assert document["backend"] == "cpu"
    assert document["unit"] == "a request"
    assert document["workload"]["requests"] == 5
    assert document["workload"]["prompt_tokens"] == 3400
    assert document["model"]["kv_dtype"] == "float32"
    assert [row["found"] for row in document["block_sizes"]] == pytest.approx([1900 / 3400, 1536 / 3400])
    assert document["recommended"] in (100, 512)
    assert document["reason"].startswith(f"Blocks of {document['recommended']} take ")
    for row in document["block_sizes"]:
        assert row["held_bytes"] <= row["allocated_bytes"]
        assert row["waste"] == pytest.approx(row["unused_bytes"] / row["allocated_bytes"])
        assert 0 < row["decode"]["low"] <= row["decode"]["seconds"] <= row["decode"]["high"]


def test_the_same_seed_draws_the_same_batch(azure: Path) -> None:
    options = [azure, *TINY_OPTIONS, "--block-sizes", "16", "--batch", "4", "--json", "--seed"]
    batches = [json.loads(run(*options, seed)[1])["batch"] for seed in ("1", "1", "2")]
    assert batches[0] == batches[1] != batches[2]


def test_fewer_and_shorter_requests_can_be_asked_for(azure: Path) -> None:
    options = [*TINY_OPTIONS, "--block-sizes", "16", "--requests", "2", "--length-scale", "0.5", "--json"]
    document = json.loads(run(azure, *options)[1])
    assert document["workload"] == {"source": "trace.csv", "requests": 2, "prompt_tokens": 60, "decode_steps": 20}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a trace file or give --lengths"),
        (["trace.csv", "--lengths", "40"], "name a trace file or give --lengths, not both"),
        (["--lengths", "40", "--requests", "3"], "--requests is for a trace; --lengths has no requests"),
        (["--lengths", "40", "--chunk", "3"], "--chunk is for a trace"),
        (["--lengths", "forty"], "--lengths 'forty': expected LENGTH"),
        (["--lengths", "40", "--block-sizes", "16,,64"], "--block-sizes must be whole numbers joined by commas"),
        (["--lengths", "40", "--block-sizes", "0"], "--block-sizes must be different numbers from 1 to 65536; got 0"),
        (["--lengths", "40", "--block-sizes", "16,16"], "--block-sizes must be different numbers"),
        (["--lengths", "40", "--batch", "0"], "--batch must be from 1 to 65536; got 0"),
        (["--lengths", "40", "--layers", "0"], "--layers must be at least 1; got 0"),
        (["--lengths", "40", "--heads", "3", "--kv-heads", "2"], "--heads must be a multiple of --kv-heads"),
        (
            ["--lengths", "40", "--dtype", "int8"],
            "--dtype must be one of float32, float16, bfloat16, float8_e4m3, float8_e5m2; got int8",
        ),
        (["--lengths", "40", "--backend", "abacus"], "--backend must be auto, cpu or cuda; got abacus"),
        (["--lengths", "40", "--plot", "/nowhere/at/all.svg"], "--plot must name a file in a directory that exists"),
        (["--lengths", "40", "--plot", "trade.txt"], "--plot must name a file that ends in .svg, .png, .pdf"),
        (["--lengths", "1000x1000000", "--batch", "1000"], "decode: 1000 sequences of up to 1000000 tokens take"),
        (["nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
        (["nowhere.jsonl", "--requests", "0"], "--requests must be from 1 to 100000000; got 0"),
        (["nowhere.jsonl", "--requests", "9" * 20], "--requests must be from 1 to 100000000; got 99999999999999999999"),
        (["nowhere.jsonl", "--length-scale", "nan"], "--length-scale must be a positive number; got nan"),
    ],
)
def test_a_wrong_option_is_named_in_a_line_and_exits_with_2(options: list[str], message: str) -> None:
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert f"tune: {message}" in err.splitlines()[-1]


def test_a_wrong_result_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagedattn, "paged_attention", lambda q, *arrays, out, **options: out.fill(1.0))
    code, out, err = run("--lengths", "40", *TINY_OPTIONS)
    assert (code, out) == (1, "")
    assert "tune: wrong result: decode, blocks of 8: relative error" in err


def test_the_plot_marks_the_recommended_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "trade.svg"
    options = ["--lengths", "3x40", *TINY_OPTIONS, "--block-sizes", "16,64", "--json", "--plot", picture]
    code, out, err = run(*options)
    assert code == 0, err
    text = " ".join(ET.parse(picture).getroot().itertext())
    best = json.loads(out)["recommended"]
    for part in ("3x40 on cpu", "a decode step", "tokens a block", f"recommended: {best}", "16.7 % waste"):
        assert part in text


def test_a_name_that_looks_like_a_formula_is_a_name(tmp_path: Path, azure: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = azure.rename(tmp_path / r"$\frac$.csv")
    picture = tmp_path / "trade.svg"
    assert run(trace, *TINY_OPTIONS, "--block-sizes", "16", "--plot", picture)[0] == 0
    assert r"$\frac$.csv on cpu" in "".join(ET.parse(picture).getroot().itertext())


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_the_plot_can_be_a_bitmap_or_a_page(tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"trade{suffix}"
    assert run("--lengths", "3x40", *TINY_OPTIONS, "--block-sizes", "16", "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(start)


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("--lengths", "40", *TINY_OPTIONS, "--plot", tmp_path / "trade.svg")
    assert (code, out) == (2, "")
    assert "pip install 'pagedattn[plot]'" in err


def test_a_plot_that_cannot_be_written_exits_with_2() -> None:
    pytest.importorskip("matplotlib")
    code, _, err = run("--lengths", "40", *TINY_OPTIONS, "--block-sizes", "16", "--plot", "/proc/trade.svg")
    assert code == 2
    assert "/proc/trade.svg" in err.splitlines()[-1]
