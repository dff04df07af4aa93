# SPDX-License-Identifier: Apache-2.0
"""torch's scaled_dot_product_attention: the cost of attention without paging, and without a paged kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pagedattn._device import Backend

from ..cases import Case
from ..inputs import Inputs
from .base import Peer, Prepared, UnsupportedError, require_no_window
from .torch_arrays import (
    as_tensor,
    empty_out,
    prepare_torch,
    refusals,
    require_unquantised,
    torch_missing,
    torch_version,
    use_our_threads,
    valid_block_tables,
)


class _Sdpa(Peer):
    """torch's scaled_dot_product_attention, which knows no pages."""

    def missing(self, backend: Backend) -> str:
        return torch_missing(backend)

    def version(self) -> str:
        return torch_version()


class Contiguous(_Sdpa):
    """Keys and values in one piece, laid out head by head beforehand: the yardstick for the cost of paging.

    In decode on the CPU the query heads of one KV head go as the rows of one: torch would read K and V once for each.
    """

    name = "contiguous"
    title = "torch SDPA, contiguous KV"

    def prepare(self, inputs: Inputs) -> Prepared:
        _require_dense(inputs.case)
        with refusals():
            keys, values = (cache.contiguous() for cache in _gather(inputs)())
        return _prepare(inputs, lambda: (keys, values))


class Plain(_Sdpa):
    """The call as a model makes it, over keys and values that lie token by token as its projections wrote them."""

    name = "plain"
    title = "torch SDPA, plain call"

    def missing(self, backend: Backend) -> str:
        return "on CUDA its fast kernels take either call alike" if backend == "cuda" else super().missing(backend)

    def prepare(self, inputs: Inputs) -> Prepared:
        _require_dense(inputs.case)
        with refusals():
            keys, values = _gather(inputs)()
        return _prepare(inputs, lambda: (keys, values), as_rows=False)


class Gathered(_Sdpa):
    """The sequences' blocks copied together by indexing, in each call: what one does without a paged kernel."""

    name = "gathered"
    title = "torch SDPA, gathered pages"

    def prepare(self, inputs: Inputs) -> Prepared:
        _require_dense(inputs.case)
        return _prepare(inputs, _gather(inputs))


def _require_dense(case: Case) -> None:
    require_unquantised(case)
    require_no_window(case)
    if len(set(case.kv_lens)) > 1:
        raise UnsupportedError("lengths differ")
    if len(set(case.q_lens)) > 1:
        raise UnsupportedError("query lengths differ")
    if case.causal and 1 < case.q_lens[0] < case.kv_lens[0]:
        raise UnsupportedError("its causal mask has as many query tokens as keys")


def _gather(inputs: Inputs) -> Callable[[], tuple[Any, Any]]:
    """A call that gives keys and values [B, Hkv, L, D]: views of a copy [B, L, Hkv, D]."""
    case = inputs.case
    blocks = valid_block_tables(inputs).long()
    k_cache, v_cache = (as_tensor(cache, case.kv_dtype) for cache in (inputs.k_cache, inputs.v_cache))
    shape = (len(case.kv_lens), -1, case.kv_heads, case.head_dim)

    def gather() -> tuple[Any, Any]:
        keys, values = (cache[blocks].reshape(shape)[:, : case.kv_lens[0]] for cache in (k_cache, v_cache))
        return keys.transpose(1, 2), values.transpose(1, 2)

    return gather


def _prepare(inputs: Inputs, keys_and_values: Callable[[], tuple[Any, Any]], *, as_rows: bool = True) -> Prepared:
    from torch.nn.functional import scaled_dot_product_attention as attention

    case = inputs.case
    sequences, q_len = len(case.kv_lens), case.q_lens[0]
    use_our_threads()
    q = as_tensor(inputs.q, case.dtype)
    out, result = empty_out(inputs)
    as_rows = as_rows and q_len == 1 and inputs.device.backend == "cpu"
    if as_rows:
        q = q.view(sequences, case.kv_heads, -1, case.head_dim)
        result = result.view(q.shape)
    else:
        q = q.view(sequences, q_len, case.heads, case.head_dim).transpose(1, 2)
        result = result.view(sequences, q_len, case.heads, case.head_dim).transpose(1, 2)
    causal = case.causal and q_len > 1

    def run() -> None:
        with _fast_kernels(inputs):
            keys, values = keys_and_values()
            result.copy_(attention(q, keys, values, is_causal=causal, enable_gqa=not as_rows))

    return prepare_torch(inputs, run, out)


def _fast_kernels(inputs: Inputs) -> AbstractContextManager[Any]:
    """The kernels worth measuring on a GPU: cuDNN's and FlashAttention's, which have no float32."""
    if inputs.device.backend == "cpu" or inputs.case.dtype == "float32":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends: AbstractContextManager[Any] = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
    return backends
