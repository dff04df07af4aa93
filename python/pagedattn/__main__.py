# SPDX-License-Identifier: Apache-2.0
"""``python -m pagedattn`` and the ``pagedattn`` command."""

from __future__ import annotations

import sys

# What the `cli` extra brings; anything else that is missing is a fault and keeps its traceback.
_EXTRA = ("typer", "rich")


def main() -> None:
    """Run the command line."""
    try:
        from pagedattn._cli import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        sys.exit(f"pagedattn: the command line needs {missing}: pip install 'pagedattn[cli]'")
    run()


if __name__ == "__main__":
    main()
