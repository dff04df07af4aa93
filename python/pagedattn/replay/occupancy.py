# SPDX-License-Identifier: Apache-2.0
"""How full the cache is, and how full it would be without paging."""

from __future__ import annotations

from collections.abc import Collection


class Occupancy:
    """Sums over the steps of slots that were allocated and slots that held a token.

    Paged, only the end of a sequence's last block is empty.  Contiguous allocation, the way before paging, reserves one
    stretch for each sequence when it starts: as long as the longest sequence of all, or, with an oracle, as long as
    this one will get.  It cannot share, so every sequence stores its prefix itself.

    Parameters
    ----------
    block_size : int
        Tokens a block.
    """

    def __init__(self, block_size: int) -> None:
        self.peak_blocks = 0
        self._block_size = block_size
        self._allocated = 0
        self._empty = 0
        self._sequences = 0
        self._stored = 0
        self._final = 0

    def record(self, *, in_use: int, stored: Collection[int], own: Collection[int], final: Collection[int]) -> bool:
        """Account for one step; true if more blocks are in use than ever before.

        Parameters
        ----------
        in_use : int
            Blocks that sequences hold; shared ones count once.
        stored : collection of int
            Tokens in the cache of each sequence.
        own : collection of int
            The same of those sequences only whose last block is not also counted for another.
        final : collection of int
            Tokens each sequence will have in the end.
        """
        self._allocated += in_use * self._block_size
        self._empty += sum(-tokens % self._block_size for tokens in own)
        self._sequences += len(stored)
        self._stored += sum(stored)
        self._final += sum(final)
        fullest = in_use > self.peak_blocks
        self.peak_blocks = max(self.peak_blocks, in_use)
        return fullest

    @property
    def waste_paged(self) -> float:
        """Empty slots of allocated blocks, as a fraction of the allocated slots."""
        return self._empty / max(1, self._allocated)

    def waste_at_length(self, length: int) -> float:
        """The same if every sequence reserved `length` slots."""
        return 1 - self._stored / max(1, length * self._sequences)

    @property
    def waste_at_final_length(self) -> float:
        """The same if every sequence reserved what it will need in the end."""
        return 1 - self._stored / max(1, self._final)
