"""`pagedattn bench` on the command line: a real small run, JSON, and options that are refused by name.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

import pagedattn
from pagedattn._cli import app
from typer.testing import CliRunner

SMALL = ["--backend", "cpu", "--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--quick"]


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_shapes_are_measured() -> None:
    two = ("--lengths", "3x100", "--lengths", "skew:3:64:5", "--q-lens", "1", "--q-lens", "all")
    result = bench(*SMALL, *two, "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert document["backend"] == "cpu"
    first, second = document["cases"]
    assert (first["name"], first["kind"]) == ("3x100", "decode")
    assert (second["name"], second["kind"]) == ("all@skew:3:64:5", "prefill")
    assert first["shape"] == "3 x 100 tokens, 4/2 heads of 32, blocks of 16, float32"
    ours = first["results"][0]
    assert ours["peer"] == "pagedattn"
    assert 0 < ours["low"] <= ours["seconds"] <= ours["high"] < 1
    assert len(ours["samples"]) >= 5
    assert ours["error"] < 1e-6
    assert document["ceilings"]["read"] > 0
    assert "bench: 0/2 cases  ceilings" in result.stderr


def test_a_peer_that_is_not_here_is_named_in_the_table() -> None:
    result = bench(*SMALL, "--lengths", "50", "--against", "fa3")
    assert result.exit_code == 0, result.output
    assert "FlashAttention-3 is not here: " in result.stdout
    assert "\n50 " in result.stdout


def test_one_query_length_is_for_all() -> None:
    result = bench(*SMALL, "--lengths", "2x40+9", "--q-lens", "3", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["cases"][0]["shape"].startswith("3 x 3 new of 3 x 9 to 40 tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "many"], "bench: --lengths 'many': expected LENGTH, COUNTxLENGTH"),
        (["--lengths", "8", "--q-lens", "0"], "bench: --q-lens '0': expected LENGTH, COUNTxLENGTH"),
        (["--lengths", "8", "--q-lens", "9"], "query lengths must be 1 to the sequence's 8 tokens; got 9"),
        (["--lengths", "8", "--q-lens", "1", "--q-lens", "1"], "--q-lens must be given once, or once for each of 1"),
        (["--lengths", "3x8", "--q-lens", "2x1"], "--q-lens 2x1 names 2 sequences, --lengths 3x8 names 3"),
        (["--case", "decode", "--lengths", "8"], "give it or --lengths and --q-lens, not both"),
        (["--case", "decode"], "--case names whole cases: --heads is for a shape of your own"),
        (["--against", "nobody"], "--against must be all or one of contiguous"),
        (["--heads", "7"], "--heads must be a multiple of --kv-heads; got 7 and 2"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--lengths", "1000000x1000000"], "TiB"),
        (["--heads", "1000000000"], "TiB"),
        (["--plot", "/proc/nowhere/x.svg"], "--plot must name a file in a directory that exists"),
        (["--plot", "/proc/x.svg"], "--plot must name a file that can be written; got /proc/x.svg"),
        (["--plot", "x.doc"], "x.doc"),
        (["--backend", "tpu"], "--backend must be auto, cpu or cuda; got tpu"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagedattn.bench.measure.measure_ceilings", lambda *_, **__: pytest.fail("measured"))
    result = bench(*SMALL, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_case_that_nobody_knows_is_refused() -> None:
    result = bench("--backend", "cpu", "--case", "nonsense")
    assert result.exit_code == 2
    assert "--case must be one of dec_b1_128, " in result.stderr


def test_memory_that_runs_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError("no room for 3 TiB")

    monkeypatch.setattr("pagedattn.bench.measure.Inputs", full)
    result = bench(*SMALL, "--lengths", "20")
    assert result.exit_code == 2
    assert "bench: out of memory: no room for 3 TiB" in result.stderr


def test_ctrl_c_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pagedattn.bench.measure.Inputs", interrupted)
    result = bench(*SMALL, "--lengths", "20")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "bench: stopped"


def test_a_wrong_result_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagedattn, "paged_attention", lambda *_arrays, out, **_options: out.fill(0))
    result = bench(*SMALL, "--lengths", "20")
    assert result.exit_code == 1
    assert "bench: wrong result: 20: relative error" in result.stderr


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = bench(*SMALL, "--lengths", "50", "--lengths", "70", "--plot", str(tmp_path / "roof.svg"))
    assert result.exit_code == 0, result.output
    assert "<svg" in (tmp_path / "roof.svg").read_text()
