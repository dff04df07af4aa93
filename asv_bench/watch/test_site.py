# SPDX-License-Identifier: Apache-2.0
"""The site that asv makes of results opens in a browser, and a graph is drawn.

The results are those of record where there are some, and otherwise what the other tests have measured.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import browser
import pytest
from scratch import ROOT, Scratch

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def site(scratch: Scratch) -> Path:
    """The published site, with its scripts."""
    recorded = ROOT / "asv_bench" / "results"
    results = recorded if any(recorded.glob("*/*-*.json")) else scratch.results
    if not any(results.glob("*/*-*.json")):
        pytest.skip("there are no results yet; run test_watch.py too")
    scratch.publish(results)
    if browser.find_chromium() is None or shutil.which("npm") is None:
        pytest.skip("the site is made; Chromium and npm are needed to open it")
    browser.localise(scratch.html)
    return scratch.html


def graphs(site: Path, machine: str = "*") -> list[str]:
    """Benchmarks that have a value to show, of one machine."""
    found = set()
    for file in site.glob(f"graphs/**/machine-{machine}/**/*.json"):
        if file.stem != "summary":
            values = [value for _, value in json.loads(file.read_text())]
            if any(any(value) if isinstance(value, list) else value for value in values):
                found.add(file.stem)
    return sorted(found)


def test_the_page_of_a_benchmark_draws_its_graph(site: Path) -> None:
    chromium = browser.find_chromium()
    assert chromium is not None
    names = [name for name in graphs(site) if "time_" in name or "track_seconds" in name]
    assert names
    with browser.serve(site) as address:
        page = browser.load(chromium, f"{address}#{names[0]}", f"--screenshot={site.parent / 'graph.png'}")
    coloured = re.search(r'data-coloured="(\d+)"', page)
    assert coloured is not None, "there is no graph on the page"
    assert int(coloured[1]) > 20, "the graph is empty"


def test_the_list_of_benchmarks_names_them_all(site: Path) -> None:
    chromium = browser.find_chromium()
    assert chromium is not None
    shown = json.loads((site / "index.json").read_text())["graph_param_list"]
    assert shown
    with browser.serve(site) as address:
        for parameters in shown:
            # The page shows one machine, that to which it finds the most parameters.
            query = "&".join(f"{quote(key)}={quote(value)}" for key, value in parameters.items() if value)
            page = browser.load(chromium, f"{address}#summarylist?sort=0&dir=asc&{query}")
            names = graphs(site, parameters["machine"])
            assert names
            for name in names:
                assert name in page
