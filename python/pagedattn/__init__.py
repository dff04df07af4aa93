# SPDX-License-Identifier: Apache-2.0
"""Attention over a paged KV cache: CUDA and CPU kernels behind one contract, and a block manager."""

from __future__ import annotations

from pagedattn._attention import merge_states, paged_attention, paged_attention_workspace_size
from pagedattn._block_manager import BlockManager, StepBatch
from pagedattn._cache_operations import (
    copy_blocks,
    gather_kv,
    reshape_and_cache,
    rope_and_cache,
    swap_blocks,
)
from pagedattn._config import (
    config,
    get_cmake_dir,
    get_include,
    get_library_dir,
    get_num_threads,
    last_kernel,
    set_num_threads,
    show_config,
)
from pagedattn._errors import (
    DeviceError,
    InvalidArgumentError,
    OutOfBlocks,
    OutOfMemoryError,
    PagedAttnError,
    UnsupportedError,
)
from pagedattn._host_cache import HostCache
from pagedattn._kv_cache import KVCache
from pagedattn._version import __version__

__all__ = [
    "BlockManager",
    "DeviceError",
    "HostCache",
    "InvalidArgumentError",
    "KVCache",
    "OutOfBlocks",
    "OutOfMemoryError",
    "PagedAttnError",
    "StepBatch",
    "UnsupportedError",
    "__version__",
    "config",
    "copy_blocks",
    "gather_kv",
    "get_cmake_dir",
    "get_include",
    "get_library_dir",
    "get_num_threads",
    "last_kernel",
    "merge_states",
    "paged_attention",
    "paged_attention_workspace_size",
    "reshape_and_cache",
    "rope_and_cache",
    "set_num_threads",
    "show_config",
    "swap_blocks",
]
