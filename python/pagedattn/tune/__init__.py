# SPDX-License-Identifier: Apache-2.0
"""Which block size?  Block sizes are measured on a model's shape and a workload's lengths, and one is recommended.

Small blocks waste less of the cache and share longer prefixes; large ones make shorter tables and, on some machines,
faster kernels.  Start with :mod:`~pagedattn.tune.choice` (the rule), :mod:`~pagedattn.tune.workload` (what is served),
:mod:`~pagedattn.tune.footprint` (what it takes of the cache) and :mod:`~pagedattn.tune.measure` (what it costs in
time).
"""

from __future__ import annotations

from .choice import Candidate, Choice, choose
from .measure import tune
from .model import Model, TuneError
from .report import Report
from .workload import Workload, lengths_workload, trace_workload

__all__ = [
    "Candidate",
    "Choice",
    "Model",
    "Report",
    "TuneError",
    "Workload",
    "choose",
    "lengths_workload",
    "trace_workload",
    "tune",
]
