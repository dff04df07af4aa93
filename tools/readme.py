"""Print the code blocks of a Markdown file, so that what a page tells people to run is what the checks run.

SPDX-License-Identifier: Apache-2.0

    python tools/readme.py README.md sh --under "Run the tests"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple


class Block(NamedTuple):
    """One fenced code block, the heading it stands under and the line its code begins on."""

    heading: str
    language: str
    line: int
    code: str


def code_blocks(path: Path) -> list[Block]:
    """Return the fenced code blocks of a Markdown file, in order."""
    blocks: list[Block] = []
    heading, language, start = "", "", 0
    code: list[str] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if code is None and line.startswith("```"):
            language, start, code = line[3:].strip(), number + 1, []
        elif code is None and line.startswith("#"):
            heading = line.lstrip("#").strip()
        elif code is not None and line.startswith("```"):
            blocks.append(Block(heading, language, start, "\n".join([*code, ""])))
            code = None
        elif code is not None:
            code.append(line)
    return blocks


def main() -> int:
    """Print the one block that the arguments name; fail where there is none or more than one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("language")
    parser.add_argument("--under", required=True, help="the heading that the block stands under")
    arguments = parser.parse_args()
    found = [
        block
        for block in code_blocks(arguments.file)
        if (block.heading, block.language) == (arguments.under, arguments.language)
    ]
    if len(found) != 1:
        print(
            f"{arguments.file} has {len(found)} blocks of {arguments.language} under {arguments.under!r}, not one",
            file=sys.stderr,
        )
        return 1
    print(found[0].code, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
