"""paged_attention over shapes, types, lengths and options that hypothesis draws and shrinks.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pagedattn
from accuracy import assert_close, assert_same_bytes
from attention_check import assert_result_close, assert_result_lse_close
from backends import DTYPES, NumpyBackend
from batches import LAYOUTS, TENSOR_CORE_KINDS, make_batch, output, poison, scale_for
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def lengths(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sequence lengths with query lengths that fit them; a query token of an empty sequence sees nothing."""
    seq_lens = draw(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 400)), max_size=6))
    query_lens = []
    for seq_len in seq_lens:
        most = min(seq_len, 60) if seq_len else 2
        query_lens.append(draw(st.one_of(st.just(min(1, most)), st.integers(0, most))))
    return seq_lens, query_lens


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    dtype, kv_dtype = draw(st.sampled_from([("float32", "float32"), *TENSOR_CORE_KINDS]))
    num_kv_heads = draw(st.integers(1, 4))
    seq_lens, query_lens = draw(lengths())
    return {
        "seq_lens": seq_lens,
        "query_lens": query_lens,
        "num_kv_heads": num_kv_heads,
        "num_q_heads": num_kv_heads * draw(st.integers(1, 9)),
        "head_dim": 8 * draw(st.one_of(st.sampled_from([8, 16]), st.integers(1, 32))),
        "block_size": draw(st.one_of(st.sampled_from([16, 32]), st.integers(1, 70))),
        "dtype": DTYPES[dtype],
        "kv_dtype": DTYPES[kv_dtype],
        "layout": draw(st.sampled_from(LAYOUTS)),
        "packed_q": draw(st.booleans()),
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.integers(1, 500))),
        "softcap": draw(st.sampled_from([0.0, 0.5, 30.0])),
        "scale": draw(st.one_of(st.none(), st.floats(0.0, 0.5, width=32, allow_subnormal=False))),
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "strided_out": draw(st.booleans()),
        "deterministic": draw(st.booleans()),
        "seed": draw(SEEDS),
    }


@settings(max_examples=150)
@given(case=cases())
def test_any_valid_call_matches_the_reference(backend: NumpyBackend, case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case.pop("seed"))
    strided_out, deterministic = case.pop("strided_out"), case.pop("deterministic")
    if case.pop("alibi"):
        case["alibi_slopes"] = rng.uniform(-0.1, 0.5, case["num_q_heads"]).astype(np.float32)
    if case.pop("sinks"):
        case["sinks"] = rng.uniform(-3, 3, case["num_q_heads"]).astype(np.float32)
    case.update(scale_for(case["kv_dtype"], rng, case["num_kv_heads"], case["dtype"]))
    batch = make_batch(rng, case.pop("seq_lens"), case.pop("query_lens"), **case)
    expected, expected_lse = batch.reference()
    args, options = batch.on(backend)
    poisoned = output(batch.q.shape, batch.out_dtype, strided=strided_out)  # type: ignore[arg-type]
    out, lse = backend.arrays(poisoned.view, poison(batch.q.shape[:2], np.float32))
    pagedattn.paged_attention(*args, out=out, lse=lse, deterministic=deterministic, **options)
    assert_result_close(backend.host(out), expected, batch.out_dtype)
    assert_result_lse_close(backend.host(lse), expected_lse)
    assert poisoned.gaps_untouched(backend.allocation(out))


@settings(max_examples=30)
@given(seed=SEEDS, num_tokens=st.integers(1, 50), num_seqs=st.integers(1, 4))
def test_prefill_in_chunks_gives_what_prefill_at_once_gives(
    backend: NumpyBackend, seed: int, num_tokens: int, num_seqs: int
) -> None:
    # Chunked prefill, token by token at the extreme: row r sees the same keys whichever chunk it is in.
    rng = np.random.default_rng(seed)
    batch = make_batch(rng, [num_tokens] * num_seqs, [num_tokens] * num_seqs, block_size=4, head_dim=16)
    args, options = batch.on(backend)
    whole = backend.host(pagedattn.paged_attention(*args, **options))
    whole = whole.reshape(num_seqs, num_tokens, 4, 16)
    q = batch.q.reshape(num_seqs, num_tokens, 4, 16)
    cuts = sorted({0, num_tokens, *rng.integers(0, num_tokens + 1, 2).tolist()})
    for start, stop in pairwise(cuts):
        chunk, lens, starts = backend.arrays(
            np.ascontiguousarray(q[:, start:stop]).reshape(-1, 4, 16),
            np.full(num_seqs, stop, np.int32),
            (np.arange(num_seqs + 1) * (stop - start)).astype(np.int32),
        )
        part = backend.host(pagedattn.paged_attention(chunk, *args[1:4], lens, query_start_loc=starts))
        assert_close(
            part, whole[:, start:stop].reshape(part.shape).astype(np.float64), np.float32, f"tokens {start} to {stop}"
        )


@settings(max_examples=30)
@given(seed=SEEDS, lens=st.lists(st.integers(1, 80), min_size=2, max_size=6))
def test_the_order_of_sequences_and_heads_does_not_matter(backend: NumpyBackend, seed: int, lens: list[int]) -> None:
    rng = np.random.default_rng(seed)
    batch = make_batch(rng, lens, num_q_heads=6, num_kv_heads=3, head_dim=32, block_size=8, dtype=np.float16)
    args, options = batch.on(backend)
    straight = backend.host(pagedattn.paged_attention(*args, deterministic=True, **options))
    order, heads = rng.permutation(len(lens)), rng.permutation(3)
    q_heads = np.concatenate([[2 * h, 2 * h + 1] for h in heads])
    moved = backend.arrays(
        batch.q[order][:, q_heads],
        np.ascontiguousarray(batch.k_cache[:, :, heads]),
        np.ascontiguousarray(batch.v_cache[:, :, heads]),
        batch.block_tables[order],
        batch.seq_lens[order],
    )
    permuted = backend.host(pagedattn.paged_attention(*moved, deterministic=True))
    assert_same_bytes(permuted, straight[order][:, q_heads])
