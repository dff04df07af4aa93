# SPDX-License-Identifier: Apache-2.0
"""The tests share a clone and what was built for it: in PAGEDATTN_WATCH, or in a folder of the test run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scratch import Scratch


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Scratch:
    folder = os.environ.get("PAGEDATTN_WATCH")
    return Scratch(Path(folder) if folder else tmp_path_factory.mktemp("watch"))
