# SPDX-License-Identifier: Apache-2.0
"""The model whose cache is cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagedattn._device import ITEM_SIZE, out_dtype
from pagedattn.bench.cases import Case


class TuneError(ValueError):
    """A request cannot be served; the message names the option."""


@dataclass(frozen=True, slots=True)
class Model:
    """The shape of a model's attention: query heads, KV heads, head dimension, layers, and types."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 32
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise TuneError(f"--layers must be at least 1; got {self.layers}")
        self.case("shape", [1], [1], 1)  # checks the rest

    @property
    def slot_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * ITEM_SIZE[self.kv_dtype]

    @property
    def query_bytes(self) -> int:
        """Bytes of the query and the output of one token, and of the float32 numbers that the query is made from."""
        return self.heads * self.head_dim * (ITEM_SIZE[self.dtype] + ITEM_SIZE[out_dtype(self.dtype)] + 4)

    def case(self, name: str, q_lens: Sequence[int], kv_lens: Sequence[int], block_size: int) -> Case:
        """One attention call of one layer."""
        return Case(
            name,
            tuple(kv_lens),
            tuple(q_lens),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
        )
