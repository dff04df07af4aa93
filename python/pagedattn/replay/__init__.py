# SPDX-License-Identifier: Apache-2.0
"""Continuous batching over a request trace: what paging does, and whether it does it right.

The replay admits requests while blocks last, reuses cached prefixes, prefills in chunks, decodes one token a sequence
a step, preempts when blocks run out and frees at the end.  It drives the package's public functions only, so it is
also the longest example of their use.  Start with :mod:`~pagedattn.replay.scheduler` (which tokens run) and
:mod:`~pagedattn.replay.engine` (how they run).
"""

from __future__ import annotations

from .engine import replay
from .report import Report
from .settings import Settings, SettingsError
from .synthetic import synthetic_trace
from .traces import Request, TraceError, read_trace
from .verify import Mismatch

__all__ = [
    "Mismatch",
    "Report",
    "Request",
    "Settings",
    "SettingsError",
    "TraceError",
    "read_trace",
    "replay",
    "synthetic_trace",
]
