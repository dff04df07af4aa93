"""CuPy's arrays are read by their fields, and by their properties where another CuPy lays them out otherwise.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# Takes from CuPy what its layout is tried with, and the C function that tells the current stream.
SPOIL = """
import cupy, cupy_backends.cuda.stream
cupy.cuda.UnownedMemory = None
cupy_backends.cuda.stream.__pyx_capi__.clear()
"""

# Attention over a cache whose blocks lie apart, on a stream of CuPy's that does not wait for others.
ATTEND = """
import hashlib
import cupy, numpy as np, pagedattn
from pagedattn import _core
rng = np.random.default_rng(7)
caches = cupy.asarray(rng.standard_normal((16, 2, 3, 16, 2, 64), np.float32).astype(np.float16))
k_cache, v_cache = caches[:, 0, 1], caches[:, 1, 2]
q = cupy.asarray(rng.standard_normal((4, 16, 64), np.float32).astype(np.float16))[:, ::2]
tables = cupy.asarray(rng.permutation(16).astype(np.int32).reshape(4, 4))
lens = cupy.asarray(np.array([64, 1, 30, 17], np.int32))
big = cupy.ones(1 << 26, np.float32)
cupy.cuda.runtime.deviceSynchronize()
with cupy.cuda.Stream(non_blocking=True) as stream:
    for _ in range(20):
        big *= 2  # q is there only after this
    late = cupy.empty_like(q)
    late[...] = q
    out = pagedattn.paged_attention(late, k_cache, v_cache, tables, lens)
    stream.synchronize()
print(_core.cupy_layout_is_known(), hashlib.sha256(out.get().tobytes()).hexdigest())
"""


def attend(prelude: str) -> list[str]:
    command = [sys.executable, "-c", prelude + ATTEND]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()


@pytest.mark.usefixtures("cuda")
def test_fields_and_properties_tell_the_same() -> None:
    by_fields, by_properties = attend(""), attend(SPOIL)
    # False here means that reading arrays costs microseconds more: src/bindings/cupy.h is to follow CuPy.
    assert by_fields[0] == "True"
    assert by_properties[0] == "False"
    assert by_fields[1] == by_properties[1]
