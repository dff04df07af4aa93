# SPDX-License-Identifier: Apache-2.0
"""FlashInfer: its wrappers over a paged cache.  What `plan` does on the host is done beforehand."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np

from pagedattn._device import FP8_DTYPES, Backend

from ..inputs import Inputs
from .base import Peer, Prepared, UnsupportedError, window_left
from .torch_arrays import as_tensor, empty_out, prepare_torch, refusals, torch_dtype, torch_missing, torch_version

_WORKSPACE_BYTES = 512 << 20  # more than any case of ours needs; plan says so if not


class FlashInfer(Peer):
    """Decode on CUDA cores, prefill on tensor cores."""

    name = "flashinfer"
    title = "FlashInfer"
    tensor_core_decode = False

    def missing(self, backend: Backend) -> str:
        if backend != "cuda":
            return "runs on CUDA only"
        if reason := torch_missing(backend):
            return reason
        return "" if find_spec("flashinfer") else "flashinfer is not installed: pip install flashinfer-python"

    def version(self) -> str:
        return f"flashinfer {metadata.version('flashinfer-python')}, {torch_version()}"

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        if case.dtype == "float32" or case.dtype in FP8_DTYPES:
            raise UnsupportedError(f"no {case.dtype} queries")
        is_decode = max(case.q_lens) == 1
        if self.tensor_core_decode and not is_decode:
            raise UnsupportedError("decode only")
        with refusals():
            wrapper = self._plan_decode(inputs) if is_decode else _plan_prefill(inputs)
        q = as_tensor(inputs.q, case.dtype)
        caches = tuple(as_tensor(cache, case.kv_dtype) for cache in (inputs.k_cache, inputs.v_cache))
        if case.layout == "HND":
            caches = tuple(cache.transpose(1, 2) for cache in caches)
        out, result = empty_out(inputs)
        return prepare_torch(inputs, lambda: wrapper.run(q, caches, out=result), out)

    def _plan_decode(self, inputs: Inputs) -> Any:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        backend = "fa2" if self.tensor_core_decode else "auto"
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            _workspace(), inputs.case.layout, use_tensor_cores=self.tensor_core_decode, backend=backend
        )
        options = {"window_left": window_left(inputs.case), **_dtypes(inputs)}
        wrapper.plan(*_blocks(inputs), *_shape(inputs), **options)
        return wrapper


class FlashInferTensorCores(FlashInfer):
    """Decode on tensor cores: better for groups of four query heads and more, worse for ragged lengths."""

    name = "flashinfer-tc"
    title = "FlashInfer, tensor cores"
    tensor_core_decode = True


def _plan_prefill(inputs: Inputs) -> Any:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    case = inputs.case
    is_hopper = inputs.device.xp.cuda.Device().compute_capability == "90"
    backend = "fa3" if is_hopper and case.kv_dtype == case.dtype else "fa2"
    wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(), case.layout, backend=backend)
    query_starts = as_tensor(inputs.query_starts, "int32")
    options = {"causal": case.causal, "window_left": window_left(case), **_dtypes(inputs)}
    wrapper.plan(query_starts, *_blocks(inputs), *_shape(inputs), **options)
    return wrapper


def _workspace() -> Any:
    import torch

    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def _blocks(inputs: Inputs) -> list[Any]:
    """Where each sequence's blocks start, the blocks of all sequences, and the tokens in each one's last block."""
    tables, case = inputs.host_block_tables, inputs.case
    used = tables >= 0
    starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    last = (np.array(case.kv_lens) - 1) % case.block_size + 1
    return [as_tensor(inputs.device.put(host.astype(np.int32)), "int32") for host in (starts, tables[used], last)]


def _shape(inputs: Inputs) -> tuple[int, int, int, int]:
    case = inputs.case
    return case.heads, case.kv_heads, case.head_dim, case.block_size


def _dtypes(inputs: Inputs) -> dict[str, Any]:
    return {"q_data_type": torch_dtype(inputs.case.dtype), "kv_data_type": torch_dtype(inputs.case.kv_dtype)}
