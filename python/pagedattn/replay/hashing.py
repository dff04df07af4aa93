# SPDX-License-Identifier: Apache-2.0
"""A counter-based hash: every number of the replay is a function of where it stands, so none is stored.

The finaliser of splitmix64 (Steele, Lea and Flood, 2014) turns a 64-bit counter into 64 random-looking bits.  It needs
wrap-around integer arithmetic only, so NumPy and CuPy give the same values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# The golden ratio as a 64-bit fraction: successive multiples of it are spread evenly over the 64-bit range.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = 2**64 - 1
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def mix(x: Any) -> Any:
    """Scramble an array of uint64 (NumPy or CuPy), element by element."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit number from several: a name for a stream of tokens or a lane of vectors."""
    state = 0
    for part in parts:
        state = _mix_int(((state ^ (part & _MASK)) + int(GOLDEN)) & _MASK)
    return state


def _mix_int(x: int) -> int:
    # `mix` for one number: a NumPy array of one element would take ten times as long.
    x = ((x ^ (x >> 30)) * int(_M1)) & _MASK
    x = ((x ^ (x >> 27)) * int(_M2)) & _MASK
    return x ^ (x >> 31)
