# SPDX-License-Identifier: Apache-2.0
"""Other people's attention, run on our arrays: one module a peer.

A peer is measured in the same run, on the same data and by the same clock as pagedattn.  None of them is a dependency:
a peer that cannot be imported, or cannot do a case, is named with the reason.
"""

from __future__ import annotations

from .base import Peer, Prepared, UnsupportedError
from .registry import PEERS, find_peers

__all__ = ["PEERS", "Peer", "Prepared", "UnsupportedError", "find_peers"]
