# SPDX-License-Identifier: Apache-2.0
"""The picture of the cache: well-formed whatever the state, and showing what is there."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagedattn import BlockManager, OutOfBlocks, _svg

SVG = "{http://www.w3.org/2000/svg}"


def add_computed(m: BlockManager, tokens: object) -> int:
    seq = m.add(tokens)
    m.step(seq, m.num_tokens(seq) - m.num_computed_tokens(seq))
    return seq


def parse(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def arrows(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [path for path in root.iter(f"{SVG}path") if path.get("fill") == "none"]


def small_manager() -> BlockManager:
    m = BlockManager(12, 4)
    m.free(add_computed(m, range(50, 54)))
    a = add_computed(m, range(6))
    b = add_computed(m, [0, 1, 2, 3, 9, 9, 9, 9, 9])
    m.append([a, b], [7, 8])
    m.step([a, b], 1)
    return m


def test_a_small_cache_shows_every_block_page_and_arrow() -> None:
    m = small_manager()
    root = parse(_svg.render(m.layout(), title="a title"))
    shown = texts(root)
    tables = [block for seq in m.seqs() for block in m.block_table(seq)]
    for block in range(12):
        assert shown.count(str(block)) >= 1 + tables.count(block)
    assert len(arrows(root)) == len(tables)
    assert "a title" in shown
    assert "request 1" in shown
    assert "7 tokens" in shown
    assert "4 held, 1 cached, 7 free" in shown


def test_each_request_has_one_colour_and_a_shared_block_has_all_of_them() -> None:
    m = small_manager()
    root = parse(_svg.render(m.layout()))
    colours = {arrow.get("stroke") for arrow in arrows(root)}
    assert len(colours) == 2
    patterns = [{bar.get("fill") for bar in pattern} for pattern in root.iter(f"{SVG}pattern")]
    assert colours in patterns


def test_a_shared_block_carries_its_count() -> None:
    m = BlockManager(12, 4)
    m.fork(add_computed(m, range(20, 24)), 8)
    root = parse(_svg.render(m.layout()))
    assert texts(root).count("9") == 2  # the block of that number, and the count
    assert len(list(root.iter(f"{SVG}circle"))) == 1


def test_the_title_is_escaped() -> None:
    title = """<script>"&'</script>"""
    text = _svg.render(BlockManager(4, 4).layout(), title=title)
    assert "<script>" not in text
    root = parse(text)
    assert root.findtext(f"{SVG}title") == title
    assert title in texts(root)


def test_a_notebook_shows_the_picture() -> None:
    m = small_manager()
    assert m._repr_svg_() == _svg.render(m.layout(), title="BlockManager: 2 sequences")


def test_pictures_in_one_page_do_not_share_ids() -> None:
    def ids(m: BlockManager) -> set[str]:
        return set(re.findall(r' id="([^"]+)"', m._repr_svg_()))

    other = BlockManager(12, 4)
    add_computed(other, range(9))
    assert ids(small_manager()).isdisjoint(ids(other))


def test_the_same_state_gives_the_same_picture() -> None:
    assert small_manager()._repr_svg_() == small_manager()._repr_svg_()


def test_swapped_and_waiting_requests_have_no_arrows() -> None:
    m = BlockManager(12, 4, num_host_blocks=4)
    m.swap_out(add_computed(m, range(6)))
    m.add([1])
    root = parse(_svg.render(m.layout()))
    assert not arrows(root)
    assert "6 on host" in texts(root)
    assert "1 waiting without blocks" in texts(root)


def test_blocks_behind_the_window_have_no_arrows() -> None:
    m = BlockManager(12, 4, window=4)
    add_computed(m, range(18))
    assert len(arrows(parse(_svg.render(m.layout())))) == 2


def test_two_hundred_blocks_are_all_numbered_and_the_arrows_thinned() -> None:
    m = BlockManager(200, 16)
    rng = np.random.default_rng()
    seqs = [add_computed(m, rng.integers(0, 1000, 20)) for _ in range(12)]
    for _ in range(150):
        m.append(seqs, rng.integers(0, 1000, 12))
        m.step(seqs, 1)
    root = parse(_svg.render(m.layout()))
    shown = set(texts(root))
    assert {str(block) for block in range(200)} <= shown
    drawn = len(arrows(root))
    assert 12 <= drawn <= 72
    assert any(f"{drawn} of {12 * 11} arrows drawn" in text for text in shown)


def test_a_large_cache_stays_a_small_picture() -> None:
    m = BlockManager(100_000, 16)
    rng = np.random.default_rng()
    for _ in range(100):
        add_computed(m, rng.integers(0, 1000, 4000))
    text = _svg.render(m.layout())
    root = parse(text)
    assert len(text) < 1_000_000
    assert "76 smaller requests in grey" in " ".join(texts(root))
    assert "100000 blocks of 16 tokens, a cell is 84" in texts(root)


def numbers(root: ElementTree.Element) -> list[float]:
    found = []
    for element in root.iter():
        for name in ("x", "y", "width", "height", "cx", "cy", "r", "font-size"):
            if name in element.attrib:
                found.append(float(element.attrib[name]))
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3)), max_size=30),
    st.sampled_from([None, 3]),
)
def test_any_state_gives_a_well_formed_picture_inside_its_frame(
    num_blocks: int, block_size: int, plan: list[tuple[int, int]], window: int | None
) -> None:
    m = BlockManager(num_blocks, block_size, num_host_blocks=20, window=window)
    for length, action in plan:
        try:
            seq = add_computed(m, range(length))
            if action == 1:
                m.free(seq)
            elif action == 2:
                m.fork(seq, 2)
            elif action == 3:
                m.swap_out(seq)
        except (OutOfBlocks, ValueError):
            continue
    root = parse(_svg.render(m.layout()))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(0 <= value <= max(width, height) for value in numbers(root))
    for rect in root.findall(f"{SVG}rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height


@pytest.mark.parametrize("num_blocks", [1, 2, 12, 13, 200])
def test_an_empty_cache_has_a_picture(num_blocks: int) -> None:
    root = parse(BlockManager(num_blocks, 16)._repr_svg_())
    assert f"0 held, 0 cached, {num_blocks} free" in texts(root)
