"""Lengths and cases of `pagedattn bench`: what people write, and the work that it stands for.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagedattn.bench.cases import CPU_DECODE, DECODE, GROUPS, PREFILL, SHAPES, Case, CaseError, find_cases
from pagedattn.bench.lengths import MAX_SEQUENCES, MAX_TOKENS, LengthsError, parse_lengths


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("4096", (4096,)),
        ("3x7", (7, 7, 7)),
        ("2x5+9", (5, 5, 9)),
        (" 2x5 + 9 ", (5, 5, 9)),
        ("skew:4:100:3", (100, 3, 3, 3)),
        ("skew:1:100:3", (100,)),
        ("uniform:3:6:6", (6, 6, 6)),
    ],
)
def test_lengths_are_read(spec: str, expected: tuple[int, ...]) -> None:
    assert parse_lengths(spec) == expected


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 9000), st.integers(0, 3))
def test_distributions_stay_within_their_bounds(count: int, median: int, largest: int, seed: int) -> None:
    lengths = parse_lengths(f"logn:{count}:{median}:{largest}", seed=seed)
    assert len(lengths) == count
    assert min(lengths) >= 1
    assert max(lengths) <= largest
    assert lengths == parse_lengths(f"logn:{count}:{median}:{largest}", seed=seed)
    low, high = sorted((median, largest))
    assert all(low <= length <= high for length in parse_lengths(f"uniform:{count}:{low}:{high}", seed=seed))


def test_a_lognormal_has_the_median_it_is_given() -> None:
    lengths = parse_lengths("logn:20000:2048:1000000")
    assert abs(np.median(lengths) / 2048 - 1) < 0.05
    assert abs(np.std(np.log(lengths)) - 1) < 0.05


@pytest.mark.parametrize(
    "spec",
    [
        "", "x", "0", "-3", "3x", "x3", "0x5", "3x0", "1.5", "٣", "3x4x5", "logn:3:4", "logn:3:4:5:6", "uniform:3:9:2",
        "skew:0:3:3", "normal:1:2:3", "1++2", "+", "99999999999999", f"{MAX_SEQUENCES + 1}x1",
        f"uniform:{MAX_SEQUENCES + 1}:1:2", "1048576x9999999999", f"{MAX_SEQUENCES}x1+1",
    ],
)  # fmt: skip
def test_other_lengths_are_refused_by_name(spec: str) -> None:
    with pytest.raises(LengthsError, match="lengths"):
        parse_lengths(spec)


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        ("99999999999999", f"at most {MAX_TOKENS} tokens; got 99999999999999"),
        ("9" * 5000, f"at most {MAX_TOKENS} tokens; got 999"),
        ("uniform:3:1:1099511627777", f"at most {MAX_TOKENS} tokens; got 1099511627777"),
        ("2x1099511627776", f"at most {MAX_TOKENS} tokens; got 2199023255552"),
        ("99999999999999x1", f"at most {MAX_SEQUENCES} sequences; got 99999999999999"),
        ("1048576x1+1", f"at most {MAX_SEQUENCES} sequences; got 1048577"),
    ],
)
def test_lengths_that_are_too_large_are_told_the_limit(spec: str, limit: str) -> None:
    with pytest.raises(LengthsError, match=f": {limit}"):
        parse_lengths(spec)


@pytest.mark.parametrize("case", [*DECODE, *PREFILL, *SHAPES, *CPU_DECODE], ids=lambda case: case.name)
def test_the_work_of_a_case_is_counted_token_by_token(case: Case) -> None:
    window = case.window or max(case.kv_lens)
    visible = slots = 0
    for q_len, kv_len in zip(case.q_lens, case.kv_lens, strict=True):
        seen = np.minimum(np.arange(kv_len - q_len + 1, kv_len + 1), window)  # keys of each query token
        visible += int(seen.sum())
        slots += q_len - 1 + int(seen[0])  # the last ones up to the first token, and the tokens after it
    assert case.flops == 4 * case.heads * case.head_dim * visible
    width = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3": 1, "float8_e5m2": 1}
    kv = slots * case.kv_heads * case.head_dim * width[case.kv_dtype]
    q = sum(case.q_lens) * case.heads * case.head_dim * width[case.dtype]
    assert case.kv_bytes == 2 * kv
    assert case.bytes == 2 * kv + 2 * q
    assert case.num_blocks == sum(-(-length // case.block_size) for length in case.kv_lens)


@pytest.mark.parametrize(("window", "seen"), [(None, 21), (9, 21), (4, 12)])
def test_without_a_mask_every_key_counts(window: int | None, seen: int) -> None:
    case = Case("full", (7,), (3,), heads=2, kv_heads=1, head_dim=8, causal=False, window=window)
    assert case.flops == 4 * 2 * 8 * seen
    assert case.kv_bytes == 2 * (seen // 3) * 8 * 2


@pytest.mark.parametrize(("window", "seen", "slots"), [(1, 3, 3), (5, 15, 7), (6, 5 + 6 + 6, 7), (100, 5 + 6 + 7, 7)])
def test_a_window_counts_the_last_keys_of_each_query_token(window: int, seen: int, slots: int) -> None:
    case = Case("window", (7,), (3,), heads=2, kv_heads=1, head_dim=8, window=window)
    assert case.flops == 4 * 2 * 8 * seen
    assert case.kv_bytes == 2 * slots * 8 * 2
    assert case.shape.endswith(f", bfloat16, window of {window}")


def test_decode_is_what_reading_the_cache_bounds() -> None:
    assert all(case.is_decode for case in (*DECODE, *SHAPES))
    assert not any(case.is_decode for case in PREFILL)


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_other_shapes_read_more_than_a_cache_holds(case: Case) -> None:
    assert case.kv_bytes > 200e6
    assert case.cache_bytes < 8e9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 7}, "--heads must be a multiple of --kv-heads; got 7 and 8"),
        ({"kv_heads": 0}, "--kv-heads must be at least 1; got 0"),
        ({"head_dim": 100}, "--head-dim must be a multiple of 8 up to 256; got 100"),
        ({"head_dim": 264}, "--head-dim"),
        ({"block_size": 0}, "--block-size must be at least 1; got 0"),
        (
            {"dtype": "float64"},
            "--dtype must be one of float32, float16, bfloat16, float8_e4m3, float8_e5m2; got float64",
        ),
        ({"kv_dtype": "float16"}, "--kv-dtype must be one of bfloat16, float8_e4m3, float8_e5m2"),
        ({"dtype": "float32", "kv_dtype": "float8_e4m3"}, "--kv-dtype must be one of float32 with --dtype float32"),
        ({"dtype": "float8_e4m3"}, "--kv-dtype must be one of float8_e4m3 with --dtype float8_e4m3; got bfloat16"),
        ({"q_lens": (6,)}, "query lengths must be 1 to the sequence's 5 tokens; got 6"),
        ({"q_lens": (0,)}, "query lengths must be 1"),
        ({"q_lens": (1, 1)}, "1 sequences, but 2 query lengths"),
        ({"kv_lens": (), "q_lens": ()}, "0 sequences"),
        ({"window": 0}, "c: the window must be at least 1; got 0"),
        ({"layout": "NDH"}, "c: the layout must be one of NHD, HND; got NDH"),
    ],
)
def test_a_case_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(CaseError) as caught:
        Case(**({"name": "c", "kv_lens": (5,), "q_lens": (1,)} | fields))  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_cases_are_found_by_name_and_by_group_once_each() -> None:
    assert find_cases(["decode"]) == list(DECODE)
    assert [case.name for case in find_cases(["pre_1x8k", "prefill"])][:2] == ["pre_1x8k", "pre_4x4k"]
    assert len(find_cases(list(GROUPS))) == sum(len(group) for group in GROUPS.values())
    with pytest.raises(CaseError, match=r"--case must be one of .*dec_b1_128.*got nonsense"):
        find_cases(["nonsense"])
