"""Readers of request traces, and the made-up trace.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagedattn.replay import Request, TraceError, read_trace, synthetic_trace
from pagedattn.replay.hashing import key, mix
from pagedattn.replay.traces import MAX_LENGTH, MOONCAKE_BLOCK

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def mooncake(*requests: tuple[int, int, list[int]]) -> str:
    """A Mooncake trace of (input_length, output_length, hash_ids)."""
    names = ("input_length", "output_length", "hash_ids")
    return "".join(
        json.dumps({"timestamp": i, **dict(zip(names, r, strict=True))}) + "\n" for i, r in enumerate(requests)
    )


def common_prefix(a: Request, b: Request) -> int:
    """Tokens at the start that two prompts share."""
    x, y = a.prompt(), b.prompt()
    n = min(len(x), len(y))
    differ = np.flatnonzero(x[:n] != y[:n])
    return int(differ[0]) if len(differ) else n


@pytest.fixture
def write(tmp_path: Path):
    def to_file(content: str | bytes, name: str = "trace.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return to_file


def test_a_mooncake_trace_keeps_lengths_and_order(write):
    trace = read_trace(write(mooncake((700, 5, [1, 2]), (512, 9, [1]), (1, 1, [7]))))
    assert [r.index for r in trace] == [0, 1, 2]
    assert [r.prompt_length for r in trace] == [700, 512, 1]
    assert [r.output_length for r in trace] == [5, 9, 1]
    assert [r.samples for r in trace] == [1, 1, 1]
    assert [len(r.prompt()) for r in trace] == [700, 512, 1]
    assert [r.final_length for r in trace] == [705, 521, 2]


def test_equal_hash_ids_give_equal_tokens_and_other_ids_other_tokens(write):
    trace = read_trace(write(mooncake((1500, 1, [4, 5, 6]), (1400, 1, [4, 5, 7]), (600, 1, [5, 4]))))
    assert common_prefix(trace[0], trace[1]) == 2 * MOONCAKE_BLOCK
    assert common_prefix(trace[0], trace[2]) == 0
    # The same content at another place of the prompt is still the same content.
    np.testing.assert_array_equal(trace[0].prompt()[MOONCAKE_BLOCK : MOONCAKE_BLOCK + 88], trace[2].prompt()[:88])


@given(
    blocks=st.integers(1, 6),
    shared=st.integers(0, 6),
    tail=st.integers(1, MOONCAKE_BLOCK),
    scale=st.floats(0.001, 3.0),
)
def test_scaled_mooncake_prompts_keep_their_shared_prefix(tmp_path_factory, blocks, shared, tail, scale):
    shared = min(shared, blocks)
    length = (blocks - 1) * MOONCAKE_BLOCK + tail
    ids = list(range(blocks))
    others = [i if i < shared else 100 + i for i in ids]
    path = tmp_path_factory.mktemp("scaled") / "trace.jsonl"
    path.write_text(mooncake((length, 3, ids), (length, 3, others)))
    a, b = read_trace(path, length_scale=scale)
    assert a.prompt_length == max(1, round(length * scale)) == len(a.prompt())
    assert a.output_length == max(1, round(3 * scale))
    segment = math.ceil(MOONCAKE_BLOCK * scale)
    expected = min(shared * segment, a.prompt_length)
    # Tokens are below 2**17, so unlike content may agree by chance in its first few tokens.
    assert expected <= common_prefix(a, b) <= expected + 2 or shared == blocks


def test_an_azure_trace_keeps_lengths_and_shares_no_content(write):
    text = AZURE_HEADER + "\r\n2023-11-16 18:15:46.68,374,44\r\n2023-11-16 18:15:50.99,396,109\r\n2023,20,1"
    trace = read_trace(write(text, "azure.csv"))
    assert [(r.prompt_length, r.output_length) for r in trace] == [(374, 44), (396, 109), (20, 1)]
    assert common_prefix(trace[0], trace[1]) <= 1
    scaled = read_trace(write(text, "azure.csv"), length_scale=0.1)
    assert [(r.prompt_length, r.output_length) for r in scaled] == [(37, 4), (40, 11), (2, 1)]


def test_azure_columns_are_found_by_name(write):
    trace = read_trace(write("GeneratedTokens , Model, ContextTokens\n7,x,30\n", "azure.csv"))
    assert [(r.prompt_length, r.output_length) for r in trace] == [(30, 7)]


def test_the_content_decides_the_format_before_the_name_does(write):
    assert len(read_trace(write(mooncake((5, 1, [0])), "trace.csv"))) == 1
    assert len(read_trace(write(AZURE_HEADER + "\n,5,1\n", "trace.jsonl"))) == 1
    assert len(read_trace(write(mooncake((5, 1, [0])), "trace"))) == 1


@pytest.mark.parametrize("content", [mooncake((5, 2, [0]), (6, 3, [1])), AZURE_HEADER + "\n0,5,2\n0,6,3\n"])
def test_byte_order_mark_blank_lines_and_windows_line_ends_are_read_over(write, content):
    text = "\ufeff\n" + content.replace("\n", "\r\n\r\n") + "  \n"
    trace = read_trace(write(text, "trace"))
    assert [(r.index, r.prompt_length, r.output_length) for r in trace] == [(0, 5, 2), (1, 6, 3)]


def test_only_the_requests_asked_for_are_read(write):
    path = write(mooncake((5, 1, [0]), (6, 1, [1])) + "not JSON\n")
    assert [r.prompt_length for r in read_trace(path, requests=2)] == [5, 6]
    with pytest.raises(TraceError, match="line 3: not JSON"):
        read_trace(path, requests=3)
    path = write(AZURE_HEADER + "\n0,5,1\n0,bad,1\n", "a.csv")
    assert [r.prompt_length for r in read_trace(path, requests=1)] == [5]


def test_a_cancelled_request_without_output_generates_one_token(write):
    assert read_trace(write(mooncake((5, 0, [0]))))[0].output_length == 1


GOOD = {"timestamp": 0, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_length": None}, "input_length is missing"),
        ({"output_length": None}, "output_length is missing"),
        ({"hash_ids": None}, "hash_ids is missing"),
        ({"input_length": -5}, f"input_length must be a whole number from 1 to {MAX_LENGTH}; got -5"),
        ({"input_length": 0}, "input_length must be a whole number from 1 to"),
        ({"input_length": 10**12}, "got 1000000000000"),
        ({"input_length": 3.5}, "got 3.5"),
        ({"input_length": math.nan}, "got nan"),
        ({"input_length": True}, "got True"),
        ({"input_length": "600"}, "got '600'"),
        ({"output_length": -1}, f"output_length must be a whole number from 0 to {MAX_LENGTH}; got -1"),
        ({"hash_ids": [1]}, "hash_ids must hold 2 ids, one for each 512 of the 600 tokens of input_length; got 1"),
        ({"hash_ids": [1, 2, 3]}, "hash_ids must hold 2 ids"),
        ({"hash_ids": [1, -2]}, "hash_ids must be a list of whole numbers from 0 to 2**63 - 1; got [1, -2]"),
        ({"hash_ids": [1, 2**63]}, f"to 2**63 - 1; got [1, {2**63}]"),
        ({"hash_ids": [1, "a"]}, "hash_ids must be a list"),
        ({"hash_ids": "12"}, "hash_ids must be a list of whole numbers from 0 to 2**63 - 1; got '12'"),
    ],
)
def test_a_malformed_mooncake_line_is_named(write, change, message):
    record = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    path = write(json.dumps(GOOD) + "\n\n" + json.dumps(record) + "\n")
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "expected a JSON object; got [1, 2]"),
        ('{"input_length": 1' + "0" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_mooncake_line_that_is_no_object_is_named(write, line, message):
    path = write(json.dumps(GOOD) + "\n" + line)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,12", "expected 3 fields; got 2"),
        ("0,12,3,4", "expected 3 fields; got 4"),
        ("0,,3", "ContextTokens is missing"),
        ("0,5,", "GeneratedTokens is missing"),
        ("0,-5,3", "ContextTokens must be a whole number from 1"),
        ("0,5,-3", "GeneratedTokens must be a whole number from 0"),
        ("0,five,3", "got 'five'"),
        ("0,5.5,3", "got '5.5'"),
        ("0,1_0,3", "got '1_0'"),
        ("0,5,٣", "got '٣'"),
        ("0," + "9" * 5000 + ",3", "got '9999"),
        ("0,99999999999,3", "got 99999999999"),
        ("0," + "9" * 200_000 + ",3", "not CSV"),
    ],
)
def test_a_malformed_azure_line_is_named(write, row, message):
    path = write(f"{AZURE_HEADER}\n0,5,3\n{row}\n", "azure.csv")
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert message in str(error.value)


def test_an_azure_header_without_a_column_is_named(write):
    with pytest.raises(TraceError, match="line 1: the header has no column GeneratedTokens; got TIMESTAMP, ContextTo"):
        read_trace(write("TIMESTAMP,ContextTokens\n0,5\n", "azure.csv"))
    with pytest.raises(TraceError, match="line 1: the header has no column ContextTokens; got 0, 5, 3"):
        read_trace(write("0,5,3\n", "azure.csv"))


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", AZURE_HEADER + "\n"])
def test_a_trace_without_requests_is_refused(write, content):
    with pytest.raises(TraceError, match="holds no requests"):
        read_trace(write(content, "trace.csv"))


def test_a_file_of_another_kind_is_refused(write, tmp_path):
    with pytest.raises(TraceError, match="neither a Mooncake trace"):
        read_trace(write("once upon a time", "story.txt"))
    with pytest.raises(TraceError, match="not a text file in UTF-8"):
        read_trace(write(b"\xff\xfe\x00\x01" * 100, "trace.jsonl"))
    with pytest.raises(TraceError, match=r"nowhere\.jsonl: No such file"):
        read_trace(tmp_path / "nowhere.jsonl")
    with pytest.raises(TraceError, match="directory"):
        read_trace(tmp_path)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_senseless_length_scale_is_refused(write, scale):
    with pytest.raises(ValueError, match="`length_scale` must be a positive number"):
        read_trace(write(mooncake((5, 1, [0]))), length_scale=scale)


def test_sampled_tokens_differ_between_samples_and_requests_and_repeat_with_the_seed():
    a, b = synthetic_trace(2, seed=3)
    assert len(a.sampled(0, 3)) == a.output_length
    np.testing.assert_array_equal(a.sampled(0, 3), a.sampled(0, 3))
    assert a.sampled(0, 3)[0] != a.sampled(1, 3)[0]
    assert a.sampled(0, 3)[0] != b.sampled(0, 3)[0]
    assert a.sampled(0, 3)[0] != a.sampled(0, 4)[0]


def test_the_made_up_trace_repeats_with_its_seed_and_changes_with_it():
    first, again, other = (synthetic_trace(20, seed=s) for s in (5, 5, 6))
    for x, y in zip(first, again, strict=True):
        assert (x.output_length, x.samples) == (y.output_length, y.samples)
        np.testing.assert_array_equal(x.prompt(), y.prompt())
    assert [r.output_length for r in first] != [r.output_length for r in other]


def test_the_made_up_trace_has_skewed_lengths_shared_prompts_and_parallel_samples():
    trace = synthetic_trace(400)
    lengths = np.array([r.prompt_length for r in trace])
    assert np.mean(lengths) > 1.2 * np.median(lengths)
    assert {r.samples for r in trace} == {1, 2, 3, 4}
    shared = [r for r in trace if len(r.streams) == 2]
    assert 0.3 < len(shared) / len(trace) < 0.7
    popular = [r for r in shared if r.streams[0] == shared[0].streams[0]]
    assert common_prefix(popular[0], popular[1]) == popular[0].lengths[0]


def test_the_hash_of_numbers_and_of_arrays_is_the_same(rng):
    words = rng.integers(0, 2**64, 100, np.uint64)
    mixed = mix(words)
    assert len(np.unique(mixed)) == 100
    golden = np.uint64(0x9E3779B97F4A7C15)
    np.testing.assert_array_equal(mix(words + golden), np.array([key(int(w)) for w in words], np.uint64))
    assert key(1, 2) != key(2, 1)
