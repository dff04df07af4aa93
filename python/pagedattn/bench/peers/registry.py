# SPDX-License-Identifier: Apache-2.0
"""The peers, by name."""

from __future__ import annotations

from ..cases import CaseError
from .base import Peer

PEERS: dict[str, Peer] = {}


def find_peers(names: list[str]) -> list[Peer]:
    """Peers by name; ``all`` is every one."""
    if "all" in names:
        return list(PEERS.values())
    for name in names:
        if name not in PEERS:
            raise CaseError(f"--against must be all or one of {', '.join(PEERS)}; got {name}")
    return [PEERS[name] for name in dict.fromkeys(names)]
