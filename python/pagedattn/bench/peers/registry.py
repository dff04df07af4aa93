# SPDX-License-Identifier: Apache-2.0
"""The peers, by name."""

from __future__ import annotations

from ..cases import CaseError
from .base import Peer
from .fa3 import FlashAttention3
from .flashinfer import FlashInfer, FlashInferTensorCores
from .llama_cpp import LlamaCpp
from .torch_sdpa import Contiguous, Gathered, Plain
from .vllm_cpu import VllmCpu

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Contiguous(),
        Plain(),
        Gathered(),
        FlashAttention3(),
        FlashInfer(),
        FlashInferTensorCores(),
        VllmCpu(),
        LlamaCpp(),
    )
}


def find_peers(names: list[str]) -> list[Peer]:
    """Peers by name; ``all`` is every one."""
    if "all" in names:
        return list(PEERS.values())
    for name in names:
        if name not in PEERS:
            raise CaseError(f"--against must be all or one of {', '.join(PEERS)}; got {name}")
    return [PEERS[name] for name in dict.fromkeys(names)]
