# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3: its compiled operations, from a file that is named or from a package that ships them.

The schedule is computed beforehand, as a server does it once for all layers.
"""

from __future__ import annotations

import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pagedattn._device import Backend

from ..inputs import Inputs
from .base import Peer, Prepared, UnsupportedError, window_left
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
    valid_block_tables,
)

_FILES = (("vllm", "vllm_flash_attn/_vllm_fa3_C*.so"), ("flash_attn_3", "_C*.so"))  # package, file in it
_NAMESPACES = ("_vllm_fa3_C", "flash_attn_3")

# Arguments that have to be given and say "nothing of that kind".
_NEUTRAL = {
    "window_size_right": -1,
    "attention_chunk": 0,
    "softcap": 0.0,
    "has_softcap": False,
    "is_rotary_interleaved": True,
    "max_seqlen_k_new": 0,
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}


class FlashAttention3(Peer):
    """FlashAttention-3 on the paged cache."""

    name = "fa3"
    title = "FlashAttention-3"

    def missing(self, backend: Backend) -> str:
        if backend != "cuda":
            return "runs on CUDA only"
        if reason := torch_missing(backend):
            return reason
        named = os.environ.get("FA3_SO")
        if named and not Path(named).is_file():
            return f"FA3_SO names no file: {named}"
        if _library() is None:
            return "no library: set FA3_SO to a file with its operations, or pip install vllm"
        import cupy

        capability = cupy.cuda.Device().compute_capability
        return "" if capability == "90" else f"needs a device of compute capability 9.0, not {int(capability) / 10}"

    def version(self) -> str:
        path = _library()
        for package, _ in _FILES:
            if path is not None and package in path.parts and not os.environ.get("FA3_SO"):
                return f"{package} {metadata.version(package)}, {torch_version()}"
        return f"file {path.name if path else 'not found'}, {torch_version()}"

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        if case.dtype != "float8_e4m3":
            require_unquantised(case)
        if case.dtype == "float32":
            raise UnsupportedError("no float32")
        library = _load()
        out, result = empty_out(inputs)
        both = {
            "max_seqlen_q": max(case.q_lens),
            "max_seqlen_k": max(case.kv_lens),
            "cu_seqlens_q": as_tensor(inputs.query_starts, "int32"),
            "seqused_k": as_tensor(inputs.seq_lens, "int32"),
            "is_causal": case.causal,
            "num_splits": 0,  # as many as it sees fit
            "window_size_left": window_left(case),
        }
        shape = {
            "batch_size": len(case.kv_lens),
            "num_heads": case.heads,
            "num_heads_k": case.kv_heads,
            "headdim": case.head_dim,
            "headdim_v": case.head_dim,
            "qkv_dtype": torch_dtype(case.dtype),
            "page_size": case.block_size,
        }
        with refusals():
            schedule = library.get_scheduler_metadata.default
            scheduler_metadata = schedule(*positional(schedule, _NEUTRAL | both | shape))
        arrays = {
            "q": as_tensor(inputs.q, case.dtype),
            "k": as_tensor(inputs.k_cache, case.kv_dtype),
            "v": as_tensor(inputs.v_cache, case.kv_dtype),
            "out": result,
            "page_table": valid_block_tables(inputs),
            "softmax_scale": case.head_dim**-0.5,
            "scheduler_metadata": scheduler_metadata,
        }
        forward = library.fwd.default
        arguments = positional(forward, _NEUTRAL | both | arrays)
        return prepare_torch(inputs, lambda: forward(*arguments), out)


def _library() -> Path | None:
    """The file with its operations: the named one, or one that an installed package ships."""
    if named := os.environ.get("FA3_SO"):
        return Path(named)
    for package, pattern in _FILES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if found := sorted(Path(folder).glob(pattern)):
                return found[0]
    return None


def _load() -> Any:
    import torch

    path = _library()
    if path is None:
        raise UnsupportedError("no library")
    with refusals():
        torch.ops.load_library(str(path))
    for namespace in _NAMESPACES:
        library = getattr(torch.ops, namespace)
        if hasattr(library, "fwd"):
            return library
    raise UnsupportedError(f"{path.name} registers no operation of {' or '.join(_NAMESPACES)}")
