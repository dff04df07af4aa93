"""Bad index values on the GPU without checked mode: nothing is written outside the outputs.

Each output is the middle of a larger allocation whose edges must survive.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_close, assert_same_bytes
from backends import CupyBackend
from batches import make_batch, normal, poison
from failing_calls import attention_call, copy_call, gather_call, on, reshape_call, rope_call

pytestmark = pytest.mark.gpu

MARGIN = 64


def guarded(array: np.ndarray) -> np.ndarray:
    """Return a copy of the array amid MARGIN more poisoned rows on either side."""
    larger = poison((len(array) + 2 * MARGIN, *array.shape[1:]), array.dtype)
    larger[MARGIN:-MARGIN] = array
    return larger[MARGIN:-MARGIN]


def assert_edges_survive(cuda: CupyBackend, device: Any, host: np.ndarray) -> None:
    root = host.base
    assert root is not None
    after = cuda.allocation(device)[: root.nbytes].view(root.dtype).reshape(root.shape)
    for edge in (slice(None, MARGIN), slice(-MARGIN, None)):
        assert_same_bytes(after[edge], root[edge], "the memory around the output")


def test_slots_out_of_range_are_skipped_and_the_others_written(cuda: CupyBackend) -> None:
    call = reshape_call()
    host = {name: guarded(call[name]) for name in ("k_cache", "v_cache")}
    slots = np.array([24, 3, 2**62, -5, 40], np.int64)
    moved = on(cuda, {**call, **host, "slot_mapping": slots})
    pagedattn.reshape_and_cache(**moved, check=False)
    good = np.where((slots >= 0) & (slots < 24), slots, -1)
    expected = call["k_cache"].copy(), call["v_cache"].copy()
    reference.reshape_and_cache(call["key"], call["value"], *expected, good)
    for name, cache in zip(host, expected, strict=True):
        assert_same_bytes(cuda.host(moved[name]), cache)
        assert_edges_survive(cuda, moved[name], host[name])


def test_tokens_at_positions_out_of_range_are_left_alone(cuda: CupyBackend) -> None:
    call = rope_call()
    host = {name: guarded(call[name]) for name in ("k_cache", "v_cache", "query_out")}
    positions = np.array([10, 6, -1, 2**62, 9], np.int64)
    slots = np.array([3, 24, 5, 6, 7], np.int64)
    moved = on(cuda, {**call, **host, "positions": positions, "slot_mapping": slots})
    pagedattn.rope_and_cache(**moved, check=False)
    expected = {name: array.copy() for name, array in host.items()}
    rotated = reference.rotate(call["key"], positions.clip(0, 9), call["cos_sin"])
    queries = reference.rotate(call["query"], positions.clip(0, 9), call["cos_sin"])
    expected["k_cache"][1, 3], expected["v_cache"][1, 3] = rotated[4], call["value"][4]
    expected["query_out"][[1, 4]] = queries[[1, 4]]
    for name, array in expected.items():
        np.testing.assert_allclose(cuda.host(moved[name]), array, rtol=1e-5, atol=1e-6)
        assert_edges_survive(cuda, moved[name], host[name])


def test_block_pairs_out_of_range_are_skipped_and_the_others_copied(cuda: CupyBackend) -> None:
    call = copy_call()
    caches = [guarded(cache) for cache in call["caches"]]
    mapping = np.array([[0, 6], [-1, 3], [1, -1], [7, 4], [2, 5], [2**40, 1], [1, 2**40]], np.int64)
    moved = on(cuda, {"caches": caches, "block_mapping": mapping})
    pagedattn.copy_blocks(**moved, check=False)
    for device, host, before in zip(moved["caches"], caches, call["caches"], strict=True):
        before[5] = before[2]
        assert_same_bytes(cuda.host(device), before)
        assert_edges_survive(cuda, device, host)


@pytest.mark.parametrize(
    "places", [None, [0, 8, 13, 40], [-20, 2, 30, 33], [2**31 - 1, 2**31 - 1, 2**31 - 1, 2**31 - 1]]
)
def test_gathered_rows_past_the_outputs_are_dropped(cuda: CupyBackend, places: list[int] | None) -> None:
    call = gather_call()
    host = [guarded(poison((11, 2, 8), np.float32)) for _ in range(2)]
    call["out"] = tuple(host)
    if places is not None:
        call["out_start_loc"] = np.array(places, np.int32)
    moved = on(cuda, call)
    pagedattn.gather_kv(**moved, check=False)
    for device, before in zip(moved["out"], host, strict=True):
        assert_edges_survive(cuda, device, before)


def test_query_tokens_past_the_outputs_are_dropped(cuda: CupyBackend) -> None:
    call = attention_call()
    host = {name: guarded(call[name]) for name in ("q", "out", "lse")}
    moved = on(cuda, {**call, **host, "query_start_loc": np.array([0, 3, 8, 11], np.int32)})
    pagedattn.paged_attention(**moved, check=False)
    for name in ("out", "lse"):
        assert_edges_survive(cuda, moved[name], host[name])


def test_the_environment_switches_checked_mode_on(cuda: CupyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    call = reshape_call()
    call["slot_mapping"][2] = 24
    moved = on(cuda, call)
    monkeypatch.setenv("PAGEDATTN_CHECK", "1")
    with pytest.raises(pagedattn.InvalidArgumentError, match=r"`slot_mapping`\[2\].*24; got 24"):
        pagedattn.reshape_and_cache(**moved)
    pagedattn.reshape_and_cache(**moved, check=False)
    monkeypatch.setenv("PAGEDATTN_CHECK", "0")
    pagedattn.reshape_and_cache(**moved)


def test_calls_wait_for_the_stream_that_they_are_given(cuda: CupyBackend, rng: np.random.Generator) -> None:
    # Write, then attend, on one non-blocking stream, without synchronising in between.
    batch = make_batch(rng, [2000] * 8, num_q_heads=8, num_kv_heads=2, head_dim=128, dtype=np.float16)
    args, options = batch.on(cuda)
    key, value = normal(rng, (2, 8, 2, 128), np.float16)
    slots = batch.block_tables[:, 1999 // 16].astype(np.int64) * 16 + 1999 % 16
    moved = cuda.arrays(key, value, slots)
    out = cuda.array(poison(batch.q.shape, np.float16))
    cuda.synchronize()
    stream = cuda.cupy.cuda.Stream(non_blocking=True)
    pagedattn.reshape_and_cache(*moved[:2], *args[1:3], moved[2], stream=stream)
    pagedattn.paged_attention(*args, out=out, stream=stream, **options)
    stream.synchronize()
    reference.reshape_and_cache(key, value, batch.k_cache, batch.v_cache, slots)
    assert_close(cuda.host(out), batch.reference()[0], np.float16)
