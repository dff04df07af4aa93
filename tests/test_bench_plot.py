"""Plots of a bench document: what is on them, and that names keep clear of each other.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import builtins
import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from bench_documents import DECODE, PREFILL, bench_document
from hypothesis import given
from hypothesis import strategies as st
from pagedattn.bench import plot, plot_page
from pagedattn.bench.plot import PlotError, plot_relative_times, plot_roofline


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib")


def words(svg: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["plot.jpg", "plot", "plot.svgz"])
def test_another_suffix_is_refused_and_the_allowed_ones_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlotError, match=rf"--plot .* \.svg, \.png, \.pdf; got {re.escape(name)}$"):
        plot_roofline(bench_document(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(PlotError, match=r"pip install 'pagedattn\[plot\]'"):
        plot_roofline(bench_document(), tmp_path / "plot.svg")


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize(("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".PDF", b"%PDF")])
def test_the_suffix_chooses_the_format_and_the_same_document_gives_the_same_bytes(
    suffix: str, magic: bytes, tmp_path: Path
) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    plot_roofline(bench_document(), first)
    plot_roofline(bench_document(), second)
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.usefixtures("matplotlib")
def test_the_roofline_names_cases_peers_and_measured_roofs(tmp_path: Path) -> None:
    plot_roofline(bench_document(), tmp_path / "plot.svg")
    found = words(tmp_path / "plot.svg")
    for case in (*DECODE, *PREFILL):
        assert found.count(case) == 2, "once under the roof, once as a row"
    titles = {"pagedattn", "FlashAttention-3", "FlashInfer", "torch SDPA, contiguous"}
    assert titles <= set(found)
    assert "vLLM" not in found, "a missing peer has no mark"
    assert {"reading memory: 3.12 TB/s", "matrix product: 694 TFLOP/s", "Sample accelerator 80 GB"} <= set(found)
    assert {"97 %", "83 %"} <= set(found), "our shares of the roof"


@pytest.mark.usefixtures("matplotlib")
def test_names_under_the_roof_do_not_overlap(tmp_path: Path) -> None:
    plot_roofline(bench_document(), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    boxes = []
    for x, y, name in re.findall(r"<text[^>]*x=\"([\d.]+)\" y=\"([\d.]+)\"[^>]*>([^<]*)</text>", text):
        if name in DECODE or name in PREFILL:
            boxes.append((float(x), float(y), float(x) + 0.5 * plot_page.FONT * len(name)))
            assert boxes[-1][2] < width
            assert float(y) < height
    assert len(boxes) >= len(DECODE) + len(PREFILL)
    for (left, y, right), (other_left, other_y, other_right) in itertools.combinations(boxes, 2):
        assert abs(y - other_y) > plot_page.FONT or right < other_left or other_right < left


@pytest.mark.usefixtures("matplotlib")
def test_relative_times_show_ours_over_the_best_peer_be_it_slower_or_faster(tmp_path: Path) -> None:
    plot_relative_times(bench_document(), tmp_path / "decode.svg", "decode")
    plot_relative_times(bench_document(), tmp_path / "prefill.svg", "prefill")
    decode, prefill = words(tmp_path / "decode.svg"), words(tmp_path / "prefill.svg")
    assert set(DECODE) <= set(decode)
    assert not set(PREFILL) & set(decode)
    assert "0.88" in decode, "6.1 over 6.9 µs"
    assert "1.03" in decode, "720 over 700 µs"
    assert "1.08" in prefill, "1030 over 952 µs"


@pytest.mark.usefixtures("matplotlib")
def test_an_svg_bears_the_digest_of_its_document(tmp_path: Path) -> None:
    document = bench_document()
    document["ceilings"]["read_at"] = {1 << 20: 4e12, 1 << 9: 5e12}  # what JSON turns into strings
    plot_roofline(document, tmp_path / "plot.svg")
    assert plot.digest(document) in (tmp_path / "plot.svg").read_text(encoding="utf-8")
    changed = copy.deepcopy(document)
    changed["cases"][0]["results"][0]["seconds"] *= 2
    assert plot.digest(changed) != plot.digest(document)


@pytest.mark.usefixtures("matplotlib")
def test_one_case_without_peers_is_drawn_and_a_document_without_times_is_refused(tmp_path: Path) -> None:
    document = bench_document()
    document["cases"] = document["cases"][:1]
    document["cases"][0]["results"] = document["cases"][0]["results"][:1]
    plot_roofline(document, tmp_path / "plot.svg")
    assert words(tmp_path / "plot.svg").count("dec_b1_128") == 2
    with pytest.raises(PlotError, match="no decode case has the time of a peer"):
        plot_relative_times(document, tmp_path / "relative.svg", "decode")
    document["cases"][0]["results"] = [{"peer": "pagedattn", "reason": "wrong"}]
    with pytest.raises(PlotError, match="no case has a time"):
        plot_roofline(document, tmp_path / "none.svg")


def test_settings_of_matplotlib_stay_as_they_are(matplotlib: Any, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_roofline(bench_document(), tmp_path / "plot.svg")
    assert dict(matplotlib.rcParams) == before


@given(st.lists(st.floats(0, 300), min_size=1, max_size=30))
def test_spread_names_stay_in_order_inside_and_apart(places: list[float]) -> None:
    moved = plot_page.spread(places, gap=10, low=0, high=300)
    assert all(-1e-6 <= place <= 300 + 1e-6 for place in moved)
    for (a, a_moved), (b, b_moved) in itertools.combinations(zip(places, moved, strict=True), 2):
        assert abs(a_moved - b_moved) >= 10 - 1e-6
        assert (a < b) <= (a_moved < b_moved)


def test_names_that_are_apart_already_do_not_move() -> None:
    assert plot_page.spread([50.0, 10.0, 30.0], gap=10, low=0, high=60) == [50.0, 10.0, 30.0]
