# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's attention on the CPU: ggml's flash attention, from the libraries that `llama-cpp-python` ships.

llama.cpp has no blocks: each sequence's keys and values lie in one piece, token by token.  A graph of that one
operation is built through ggml's C interface, with ggml's own memory, since it wants its own alignment.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import c_bool, c_char, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pagedattn
from pagedattn._device import ELEMENT, STORAGE, Backend

from ..cases import Case
from ..inputs import Inputs, to_host
from .base import Peer, Prepared, UnsupportedError, require_no_window

_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}  # enum ggml_type
_SUCCESS = 0  # enum ggml_status
_MASK_ROWS = 64  # older versions want a mask padded to it
_ROOM = 1 << 20  # bytes for what ggml keeps beside the data of a handful of tensors
_PARAMETER_BYTES = 4096  # more than ggml_threadpool_params has in any version


class LlamaCpp(Peer):
    """ggml's flash attention on keys and values in one piece."""

    name = "llama.cpp"
    title = "llama.cpp"

    def missing(self, backend: Backend) -> str:
        if backend != "cpu":
            return "measured on the CPU only"
        spec = find_spec("llama_cpp")
        if spec is None:
            return "llama-cpp-python is not installed: pip install llama-cpp-python"
        return "" if _library() else "llama-cpp-python has no libggml.so"

    def version(self) -> str:
        return f"llama-cpp-python {metadata.version('llama-cpp-python')}"

    def prepare(self, inputs: Inputs) -> Prepared:
        case = inputs.case
        require_no_window(case)
        if case.kv_dtype not in _TYPES:
            raise UnsupportedError(f"no {case.kv_dtype} cache")
        if len(set(case.kv_lens)) > 1 or len(set(case.q_lens)) > 1:
            raise UnsupportedError("lengths differ")
        graph = _Graph(case)
        graph.q[...] = to_host(inputs.device, inputs.q, case.dtype).reshape(graph.q.shape)
        for row in range(len(case.kv_lens)):
            blocks = inputs.host_block_tables[row]  # equal lengths: all of a row are used
            for mine, source in ((graph.keys, inputs.k_cache), (graph.values, inputs.v_cache)):
                tokens = source.view(STORAGE[case.kv_dtype])[blocks].reshape(-1, case.kv_heads, case.head_dim)
                mine[row] = tokens[: case.kv_lens[0]]
        return Prepared(graph.compute, graph.out.reshape(inputs.q.shape))


class _Graph:
    """Attention as a graph of ggml, and its tensors as arrays [B, tokens, heads, D] on ggml's memory."""

    def __init__(self, case: Case) -> None:
        library = self._library = _load()
        sequences, q_len, kv_len = len(case.kv_lens), case.q_lens[0], case.kv_lens[0]
        q_shape = (sequences, q_len, case.heads, case.head_dim)
        kv_shape = (sequences, kv_len, case.kv_heads, case.head_dim)
        mask_shape = (1, 1, -(-q_len // _MASK_ROWS) * _MASK_ROWS, kv_len)
        dtype = case.dtype
        # q, the result and the result in q's type; keys and values; the mask.
        size = 3 * 4 * prod(q_shape) + case.cache_bytes + 2 * prod(mask_shape) + _ROOM
        context = library.ggml_init(_InitParams(size, None, False))
        if not context:
            raise UnsupportedError(f"ggml cannot have {size} bytes")
        backend = library.ggml_backend_cpu_init()
        parameters = ctypes.create_string_buffer(_PARAMETER_BYTES)
        library.ggml_threadpool_params_init(parameters, pagedattn.get_num_threads())
        pool = library.ggml_threadpool_new(parameters)
        library.ggml_backend_cpu_set_n_threads(backend, pagedattn.get_num_threads())
        library.ggml_backend_cpu_set_threadpool(backend, pool)

        def tensor(name: str, shape: tuple[int, ...]) -> tuple[Any, NDArray[Any]]:
            made = library.ggml_new_tensor_4d(context, _TYPES[name], *reversed(shape))
            return made, _array(library.ggml_get_data(made), name, shape)

        def heads_first(made: Any) -> Any:
            return library.ggml_permute(context, made, 0, 2, 1, 3)

        q, self.q = tensor("float32", q_shape)
        keys, self.keys = tensor(dtype, kv_shape)
        values, self.values = tensor(dtype, kv_shape)
        mask = None
        if case.causal and q_len > 1:
            mask, visible = tensor("float16", mask_shape)
            visible[...] = np.where(np.tri(mask_shape[2], kv_len, kv_len - q_len), 0, -np.inf)
        self.keys, self.values = (array.view(STORAGE[dtype]) for array in (self.keys, self.values))
        scale = case.head_dim**-0.5
        result = library.ggml_flash_attn_ext(
            context, heads_first(q), heads_first(keys), heads_first(values), mask, scale, 0.0, 0.0
        )
        if dtype != "float32":
            result = library.ggml_cast(context, result, _TYPES[dtype])
        self.out = _array(library.ggml_get_data(result), dtype, q_shape)
        self._graph = library.ggml_new_graph(context)
        library.ggml_build_forward_expand(self._graph, result)
        self._backend = backend
        weakref.finalize(self.out.base, _free, library, backend, pool, context)

    def compute(self) -> None:
        """Run the graph."""
        if self._library.ggml_backend_graph_compute(self._backend, self._graph) != _SUCCESS:
            raise RuntimeError("ggml_backend_graph_compute failed")


def _array(address: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    memory = (c_char * (prod(shape) * ELEMENT[dtype].itemsize)).from_address(address)
    return np.frombuffer(memory, ELEMENT[dtype]).reshape(shape)


def _free(library: Any, backend: Any, pool: Any, context: Any) -> None:
    library.ggml_backend_free(backend)
    library.ggml_threadpool_free(pool)
    library.ggml_free(context)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_4d": (c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_int64),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_permute": (c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int),
    "ggml_cast": (c_void_p, c_void_p, c_void_p, c_int),
    "ggml_flash_attn_ext": (c_void_p, *(c_void_p,) * 5, c_float, c_float, c_float),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_threadpool_params_init": (None, c_void_p, c_int),
    "ggml_threadpool_new": (c_void_p, c_void_p),
    "ggml_threadpool_free": (None, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_set_threadpool": (None, c_void_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_free": (None, c_void_p),
}


def _library() -> Path | None:
    spec = find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, "lib", "libggml.so")
        if path.is_file():
            return path
    return None


@cache
def _load() -> Any:
    """ggml's libraries: a look-up in libggml.so finds what the ones it needs have, too."""
    path = _library()
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UnsupportedError(f"libggml.so cannot be used: {error}") from error
    return library
