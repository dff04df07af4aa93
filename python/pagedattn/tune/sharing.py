# SPDX-License-Identifier: Apache-2.0
"""How much of each prompt an earlier one begins with: what a prefix cache without end would find.

A prompt of a trace is a row of segments, so a tree of segments gives the longest common prefix with all earlier
prompts in one walk, for every block size at once and without a token being made.  A cache of whole blocks finds the
whole blocks of that prefix.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pagedattn.replay import Request


def shared_prefixes(requests: Iterable[Request]) -> NDArray[np.int64]:
    """Tokens ``[R]`` at the start of each prompt that some earlier prompt starts with too."""
    longest: dict[tuple[int, int], int] = {}  # (node, stream): most tokens of the stream that were seen there
    children: dict[tuple[int, int, int], int] = {}  # (node, stream, tokens): the node behind them
    return np.array([_walk(request, longest, children) for request in requests], np.int64)


def found_tokens(prompts: NDArray[np.int64], shared: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """Tokens ``[R]`` in whole blocks that the block manager finds cached, never a prompt's last token.

    A part of a block that it may find besides is copied, and saves no memory.
    """
    return np.minimum(shared, prompts - 1) // block_size * block_size


def _walk(request: Request, longest: dict[tuple[int, int], int], children: dict[tuple[int, int, int], int]) -> int:
    node, shared, common = 0, 0, True
    for stream, length in zip(request.streams.tolist(), request.lengths.tolist(), strict=True):
        seen = longest.get((node, stream), 0)
        longest[node, stream] = max(seen, length)
        if common:
            shared += min(seen, length)
        behind = (node, stream, length)
        common = common and behind in children
        node = children.setdefault(behind, len(children) + 1)
    return shared
