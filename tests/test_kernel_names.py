"""No case silently takes another kernel: each call says which kernel served it, and the table lists it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pagedattn
import pytest
from backends import NumpyBackend
from failing_calls import (
    Arguments,
    attention_call,
    copy_call,
    float8_attention_call,
    float8_queries_call,
    gather_call,
    merge_call,
    on,
    reshape_call,
    rope_call,
    swap_call,
)

CALLS: list[tuple[str, Callable[[], Arguments]]] = [
    ("paged_attention", attention_call),
    ("paged_attention", float8_attention_call),
    ("paged_attention", float8_queries_call),
    ("reshape_and_cache", reshape_call),
    ("rope_and_cache", rope_call),
    ("copy_blocks", copy_call),
    ("swap_blocks", swap_call),
    ("gather_kv", gather_call),
    ("merge_states", merge_call),
]


@pytest.mark.parametrize(("operation", "start"), CALLS)
def test_the_kernel_of_each_call_is_in_the_table_of_its_operation(
    backend: NumpyBackend, operation: str, start: Callable[[], Any]
) -> None:
    getattr(pagedattn, operation)(**on(backend, start()))
    listed = {kernel for name, _, kernel in pagedattn.config()["kernels"] if name == operation}
    assert pagedattn.last_kernel() in listed


def test_tracing_prints_operation_and_kernel_of_each_call() -> None:
    script = """
import sys
import pagedattn
from failing_calls import attention_call, copy_call
pagedattn.paged_attention(**attention_call())
print(pagedattn.last_kernel())
pagedattn.copy_blocks(**copy_call())
print(pagedattn.last_kernel())
"""
    environment = {**os.environ, "PAGEDATTN_TRACE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    here = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=here, capture_output=True, text=True, check=True
    )
    attention, copy = result.stdout.split()
    assert result.stderr == f"pagedattn: paged_attention: {attention}\npagedattn: copy_blocks: {copy}\n"


def test_importing_prints_nothing() -> None:
    result = subprocess.run([sys.executable, "-c", "import pagedattn"], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")
