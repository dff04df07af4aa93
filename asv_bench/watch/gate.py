# SPDX-License-Identifier: Apache-2.0
"""Is HEAD as fast as its base?  Both are built and measured in turns on this machine.

    python asv_bench/watch/gate.py

The base is the newest ancestor with results of record for the CPU, so that small steps do not add up; the parent where
there is none, or where today's benchmarks cannot run it; and PAGEDATTN_CI_BASE where that is set.  What seems slower is
measured again, and counts if it is slower each time.  Exit status 1: something is slower, or fails.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scratch import FACTOR, MACHINE, ROOT, Scratch

# One case of each kind: all of them take too long to be measured at every change.
BENCHMARKS = [
    r"^block_manager\.",
    r"^host_overhead\.",
    r"^cpu_kernels\.(?!Decode|Prefill)",
    r"^cpu_kernels\.Decode\..*'cpu_dec_(b1_1k|b1_1k_fp32|skew16)'",
    r"^cpu_kernels\.Prefill\..*'cpu_(pre_512|mixed)'",
]
MEASUREMENTS = 3  # of what seems slower
PROBE = r"^cpu_kernels\.MergeStates\."
RECORDS = ROOT / "asv_bench" / "results"


def candidates(scratch: Scratch) -> Iterator[tuple[str, str]]:
    """Commits to compare with, the best first, and why."""
    override = os.environ.get("PAGEDATTN_CI_BASE")
    if override:
        yield override, "PAGEDATTN_CI_BASE"
        return
    ancestors = scratch.git("rev-list", "HEAD").split()[1:]
    recorded = {file.name.split("-")[0] for file in RECORDS.glob("*/*-*.json") if has_cpu_kernels(file)}
    with_record = (commit for commit in ancestors if commit[:8] in recorded)
    yield from ((commit, "the newest with results of record") for commit in itertools.islice(with_record, 1))
    yield from ((commit, "the parent") for commit in ancestors[:1])


def has_cpu_kernels(file: Path) -> bool:
    """Whether results of record include the CPU's kernels."""
    return any(name.startswith("cpu_kernels.") for name in json.loads(file.read_text())["results"])


def resolve(name: str) -> str | None:
    """The commit of a name in the checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "-q", f"{name}^{{commit}}"]
    found = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def find_base(scratch: Scratch) -> str | None:
    """The first candidate that today's benchmarks can measure."""
    seen = set()
    for name, why in candidates(scratch):
        commit = resolve(name)
        if commit is None:
            print(f"note: {name} ({why}) is not in this clone")
            continue
        if commit in seen:
            continue
        seen.add(commit)
        probe = scratch.asv(
            *("run", f"{commit}^!", "--quick", "--dry-run", "--machine", MACHINE, "--bench", PROBE), expected=(0, 2)
        )
        if probe.returncode == 0:
            print(f"note: the base is {commit[:8]}, {why}")
            return commit
        print(f"note: {commit[:8]} ({why}) cannot be measured with today's benchmarks")
    return None


def slower(scratch: Scratch, base: str, head: str, benchmarks: list[str]) -> list[str]:
    """The benchmarks and parameters that are slower in `head`, or fail there alone."""
    compared = scratch.compare(base, head, benchmarks)
    if compared.returncode == 2:
        # Something failed on either commit, and asv judged nothing: it does when it compares what it kept.
        options = ["--machine", MACHINE, "--factor", str(FACTOR), "--only-changed"]
        compared = scratch.asv("compare", base, head, *options)
    found = re.findall(r"^\| [+!] .*\| (\S.*?) +\|$", compared.stdout, flags=re.MULTILINE)
    if compared.returncode and not found:
        raise RuntimeError(f"asv failed and named no benchmark:\n{compared.stdout}")
    return found


def gate(folder: Path) -> int:
    """Compare, and return the exit status."""
    scratch = Scratch(folder)
    head = scratch.git("rev-parse", "HEAD")
    base = find_base(scratch)
    if base is None:
        print("skipped: no base in this clone can be measured")
        return 0
    suspects, patterns = [], BENCHMARKS
    for measurement in range(1, MEASUREMENTS + 1):
        suspects = slower(scratch, base, head, patterns)
        if not suspects:
            print(f"note: nothing is slower than {base[:8]} by more than {FACTOR}")
            return 0
        print(f"note: measurement {measurement} of {MEASUREMENTS}, slower by more than {FACTOR}: {', '.join(suspects)}")
        patterns = [f"^{re.escape(name)}$" for name in suspects]
    return 1


if __name__ == "__main__":
    chosen = os.environ.get("PAGEDATTN_WATCH")
    if chosen:
        sys.exit(gate(Path(chosen)))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(gate(Path(temporary)))
