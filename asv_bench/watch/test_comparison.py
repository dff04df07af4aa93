# SPDX-License-Identifier: Apache-2.0
"""The watch works: what compares two commits in CI sees a slowdown, and takes a speed-up for none.

Each commit is built, so this takes minutes: ``pytest asv_bench/watch``.
"""

from __future__ import annotations

import re

import pytest
from scratch import Scratch

pytestmark = pytest.mark.timeout(1800)

# Two quick ones: a call on one token, and the attention of one sequence.
BENCHMARKS = [r"host_overhead\.PagedAttention\.", r"cpu_kernels\.Decode\.time_attention\('cpu_dec_b1_1k'\)"]

# At the end of the package's first module: right whatever stands before it.
SLOWDOWN = """

def _thrice(operation):
    def slow(*args, **kwargs):
        operation(*args, **kwargs)
        operation(*args, **kwargs)
        return operation(*args, **kwargs)

    return slow


paged_attention = _thrice(paged_attention)
"""


@pytest.fixture(scope="module")
def commits(scratch: Scratch) -> tuple[str, str, str]:
    """A commit, one that does its work three times, and one that does it once again."""
    module = scratch.repo / "python" / "pagedattn" / "__init__.py"
    text = module.read_text()
    plain = scratch.commit("As it was")
    module.write_text(text + SLOWDOWN)
    slow = scratch.commit("Attend three times")
    module.write_text(text)
    mended = scratch.commit("Attend once")
    return plain, slow, mended


def changed(table: str, mark: str) -> str:
    """The rows of asv's table that carry a mark."""
    return "\n".join(re.findall(rf"^\| \{mark} .*$", table, flags=re.MULTILINE))


def test_a_commit_that_works_three_times_is_flagged(scratch: Scratch, commits: tuple[str, str, str]) -> None:
    plain, slow, _ = commits
    compared = scratch.compare(plain, slow, BENCHMARKS)
    assert compared.returncode == 1
    flagged = changed(compared.stdout, "+")
    assert "host_overhead.PagedAttention.time_100_calls('cpu')" in flagged
    assert "cpu_kernels.Decode.time_attention('cpu_dec_b1_1k')" in flagged


def test_a_commit_that_is_faster_is_not(scratch: Scratch, commits: tuple[str, str, str]) -> None:
    _, slow, mended = commits
    compared = scratch.compare(slow, mended, BENCHMARKS)
    assert compared.returncode == 0
    assert not changed(compared.stdout, "+")
    assert "cpu_kernels.Decode.time_attention('cpu_dec_b1_1k')" in changed(compared.stdout, "-")
