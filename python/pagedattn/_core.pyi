"""
The C ABI of pagedattn.
"""

from __future__ import annotations

import typing

import numpy
import numpy.typing

__all__: list[str] = [
    "build_info",
    "copy_blocks",
    "cuda_device",
    "cupy_layout_is_known",
    "device_count",
    "device_info",
    "flag",
    "gather_kv",
    "get_num_threads",
    "host_memory",
    "last_kernel",
    "merge_states",
    "paged_attention",
    "paged_attention_workspace_size",
    "read_blocks",
    "reshape_and_cache",
    "rope_and_cache",
    "set_num_threads",
    "swap_blocks",
    "whole_number",
]

def build_info() -> dict[str, typing.Any]: ...
def copy_blocks(caches: typing.Any, block_mapping: typing.Any, check: typing.Any, stream: typing.Any) -> None: ...
def cuda_device(array: typing.Any) -> int | None: ...
def cupy_layout_is_known() -> bool: ...
def device_count() -> int: ...
def device_info(device: int) -> dict[str, typing.Any]: ...
def flag(operation: str, argument: str, value: typing.Any) -> bool: ...
def gather_kv(
    k_cache: typing.Any,
    v_cache: typing.Any,
    block_tables: typing.Any,
    seq_lens: typing.Any,
    seq_starts: typing.Any,
    out_start_loc: typing.Any,
    k_scale: typing.Any,
    v_scale: typing.Any,
    k_out: typing.Any,
    v_out: typing.Any,
    kv_dtype: int,
    check: typing.Any,
    stream: typing.Any,
) -> None: ...
def get_num_threads() -> int: ...
def host_memory(num_bytes: int, device: int) -> numpy.ndarray: ...
def last_kernel() -> str: ...
def merge_states(outs: typing.Any, lses: typing.Any, out: typing.Any, lse: typing.Any, stream: typing.Any) -> None: ...
def paged_attention(
    q: typing.Any,
    k_cache: typing.Any,
    v_cache: typing.Any,
    block_tables: typing.Any,
    seq_lens: typing.Any,
    query_start_loc: typing.Any,
    alibi_slopes: typing.Any,
    sinks: typing.Any,
    q_scale: typing.Any,
    k_scale: typing.Any,
    v_scale: typing.Any,
    out: typing.Any,
    lse: typing.Any,
    workspace: typing.Any,
    max_query_len: typing.Any,
    scale: typing.Any,
    window: typing.Any,
    softcap: typing.Any,
    causal: typing.Any,
    kv_dtype: int,
    deterministic: typing.Any,
    check: typing.Any,
    stream: typing.Any,
) -> None: ...
def paged_attention_workspace_size(
    q: typing.Any,
    k_cache: typing.Any,
    v_cache: typing.Any,
    block_tables: typing.Any,
    seq_lens: typing.Any,
    query_start_loc: typing.Any,
    max_query_len: typing.Any,
    kv_dtype: int,
    deterministic: typing.Any,
) -> int: ...
def read_blocks(
    k_cache: numpy.ndarray,
    v_cache: numpy.ndarray,
    blocks: typing.Annotated[numpy.typing.ArrayLike, numpy.int32],
    passes: int,
) -> int: ...
def reshape_and_cache(
    key: typing.Any,
    value: typing.Any,
    k_cache: typing.Any,
    v_cache: typing.Any,
    slot_mapping: typing.Any,
    k_scale: typing.Any,
    v_scale: typing.Any,
    kv_dtype: int,
    check: typing.Any,
    stream: typing.Any,
) -> None: ...
def rope_and_cache(
    key: typing.Any,
    value: typing.Any,
    k_cache: typing.Any,
    v_cache: typing.Any,
    slot_mapping: typing.Any,
    positions: typing.Any,
    cos_sin: typing.Any,
    query: typing.Any,
    query_out: typing.Any,
    interleaved: typing.Any,
    k_scale: typing.Any,
    v_scale: typing.Any,
    kv_dtype: int,
    check: typing.Any,
    stream: typing.Any,
) -> None: ...
def set_num_threads(num_threads: typing.Any) -> None: ...
def swap_blocks(
    src: typing.Any, dst: typing.Any, block_mapping: typing.Any, event: typing.Any, stream: typing.Any
) -> None: ...
def whole_number(operation: str, argument: str, value: typing.Any, least: int) -> int: ...
