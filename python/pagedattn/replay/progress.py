# SPDX-License-Identifier: Apache-2.0
"""What a replay shows of itself while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pagedattn._progress

from .engine import Progress


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[Progress], None]]:
    """A callback for :func:`replay` that shows on standard error where it stands."""
    with pagedattn._progress.show_progress("replay", "requests", total) as update:
        yield lambda progress: update(progress.requests_done, _facts(progress))


def _facts(progress: Progress) -> str:
    rate = progress.tokens / max(progress.seconds, 1e-9)
    return (
        f"{rate:.0f} tokens/s  {progress.blocks_in_use}/{progress.num_blocks} blocks  "
        f"{100 * progress.hit_rate:.0f} % prefix hits"
    )
