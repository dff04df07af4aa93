# SPDX-License-Identifier: Apache-2.0
"""What SGLang's prefix tree in Rust costs, in the units of `block_manager_units`.  Its class is called directly."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.unit_timing import BLOCK_SIZE, PROMPT, PROMPT_BLOCKS, best
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
from sglang.srt.mem_cache.rust_tree_core.extension import InsertParamsBinding, MatchParamsBinding, bindings
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from .sglang_tree import VERSION, keys, units

TITLE = "SGLang, Rust"
__all__ = ["TITLE", "UNITS", "VERSION"]


def tree() -> Any:
    params = CacheInitParams(False, None, None, BLOCK_SIZE, tree_components=(ComponentType.FULL,))
    return RustUnifiedTreeCore(params)._binding


def insert(cache: Any, key: RadixKey, slots: torch.Tensor) -> None:
    cache.insert(InsertParamsBinding(key=key.token_ids, value=slots))


def match(cache: Any, key: RadixKey) -> int:
    found = cache.match_prefix(MatchParamsBinding(key=key.token_ids))
    return int(found.device_prefix_len)


def hash_block() -> float:
    (key,) = keys(1, PROMPT)
    assert len(bindings.get_hash_str(key.token_ids, None, BLOCK_SIZE)) == PROMPT_BLOCKS
    return best(lambda _: bindings.get_hash_str(key.token_ids, None, BLOCK_SIZE), lambda: None, 50) / PROMPT_BLOCKS


UNITS = {"hash, a block": hash_block, **units(tree, insert, match)}
