"""Fixtures of every test: the backend under test, and fresh random seeds that a failure prints.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator

import hypothesis
import numpy as np
import pytest
from backends import CupyBackend, NumpyBackend

hypothesis.settings.register_profile("pagedattn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("pagedattn")


def why_no_cuda() -> str | None:
    """Return why CuPy arrays cannot be computed here, or None where they can."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    import pagedattn

    return None if pagedattn.config()["cuda"]["built"] else "pagedattn was built without CUDA"


@pytest.fixture(scope="session", params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> NumpyBackend:
    """Where the test's arrays live: host memory, or CUDA memory where there is a device."""
    if request.param == "numpy":
        return NumpyBackend()
    reason = why_no_cuda()
    if reason is not None:
        pytest.skip(reason)
    return CupyBackend()


@pytest.fixture(scope="session")
def cuda() -> CupyBackend:
    """The CUDA backend alone, for tests that make sense only there (which carry the marker `gpu`)."""
    reason = why_no_cuda()
    if reason is not None:
        pytest.skip(reason)
    return CupyBackend()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that are new in every run; PAGEDATTN_TEST_SEED repeats a failed one."""
    seed = int(os.environ.get("PAGEDATTN_TEST_SEED", secrets.randbits(32)))
    request.node.stash[_SEED] = seed
    return np.random.default_rng(seed)


_SEED = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    seed = item.stash.get(_SEED, None)
    if seed is not None and report.failed:
        report.sections.append(("seed", f"repeat with PAGEDATTN_TEST_SEED={seed}"))
    return report
