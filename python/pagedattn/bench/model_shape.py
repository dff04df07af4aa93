# SPDX-License-Identifier: Apache-2.0
"""What every command asks of a model's heads."""

from __future__ import annotations

MAX_HEAD_DIM = 256


def check_heads(heads: int, kv_heads: int, head_dim: int, error: type[ValueError]) -> None:
    """Raise `error`, naming the option, where no kernel takes such heads.  All must be at least 1."""
    if heads % kv_heads:
        raise error(f"--heads must be a multiple of --kv-heads; got {heads} and {kv_heads}")
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise error(f"--head-dim must be a multiple of 8 up to {MAX_HEAD_DIM}; got {head_dim}")
