# SPDX-License-Identifier: Apache-2.0
"""The exceptions that pagedattn raises."""

from __future__ import annotations


class PagedAttnError(Exception):
    """Base of every error that pagedattn raises itself."""


class InvalidArgumentError(PagedAttnError, ValueError):
    """An argument is wrong.  Nothing was launched or written."""


class UnsupportedError(PagedAttnError, NotImplementedError):
    """The arguments are consistent, but this build or device cannot serve them."""


class DeviceError(PagedAttnError, RuntimeError):
    """No usable CUDA device or driver, or the CUDA runtime reported an error."""


class OutOfMemoryError(PagedAttnError, MemoryError):
    """Memory for an operation's scratch or output, or for a cache, could not be allocated."""


class OutOfBlocks(PagedAttnError):
    """The block pool cannot serve a request.  The manager's state is as it was.

    Attributes
    ----------
    needed : int
        Blocks that the request needs.
    free : int
        Blocks that could be had, evictable cached ones included.
    """

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free
