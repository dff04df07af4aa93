# SPDX-License-Identifier: Apache-2.0
"""What a peer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pagedattn._device import Backend

from ..cases import Case
from ..inputs import Inputs


class UnsupportedError(Exception):
    """A peer cannot do this case; the message says why."""


def require_no_window(case: Case) -> None:
    """Raise UnsupportedError for a window."""
    if case.window is not None:
        raise UnsupportedError("no window")


def window_left(case: Case) -> int:
    """How many tokens a query token sees before its own, as FlashAttention and others count a window; -1 is all."""
    if case.window is None:
        return -1
    if not case.causal:
        raise UnsupportedError("its window lies around each query token, and ours at the end of the sequence")
    return case.window - 1


@dataclass(frozen=True, slots=True)
class Prepared:
    """A peer's call on one case, everything but the call itself done.

    Attributes
    ----------
    call : callable
        Enqueues (CUDA) or does (CPU) the work.  On CUDA it runs on CuPy's current stream.
    out : array [T, Hq, D]
        Where the result goes: an array of the backend's module (or a view of the peer's tensor as one).
    uses_torch : bool
        Whether the call runs torch operations, so that a CUDA graph of it must be captured by torch, whose memory
        would else be handed out again while the graph still writes to it.
    capturable : bool
        Whether a CUDA graph of the call does the same as the call.
    """

    call: Callable[[], None]
    out: Any
    uses_torch: bool = False
    capturable: bool = True


class Peer(ABC):
    """One way to do attention that is not ours."""

    name: ClassVar[str]
    """What ``--against`` calls it."""

    title: ClassVar[str]
    """What tables call it."""

    @abstractmethod
    def missing(self, backend: Backend) -> str:
        """Why it cannot run on this backend here, with what to install; "" if it can.  Imports nothing heavy twice."""

    @abstractmethod
    def version(self) -> str:
        """The version that runs, such as "torch 2.13.0"."""

    @abstractmethod
    def prepare(self, inputs: Inputs) -> Prepared:
        """Bring a case into the form that the peer takes.

        Raises
        ------
        UnsupportedError
            The peer has no such operation: ragged lengths, an 8-bit cache, a block size.
        """
