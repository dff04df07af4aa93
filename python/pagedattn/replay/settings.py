# SPDX-License-Identifier: Apache-2.0
"""What a replay is asked to do, checked before anything is allocated."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pagedattn._device import DTYPES, FP8_DTYPES, ITEM_SIZE, Backend
from pagedattn._units import show_bytes
from pagedattn.bench.model_shape import check_heads

LARGEST = {"float8_e4m3": 448.0, "float8_e5m2": 57344.0}  # finite values of the 8-bit floats

DEFAULT_NUM_BLOCKS = 512
MAX_BLOCKS = 2**31 - 1  # block tables are int32
MAX_VERIFY = 10**6  # rows of a step

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class SettingsError(ValueError):
    """An option of the replay is wrong, or does not go with another."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The model's shape, the cache's size and the scheduler's limits.

    Attributes
    ----------
    backend : {"cpu", "cuda"}
        Where the operations run.
    dtype : str
        Type of queries, keys, values and output: float32, float16 or bfloat16.
    kv_dtype : str, optional
        Type of the cache: `dtype` (None), float8_e4m3 or float8_e5m2.
    layers, heads, kv_heads, head_dim : int
        Shape of the model.
    block_size : int
        Tokens a block.
    num_blocks, memory : int, optional
        Size of the cache in blocks, or in bytes for the keys and values of all layers; not both.
    max_batch : int
        Sequences that run at a time, each sample of a request counted.
    chunk : int
        Prompt tokens computed in one step at most.
    seed : int
        Chooses vectors, sampled tokens and the rows to verify.
    verify : int
        Rows of each step that are compared with a dense computation.
    """

    backend: Backend = "cpu"
    dtype: str = "float32"
    kv_dtype: str | None = None
    layers: int = 2
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    num_blocks: int | None = None
    memory: int | None = None
    max_batch: int = 32
    chunk: int = 512
    seed: int = 0
    verify: int = 2

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "head_dim", "block_size", "max_batch", "chunk"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        _at_least("verify", self.verify, 0)
        if self.verify > MAX_VERIFY:
            raise SettingsError(f"--verify must be at most {MAX_VERIFY}; got {self.verify}")
        if self.backend not in ("cpu", "cuda"):
            raise SettingsError(f"--backend must be auto, cpu or cuda; got {self.backend}")
        if self.dtype not in DTYPES:
            raise SettingsError(f"--dtype must be one of {', '.join(DTYPES)}; got {self.dtype}")
        self._check_kv_dtype()
        check_heads(self.heads, self.kv_heads, self.head_dim, SettingsError)
        self._check_cache_size()

    def _check_kv_dtype(self) -> None:
        if self.kv_dtype is None or self.kv_dtype == self.dtype:
            return
        if self.kv_dtype not in FP8_DTYPES:
            allowed = ", ".join((self.dtype, *FP8_DTYPES))
            raise SettingsError(f"--kv-dtype must be one of {allowed} with --dtype {self.dtype}; got {self.kv_dtype}")
        if self.dtype == "float32":
            raise SettingsError(f"--kv-dtype {self.kv_dtype} needs --dtype float16 or bfloat16; got float32")

    def _check_cache_size(self) -> None:
        if self.num_blocks is not None and self.memory is not None:
            raise SettingsError("--num-blocks and --memory both size the cache: give one of them")
        if self.num_blocks is not None:
            _at_least("num_blocks", self.num_blocks, 1)
            if self.num_blocks > MAX_BLOCKS:
                raise SettingsError(f"--num-blocks must be at most {MAX_BLOCKS}; got {self.num_blocks}")
        if self.memory is not None and not self.block_bytes <= self.memory <= self.block_bytes * MAX_BLOCKS:
            raise SettingsError(
                f"--memory must hold at least one block, which takes {show_bytes(self.block_bytes)} "
                f"over all layers, and at most {MAX_BLOCKS} of them; got {show_bytes(self.memory)}"
            )

    @property
    def cache_dtype(self) -> str:
        """Type of the cache's elements."""
        return self.kv_dtype or self.dtype

    @property
    def quantised(self) -> bool:
        """Whether the cache holds 8-bit floats."""
        return self.cache_dtype in FP8_DTYPES

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.kv_heads * self.head_dim * ITEM_SIZE[self.cache_dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of all layers."""
        return self.layers * self.block_size * self.token_bytes

    def rows(self, num_blocks: int) -> int:
        """Tokens that one step computes at most; each needs a slot of its own."""
        return min(self.max_batch + self.chunk, num_blocks * self.block_size)

    def working_bytes(self, num_blocks: int) -> int:
        """Bytes of the arrays beside the cache: q, k, v and out of a step, with the hashes behind them."""
        vectors = self.rows(num_blocks) * (2 * self.heads + 2 * self.kv_heads)
        lanes = self.layers * (self.heads + 2 * self.kv_heads)
        return vectors * (self.head_dim * ITEM_SIZE[self.dtype] + 3 * 8) + 8 * lanes

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def pool_size(self, longest: int) -> int:
        """Blocks of the cache, for a trace whose longest sequence has `longest` tokens.

        Without --num-blocks and --memory: the default, or room for two of the longest where that is more.
        """
        if self.num_blocks is not None:
            return self.num_blocks
        if self.memory is not None:
            return self.memory // self.block_bytes
        return min(MAX_BLOCKS, max(DEFAULT_NUM_BLOCKS, 2 * self.blocks(longest)))


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise SettingsError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")


def parse_bytes(text: str) -> int:
    """Bytes from a size as people write it: ``512MiB``, ``1.5G``, ``4096``."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS:
        raise SettingsError(f"--memory must be a size such as 512MiB or 2GB; got {text}")
    size = float(match[1]) * _UNITS[match[2]]
    if not math.isfinite(size) or size < 1:
        raise SettingsError(f"--memory must be at least one byte; got {text}")
    return int(size)
