"""How fast is attention on the CPU: decode, prefill, chunks and mixes of them?

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import ClassVar

from .paged_batch import PagedBatch


class Decode:
    """One query token a sequence: bound by reading the cache."""

    params: ClassVar = [[(1, 1024), (1, 8192), (16, 1024)], ["float32", "float16", "bfloat16"]]
    param_names: ClassVar = ["sequences, length", "dtype"]

    def setup(self, case: tuple[int, int], dtype: str) -> None:
        num_seqs, length = case
        self.batch = PagedBatch([length] * num_seqs, [1] * num_seqs, dtype)
        self.batch.attend()

    def time_decode(self, case: tuple[int, int], dtype: str) -> None:
        self.batch.attend()


class DecodeSkewed:
    """One long sequence among short ones: is the long one divided among the threads?"""

    def setup(self) -> None:
        self.batch = PagedBatch([16384] + [64] * 15, [1] * 16)
        self.batch.attend()

    def time_decode(self) -> None:
        self.batch.attend()


class Prefill:
    """All tokens of a prompt at once: bound by arithmetic."""

    params: ClassVar = [[128, 512], ["float32", "bfloat16"]]
    param_names: ClassVar = ["length", "dtype"]

    def setup(self, length: int, dtype: str) -> None:
        self.batch = PagedBatch([length], [length], dtype)
        self.batch.attend()

    def time_prefill(self, length: int, dtype: str) -> None:
        self.batch.attend()


class Mixed:
    """A chunk of a long prompt beside decoding sequences, as continuous batching makes them."""

    def setup(self) -> None:
        self.batch = PagedBatch([2048] + [512] * 8, [128] + [1] * 8)
        self.batch.attend()

    def time_step(self) -> None:
        self.batch.attend()
