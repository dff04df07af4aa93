# SPDX-License-Identifier: Apache-2.0
"""asv's undocumented format, on which the CUDA benchmarks rest.

Samples that a benchmark returns itself are timed, with asv's own statistics; and a value whose confidence interval
reaches zero is shown and never judged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from asv import results as asv_results
from asv.commands.compare import _is_result_better
from asv.util import load_json
from asv_runner.statistics import compute_stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cuda_run import timed, unjudged

FACTOR = 1.1

SUITE = """
class Fast:
    params = ["a", "b"]
    def setup_cache(self):
        return {"a": 1.0, "b": 3.0}
    def track_seconds(self, measured, case):
        return {"samples": [measured[case] * x for x in (0.9, 1.0, 1.1, 1.0, 1.0, 0.95, 1.05, 1.0, 1.0)], "number": 1}
    track_seconds.type = "time"
    track_seconds.unit = "seconds"
"""


def compared(before: dict[str, list[float]], after: dict[str, list[float]]) -> str:
    """What asv's comparison says of two returned values."""
    (old, old_stats), (new, new_stats) = (compute_stats(value["samples"], 1) for value in (before, after))
    old_ss, new_ss = (old_stats, None), (new_stats, None)
    if _is_result_better(new, old, new_ss, old_ss, FACTOR):
        return "better"
    return "worse" if _is_result_better(old, new, old_ss, new_ss, FACTOR) else "same"


def test_a_returned_dictionary_of_samples_is_timed_with_statistics(tmp_path: Path) -> None:
    suite = tmp_path / "benchmarks"
    suite.mkdir()
    (suite / "__init__.py").write_text("")
    (suite / "fast.py").write_text(textwrap.dedent(SUITE))
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "-c", "user.name=n", "-c", "user.email=e@e", "commit", "-qm", "first")
    conf = {"version": 1, "project": "p", "repo": ".", "branches": ["HEAD"], "environment_type": "virtualenv"}
    (tmp_path / "asv.conf.json").write_text(json.dumps(conf))
    _asv(tmp_path, "machine", "--yes", "--machine", "m")
    commit = _git(tmp_path, "rev-parse", "HEAD").strip()
    _asv(tmp_path, "run", "-E", f"existing:{sys.executable}", "--set-commit-hash", commit, "--machine", "m")
    (file,) = (path for path in (tmp_path / "results" / "m").glob("*.json") if path.name != "machine.json")
    result = asv_results.Results.load(str(file))
    params = [["'a'", "'b'"]]
    assert result.get_result_value("fast.Fast.track_seconds", params) == [1.0, 3.0]
    stats = result.get_result_stats("fast.Fast.track_seconds", params)
    assert [each["repeat"] for each in stats] == [9, 9]
    assert stats[0]["ci_99_a"] == pytest.approx(0.9)
    assert stats[0]["ci_99_b"] == pytest.approx(1.1)
    assert load_json(str(tmp_path / "results" / "benchmarks.json"))["fast.Fast.track_seconds"]["type"] == "time"


def test_seconds_are_judged_by_their_samples() -> None:
    steady = timed([1.00, 1.01, 0.99, 1.00, 1.02, 0.98, 1.00, 1.01, 0.99])
    slower = timed([1.30, 1.31, 1.29, 1.30, 1.32, 1.28, 1.30, 1.31, 1.29])
    noisy = timed([0.7, 1.30, 2.1, 0.6, 1.5, 1.9, 0.8, 1.7, 1.30])
    assert compared(steady, slower) == "worse"
    assert compared(slower, steady) == "better"
    assert compared(steady, noisy) == "same"
    assert compared(steady, steady) == "same"


@pytest.mark.parametrize("factor", [0.01, 0.5, 0.9, 1.1, 2.0, 100.0])
def test_rates_are_shown_and_never_judged(factor: float) -> None:
    assert compared(unjudged(2940.0), unjudged(2940.0 * factor)) == "same"
    value, stats = compute_stats(unjudged(2940.0)["samples"], 1)
    assert value == 2940.0
    assert stats["q_25"] == stats["q_75"] == 2940.0


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def _asv(folder: Path, *arguments: str) -> None:
    environment = os.environ | {"HOME": str(folder)}  # where asv keeps what it knows of machines
    done = subprocess.run(
        [sys.executable, "-m", "asv", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
