"""
The C ABI of pagedattn.
"""

from __future__ import annotations

import typing

__all__: list[str] = [
    "build_info",
    "copy_blocks",
    "device_count",
    "device_info",
    "gather_kv",
    "get_num_threads",
    "last_kernel",
    "merge_states",
    "paged_attention",
    "paged_attention_workspace_size",
    "reshape_and_cache",
    "set_num_threads",
    "swap_blocks",
]

def build_info() -> dict[str, typing.Any]: ...
def copy_blocks(arg0: typing.Any, arg1: typing.Any, arg2: int, arg3: int) -> None: ...
def device_count() -> int: ...
def device_info(device: int) -> dict[str, typing.Any]: ...
def gather_kv(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: typing.Any,
    arg10: int,
    arg11: int,
    arg12: int,
) -> None: ...
def get_num_threads() -> int: ...
def last_kernel() -> str: ...
def merge_states(arg0: typing.Any, arg1: typing.Any, arg2: typing.Any, arg3: typing.Any, arg4: int) -> None: ...
def paged_attention(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: typing.Any,
    arg8: typing.Any,
    arg9: typing.Any,
    arg10: typing.Any,
    arg11: typing.Any,
    arg12: typing.Any,
    arg13: float,
    arg14: int,
    arg15: float,
    arg16: bool,
    arg17: int,
    arg18: bool,
    arg19: int,
    arg20: int,
) -> None: ...
def paged_attention_workspace_size(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: int,
    arg7: bool,
    arg8: int,
) -> int: ...
def reshape_and_cache(
    arg0: typing.Any,
    arg1: typing.Any,
    arg2: typing.Any,
    arg3: typing.Any,
    arg4: typing.Any,
    arg5: typing.Any,
    arg6: typing.Any,
    arg7: int,
    arg8: int,
    arg9: int,
) -> None: ...
def set_num_threads(num_threads: int) -> None: ...
def swap_blocks(arg0: typing.Any, arg1: typing.Any, arg2: typing.Any, arg3: int) -> None: ...
