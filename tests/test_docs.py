"""What the pages and docstrings show runs as it stands and prints what they say.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import runpy
from pathlib import Path
from typing import Any

import pagedattn
import pytest
from installed import REPOSITORY

code_blocks = runpy.run_path(str(REPOSITORY / "tools/readme.py"))["code_blocks"]


def python_blocks(page: str) -> list[Any]:
    return [block for block in code_blocks(REPOSITORY / page) if block.language == "python"]


def check_prints(code: str, page: str, line: int, namespace: dict[str, Any]) -> None:
    """Run a block; each `print(...)  # text` in it must print the text."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
    assert printed.getvalue().splitlines() == expected


def module_names() -> list[str]:
    return [name for _, name, _ in pkgutil.walk_packages(pagedattn.__path__, "pagedattn.") if "__main__" not in name]


@pytest.mark.parametrize("name", module_names())
def test_the_examples_in_a_module_print_what_they_say(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_operations_have_examples() -> None:
    finder = doctest.DocTestFinder()
    without = [
        name
        for name in pagedattn.__all__
        if name.islower() and "_dir" not in name and callable(getattr(pagedattn, name))
        if not any(test.examples for test in finder.find(getattr(pagedattn, name), name))
    ]
    assert set(without) <= {"get_include", "get_num_threads", "show_config"}


def test_the_numpy_example_of_the_readme_runs_as_it_stands() -> None:
    (block,) = [block for block in python_blocks("README.md") if block.heading == "NumPy"]
    check_prints(block.code, "README.md", block.line, {})


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_the_cupy_example_of_the_readme_runs_as_it_stands() -> None:
    (block,) = [block for block in python_blocks("README.md") if block.heading == "CuPy"]
    check_prints(block.code, "README.md", block.line, {})


@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/block-manager.md", "docs/moving-blocks.md"])
def test_the_blocks_of_a_page_run_one_after_the_other(page: str) -> None:
    namespace: dict[str, Any] = {}
    for block in python_blocks(page):
        check_prints(block.code, page, block.line, namespace)


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert Path(page.parent, target).exists(), f"{page.name} links to {target}"
