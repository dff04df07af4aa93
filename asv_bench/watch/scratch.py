# SPDX-License-Identifier: Apache-2.0
"""A clone of this repository to measure in: asv's environment, results and site go there, and nothing comes here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MACHINE = "scratch"

FACTOR = 1.5
"""What the largest ratio of equal commits stays below with room: README.md has the table."""

_COMPARE = [
    "--interleave-rounds",  # a slow minute of the machine meets both commits
    *("-a", "rounds=4"),
    *("-a", "repeat=(3,200,0.2)"),  # samples of a round: at least, at most, and for how many seconds
    *("--launch-method", "forkserver"),  # imports the suite once a round
    *("--factor", str(FACTOR)),
]


class Scratch:
    """A clone in `folder`, and asv set up for it.  A folder that has one is used again, with all that it has built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.repo = self.folder / "repo"
        self.results = self.folder / "results"
        self.html = self.folder / "html"
        (self.folder / "home").mkdir(parents=True, exist_ok=True)
        if not self.repo.exists():
            subprocess.run(["git", "clone", "-q", "--no-checkout", str(ROOT), str(self.repo)], check=True)
        self.git("fetch", "-q", str(ROOT), "HEAD")
        self.git("checkout", "-q", "-f", "--detach", "FETCH_HEAD")
        self._write_config()
        self.asv("machine", "--yes", "--machine", MACHINE)

    def git(self, *arguments: str) -> str:
        """Run git in the clone and return what it says."""
        identity = ["-c", "user.name=watch", "-c", "user.email=watch@localhost", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(self.repo), *identity, *arguments]
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()

    def commit(self, message: str) -> str:
        """Commit the clone's files as they are, changed or not, and return the hash."""
        self.git("commit", "-q", "--allow-empty", "-a", "-m", message)
        return self.git("rev-parse", "HEAD")

    def asv(self, *arguments: str, expected: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
        """Run asv, show what it says, and return it.

        Raises
        ------
        RuntimeError
            The exit status is none of those expected.
        """
        command = [sys.executable, "-m", "asv", *arguments, "--config", str(self.folder / "asv.conf.json")]
        done = subprocess.run(
            command, env=self._environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        print(done.stdout, flush=True)
        if done.returncode not in expected:
            raise RuntimeError(f"asv {arguments[0]} ended with status {done.returncode}")
        return done

    def compare(self, base: str, head: str, benchmarks: list[str]) -> subprocess.CompletedProcess[str]:
        """Measure two commits in turns: status 0 if none of `benchmarks` (regular expressions) is slower, 1 if one is.

        Status 2: a benchmark failed on either commit, and nothing was judged; the times of the others are kept.
        """
        chosen = [argument for pattern in benchmarks for argument in ("--bench", pattern)]
        return self.asv("continuous", base, head, "--machine", MACHINE, *_COMPARE, *chosen, expected=(0, 1, 2))

    def publish(self, results: Path) -> None:
        """Make the site of the results in a folder."""
        self._write_config(results_dir=str(results))
        self.asv("publish")
        self._write_config()

    def _environment(self) -> dict[str, str]:
        # asv keeps its list of machines in the home folder.
        home = Path.home()
        defaults = {
            "XDG_CACHE_HOME": str(home / ".cache"),
            "XDG_CONFIG_HOME": str(home / ".config"),
            "PAGEDATTN_CUDA": "OFF",
        }
        return defaults | dict(os.environ) | {"HOME": str(self.folder / "home")}

    def _write_config(self, **options: str) -> None:
        text = (ROOT / "asv_bench" / "asv.conf.json").read_text()
        config = json.loads(re.sub(r"(^|\s)//.*$", "", text, flags=re.MULTILINE))
        config |= {
            "repo": str(self.repo),
            "branches": ["HEAD"],
            # With one thread, whoever else runs on a machine of two cores takes the other one.
            "matrix": {"env_nobuild": {"PAGEDATTN_NUM_THREADS": ["1"]}},
            "pythons": [f"{sys.version_info.major}.{sys.version_info.minor}"],
            "benchmark_dir": str(ROOT / "asv_bench" / "benchmarks"),
            "env_dir": str(self.folder / "env"),
            "results_dir": str(self.results),
            "html_dir": str(self.html),
        }
        (self.folder / "asv.conf.json").write_text(json.dumps(config | options, indent=2))
