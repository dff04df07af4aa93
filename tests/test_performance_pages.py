"""The performance pages are made from the results of record, and their check sees what is stale.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_documents import bench_document
from installed import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))

import asv_tables
import performance

COMMIT, OLDER = "c" * 40, "a" * 40
# As asv writes them: rows end where the rest is missing, NaN is "n/a", None is a failure.
BENCHMARKS = {
    "version": 2,
    "block_manager.DecodeSteps.time_16_steps": {"param_names": ["sequences"], "unit": "seconds"},
    "block_manager.Fork.time_fork": {"param_names": [], "unit": "seconds"},
    "decode.Decode.track_bandwidth": {"param_names": ["case"], "unit": "GB/s"},
    "decode.Decode.track_seconds": {"param_names": ["case"], "unit": "seconds"},
    "prefill.Prefill.track_seconds": {"param_names": ["case"], "unit": "seconds"},
    "package.Size.track_installed_bytes": {"param_names": [], "unit": "bytes"},
}
COLUMNS = ["result", "params", "version", "stats_q_25", "stats_q_75"]
NAN = float("nan")
RESULTS = {
    "block_manager.DecodeSteps.time_16_steps": [
        [1.25e-3, 7.5e-3], [["256", "1024"]], "v", [1.0e-3, 7.5e-3], [1.3e-3, 7.5e-3],
    ],
    "block_manager.Fork.time_fork": [[2e-6], [], "v", [2e-6], [2e-6]],
    "decode.Decode.track_seconds": [[7.3e-6, NAN], [["'dec_a'", "'dec_b'"]], "v", [7.3e-6, None], [7.3e-6, None]],
    "decode.Decode.track_bandwidth": [[2810.5, NAN], [["'dec_a'", "'dec_b'"]], "v"],
    "prefill.Prefill.track_seconds": [None, [["'pre_a'"]], "v"],
    "package.Size.track_installed_bytes": [[1907866], [], "v"],
}  # fmt: skip


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A folder like asv_bench: a bench document of one machine, asv's results of it and of another."""
    folder = tmp_path / "asv_bench"
    (folder / "peers").mkdir(parents=True)
    save(folder / "peers/gpu.json", bench_document())
    for machine in ("gpu", "cpu"):
        (folder / "results" / machine).mkdir(parents=True)
        facts = {"machine": machine, "cpu": "Sample processor", "num_cpu": "2", "version": 1}
        save(folder / "results" / machine / "machine.json", facts)
        save(folder / "results" / machine / "aaaaaaaa-env.json", asv_run(OLDER, 1000, seconds=9.0))
        save(folder / "results" / machine / "cccccccc-env.json", asv_run(COMMIT, 2000))
    save(folder / "results/benchmarks.json", BENCHMARKS)
    return folder


def save(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def asv_run(commit: str, date: int, seconds: float | None = None) -> dict[str, Any]:
    results: dict[str, Any] = copy.deepcopy(RESULTS)
    if seconds is not None:
        results["block_manager.Fork.time_fork"][0] = [seconds]
    return {"commit_hash": commit, "date": date, "result_columns": COLUMNS, "results": results, "version": 2}


def make(records: Path, out: Path, *options: str) -> int:
    return performance.main(["--records", str(records), "--out", str(out), *options])


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of the table rows that begin with this cell."""
    lines = [line.replace("\u00a0", " ") for line in page.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells for cells in split if cells[0] == first]


def test_slower_and_faster_cases_stand_in_one_table_and_the_best_is_bold() -> None:
    page = performance.machine_page("gpu", bench_document(), None)
    faster, slower = rows(page, "dec_b1_128")[0], rows(page, "dec_g8_b64_8k")[0]
    assert faster == ["dec_b1_128", "**6.10**", "11.1", "7.30", "6.90", "88.52", "3 %", "0.88"]
    assert slower == ["dec_g8_b64_8k", "720", "711", "713", "**700**", "2985", "96 %", "1.03"]
    assert rows(page, "pre_1x8k")[0] == ["pre_1x8k", "1030", "**952**", "1074", "1013", "534", "77 %", "1.08"]


def test_a_page_names_ceilings_machine_versions_and_who_is_missing() -> None:
    page = performance.machine_page("gpu", bench_document(), None)
    assert page.startswith("# Sample accelerator 80 GB\n\nMeasured on 2026-01-02 with pagedattn 0.1.dev7+g0123abc.\n")
    assert rows(page, "reading memory") == [["reading memory", "3120 GB/s"]]
    assert rows(page, "driver") == [["driver", "580.1"]]
    assert rows(page, "FlashInfer") == [["FlashInfer", "0.7.2"]]
    assert rows(page, "vLLM") == [["vLLM", "missing: vllm is not installed"]]
    assert "- FlashAttention-3: no operation for this case (dec_b64_4k_fp8)" in page
    error, host, spread = rows(page, "dec_b1_64k")[-3:]
    assert error[1] == "2.1e-03"
    assert host[1:3] == ["8.00", "26.0"]
    assert spread[1] == "3.0 %"


def test_the_summary_counts_cases_that_are_faster_than_every_peer() -> None:
    summary = performance.summary_page({"gpu": bench_document()}, {})
    decode, prefill = rows(summary, "Sample accelerator 80 GB")
    # dec_b256_512 is as fast as the best peer, which is not faster.
    assert decode[2:] == ["decode", "8 of 14", "0.95", "0.81 to 1.03"]
    assert prefill[2:] == ["prefill", "1 of 7", "1.05", "0.99 to 1.08"]
    assert "generated/gpu\n" in summary


def test_the_block_manager_stands_beside_others_with_best_median_and_aim() -> None:
    seconds = {"ours": [9.4e-9, 9.9e-9, 12e-9], "theirs": [2e-7, 3e-7, 1e-6]}
    document = {
        "schema": 1,
        "date": "2026-01-02T03:04:05+00:00",
        "python": "3.11.7",
        "contestants": [
            {"name": "ours", "title": "pagedattn", "version": "pagedattn 1"},
            {"name": "theirs", "title": "Other", "version": "Other 2"},
        ],
        "units": [
            {"name": "allocate", "aim": 10e-9, "results": seconds},
            {"name": "fork", "aim": 1e-6, "results": {"ours": [0.9e-6, 1.1e-6, 1.3e-6]}},
            {"name": "collect", "aim": 1e-3, "results": {"ours": [0.0] * 3, "theirs": [0.0281] * 3}},
        ],
    }
    page = performance.managers_page({"cpu": document})
    assert "2026-01-02 on `cpu`, Python 3.11.7: pagedattn 1, Other 2. µs, the best of 3 rounds" in page
    assert rows(page, "allocate") == [["allocate", "0.0094 (0.0099)", "0.2 (0.3)", "0.01"]]
    assert rows(page, "fork") == [["fork", "0.9 (1.1)", "–", "1"]]
    assert rows(page, "collect") == [["collect", "0 (0)", "28100 (28100)", "1000"]]


def test_without_results_the_summary_says_so() -> None:
    assert performance.summary_page({}, {}) == "There are no results of record yet.\n"


def test_asv_results_of_the_newest_commit_become_tables(records: Path) -> None:
    record = asv_tables.load_record(records / "results", "cpu")
    assert record is not None
    assert record.commit == COMMIT
    page = performance.machine_page("cpu", None, record)
    assert "commit `cccccccccc` on Sample processor" in page
    assert rows(page, "256") == [["256", "1.25 ms ± 20 %"]]
    assert rows(page, "1024") == [["1024", "7.50 ms"]]
    assert rows(page, "Fork") == [["Fork", "2.00 µs"]]
    assert rows(page, "case") == [["case", "bandwidth, GB/s", "seconds"]]
    assert rows(page, "dec_a") == [["dec_a", "2810", "7.30 µs"]]
    assert rows(page, "Size: installed bytes") == [["Size: installed bytes", "1.91 MB"]]
    assert not rows(page, "dec_b"), "n/a here"
    assert "Prefill" not in page, "failed"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.0316, "31.6 ms"), (1e-3, "1.00 ms"), (4.61e-6, "4.61 µs"), (3e-7, "300 ns")],
)
def test_seconds_have_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert asv_tables.show_seconds(seconds) == text


def test_pages_that_were_written_pass_the_check_until_a_result_changes(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "generated"
    assert make(records, out) == 0
    pictures = {"gpu-roofline.svg", "gpu-decode.svg", "gpu-prefill.svg"}
    assert {path.name for path in out.iterdir()} == {"summary.md", "gpu.md", "cpu.md", *pictures}
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert make(records, out, "--check") == 0
    assert make(records, out) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written

    document = bench_document()
    document["cases"][0]["results"][0]["seconds"] = 5e-6
    save(records / "peers/gpu.json", document)
    capsys.readouterr()
    assert make(records, out, "--check") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == written, "the check changes nothing"
    said = capsys.readouterr().out
    assert "-| dec_b1_128 | **6.10** |" in said
    assert "+| dec_b1_128 | **5.00** |" in said
    for name in ("summary.md", "gpu.md", *pictures):
        assert name in said.splitlines()[-1]


def test_the_check_sees_missing_pictures_and_files_too_many(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "generated"
    make(records, out)
    (out / "gpu-decode.svg").unlink()
    (out / "old.md").write_text("# A machine that is gone\n", encoding="utf-8")
    assert make(records, out, "--check") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("Stale: gpu-decode.svg, old.md.")
    make(records, out)
    assert make(records, out, "--check") == 0
    assert not (out / "old.md").exists()


def test_a_document_of_another_schema_is_refused_by_name(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(records / "peers/gpu.json", bench_document() | {"schema": 2})
    assert make(records, tmp_path / "generated") == 2
    assert "gpu.json: expected schema 1, got 2" in capsys.readouterr().err


def test_the_committed_pages_are_those_of_the_results_of_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert performance.main(["--check"]) == 0, capsys.readouterr().out
