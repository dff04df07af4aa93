"""The replay end to end: what it counts, and that it sees a fault wherever one is planted.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import itertools

import numpy as np
import pagedattn
import pytest
from backends import CupyBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from pagedattn._device import ELEMENT, Device
from pagedattn._units import show_bytes
from pagedattn.replay import Report, Request, Settings, SettingsError, replay, synthetic_trace
from pagedattn.replay import engine as engine_module
from pagedattn.replay.clock import PARTS, Clock
from pagedattn.replay.engine import Engine
from pagedattn.replay.model import Model
from pagedattn.replay.occupancy import Occupancy
from pagedattn.replay.settings import parse_bytes
from pagedattn.replay.verify import dense_row, relative_error

SMALL = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "block_size": 4, "num_blocks": 64, "chunk": 16}


def small(**changes) -> Settings:
    return Settings(**{**SMALL, **changes})


def request(index: int, *segments: tuple[int, int], output: int = 4, samples: int = 1) -> Request:
    """A request whose prompt is the first `length` tokens of each `stream`."""
    streams, lengths = zip(*segments, strict=True)
    return Request(index, np.array(streams, np.uint64), np.array(lengths, np.int64), output, samples)


def distinct(count: int, prompt: int = 10, **options) -> list[Request]:
    return [request(i, (1000 + i, prompt), **options) for i in range(count)]


def run(trace: list[Request], **changes) -> Report:
    return replay(trace, small(**changes))


# ---- what is counted ----------------------------------------------------------------------------------------------


def test_every_request_completes_and_every_token_is_counted():
    trace = synthetic_trace(12, length_scale=0.05, seed=1)
    report = run(trace)
    assert report.mismatch is None
    assert (report.requests, report.completed, report.refused) == (12, 12, 0)
    assert report.prompt_tokens == sum(r.prompt_length for r in trace)
    assert report.generated_tokens == sum(r.output_length * r.samples for r in trace)
    assert report.forks == sum(r.samples - 1 for r in trace)
    assert report.rows_verified == 2 * report.steps
    assert 0 < report.largest_error < 1e-5
    assert 0 < report.peak_blocks <= report.num_blocks == 64


def test_steps_follow_from_chunks_and_outputs():
    # 40 prompt tokens in chunks of 16 take three steps, the third of which samples the first token.
    assert run(distinct(1, prompt=40, output=1)).steps == 3
    assert run(distinct(1, prompt=40, output=5)).steps == 7
    # Two prompts of 10 share the budget of 16: the second needs 4 tokens of the next step.
    assert run(distinct(2, prompt=10, output=1)).steps == 2


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("max_batch", [4, 9])
def test_limits_change_the_schedule_and_nothing_else(chunk, max_batch):
    trace = synthetic_trace(8, length_scale=0.04, seed=4)
    report = run(trace, chunk=chunk, max_batch=max_batch, verify=4)
    assert report.mismatch is None
    assert report.completed == 8
    assert report.generated_tokens == sum(r.output_length * r.samples for r in trace)


def test_verification_does_not_change_what_happens():
    trace = synthetic_trace(10, length_scale=0.05, seed=2)
    with_check, without = run(trace, verify=3), run(trace, verify=0)
    same = ("steps", "copies", "preemptions", "hit_tokens", "peak_blocks", "kv_bytes_read", "waste_paged")
    assert [getattr(with_check, n) for n in same] == [getattr(without, n) for n in same]
    assert without.rows_verified == 0


def test_kv_bytes_are_every_sequence_once_a_layer_and_call():
    # One sequence: prefill to 10 tokens, then decodes at 11, 12 and 13.
    report = run(distinct(1, prompt=10, output=4))
    token_bytes = 2 * SMALL["kv_heads"] * SMALL["head_dim"] * 4
    assert report.kv_bytes_read == (10 + 11 + 12 + 13) * token_bytes * SMALL["layers"]
    assert report.attention_bandwidth == pytest.approx(report.kv_bytes_read / report.parts["attention"])


def test_an_equal_prompt_is_found_in_the_cache_up_to_its_last_token():
    # One at a time, so that the first is done before the second starts. Of the second and the last, less than half a
    # block is left over, which is not worth a copy.
    trace = [request(0, (7, 18)), request(1, (7, 18)), request(2, (7, 16)), request(3, (7, 9), (8, 9))]
    report = run(trace, max_batch=1)
    assert report.mismatch is None
    assert report.hit_tokens == 16 + 15 + 8
    assert report.hit_rate == pytest.approx(39 / (18 + 18 + 16 + 18))


def test_samples_share_their_prompt_and_copy_its_last_block_when_they_write():
    # 10 tokens fill two blocks and half of a third, which two of three samples have to copy.
    report = run([request(0, (7, 10), output=6, samples=3)], verify=6)
    assert report.mismatch is None
    assert (report.forks, report.copies) == (2, 2)
    assert report.generated_tokens == 18
    # A prompt that ends with its block leaves nothing to copy.
    assert run([request(0, (7, 12), output=6, samples=3)]).copies == 0


def test_a_small_cache_preempts_and_still_computes_everything():
    trace = distinct(6, prompt=12, output=20)
    report = run(trace, num_blocks=12, verify=4)
    assert report.mismatch is None
    assert report.completed == 6
    assert report.preemptions > 0
    assert report.generated_tokens == 6 * 20
    assert report.peak_blocks <= 12
    roomy = run(trace, num_blocks=64)
    assert (roomy.preemptions, roomy.recomputed_tokens) == (0, 0)


def test_a_request_that_can_never_fit_is_refused_and_the_others_run():
    trace = [request(0, (1, 10)), request(1, (2, 40), output=9), request(2, (3, 10))]
    report = run(trace, num_blocks=12)
    assert (report.completed, report.refused) == (2, 1)
    assert report.refusals == ["request 1: its 49 tokens need 13 blocks of 12"]
    assert "refused: request 1: its 49 tokens need 13 blocks of 12" in report.text()
    # One that just fits is served, alone if need be.
    assert run([request(0, (1, 10)), request(1, (2, 40), output=8)], num_blocks=12).completed == 2


def test_more_samples_than_places_are_refused():
    report = run([request(0, (1, 5), samples=4), request(1, (2, 5))], max_batch=3)
    assert (report.completed, report.refusals) == (1, ["request 0: its 4 samples exceed --max-batch 3"])


def test_samples_that_cannot_all_stay_are_computed_one_after_the_other():
    report = run([request(0, (1, 30), output=18, samples=4)], num_blocks=12, verify=4)
    assert report.mismatch is None
    assert (report.completed, report.generated_tokens) == (1, 72)
    assert report.preemptions > 0


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 8),
    block_size=st.integers(1, 9),
    num_blocks=st.integers(4, 40),
    chunk=st.integers(1, 40),
    max_batch=st.integers(1, 8),
)
@settings(max_examples=40)
def test_any_trace_through_any_cache_ends_verified_with_every_block_free(
    seed, count, block_size, num_blocks, chunk, max_batch
):
    rng = np.random.default_rng(seed)
    trace = []
    for index in range(count):
        shared = (int(rng.integers(3)), int(rng.integers(1, 15)))
        own = (100 + index, int(rng.integers(1, 15)))
        output, samples = (int(n) for n in rng.integers(1, [9, 4]))
        trace.append(request(index, shared, own, output=output, samples=samples))
    engine = Engine(
        trace,
        small(block_size=block_size, num_blocks=num_blocks, chunk=chunk, max_batch=max_batch, layers=1, head_dim=8),
    )
    limit = sum(r.samples * (r.final_length + 1) for r in trace) * 20
    steps = sum(1 for _ in itertools.takewhile(lambda _: engine.step(), range(limit)))
    assert steps < limit
    report = engine.report(interrupted=False)
    assert report.mismatch is None
    assert report.completed + report.refused == count
    served = [r for r in trace if not any(f"request {r.index}:" in reason for reason in report.refusals)]
    assert report.generated_tokens == sum(r.output_length * r.samples for r in served)
    assert engine.manager.num_free_blocks == num_blocks
    engine.manager.check()


def test_a_replay_can_be_stopped_and_reports_what_it_did():
    seen = []
    report = replay(distinct(5), small(), on_step=seen.append, stop=lambda: len(seen) == 3)
    assert report.interrupted
    assert report.steps == 3
    assert report.completed < 5
    assert "interrupted" in report.text()
    last = seen[-1]
    assert (last.requests, last.num_blocks) == (5, 64)
    assert last.blocks_in_use > 0
    assert last.tokens == report.prompt_tokens + report.generated_tokens


def test_a_replay_stopped_within_a_prompt_has_counted_what_it_computed_and_no_more():
    steps = []
    trace = [request(0, (1, 100))]
    report = replay(trace, small(), on_step=steps.append, stop=lambda: len(steps) == 2)
    assert (report.prompt_tokens, report.generated_tokens) == (2 * 16, 0)


def test_prompt_tokens_count_once_however_often_they_are_computed():
    trace = distinct(12, prompt=30, output=20)
    report = run(trace, num_blocks=32)
    assert report.preemptions > 0
    assert report.prompt_tokens == 12 * 30


def test_the_layout_is_kept_at_the_fullest_moment():
    report = replay(distinct(4), small(), keep_layout=True)
    assert report.layout is not None
    assert replay(distinct(4), small()).layout is None


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "least", "most"),
    [
        ("float32", None, 0, 1e-5),
        ("float16", None, 1e-6, 1e-3),
        ("bfloat16", None, 1e-5, 8e-3),
        ("bfloat16", "float8_e4m3", 1e-5, 8e-3),
        ("float16", "float8_e5m2", 1e-6, 1e-3),
    ],
)
def test_every_type_verifies_clean(dtype, kv_dtype, least, most):
    report = run(synthetic_trace(6, length_scale=0.05, seed=3), dtype=dtype, kv_dtype=kv_dtype, verify=8)
    assert report.mismatch is None
    assert least < report.largest_error < most


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("float32", None), ("float16", None), ("bfloat16", None), ("bfloat16", "float8_e4m3")]
)
def test_the_gpu_computes_the_same_schedule_and_verifies_clean(cuda: CupyBackend, dtype, kv_dtype):
    trace = synthetic_trace(12, length_scale=0.1, seed=3)
    on_gpu = run(trace, backend="cuda", dtype=dtype, kv_dtype=kv_dtype, head_dim=64, num_blocks=256, verify=8)
    on_cpu = run(trace, dtype=dtype, kv_dtype=kv_dtype, head_dim=64, num_blocks=256)
    assert on_gpu.mismatch is None
    assert (on_gpu.steps, on_gpu.copies, on_gpu.hit_tokens) == (on_cpu.steps, on_cpu.copies, on_cpu.hit_tokens)


# ---- planted faults -----------------------------------------------------------------------------------------------


def expect_mismatch(trace: list[Request], **changes) -> None:
    report = run(trace, verify=16, **changes)
    assert report.mismatch is not None
    assert not report.mismatch.error <= report.mismatch.tolerance


def test_a_mismatch_ends_the_replay_and_names_the_place(monkeypatch):
    attend = pagedattn.paged_attention

    def off_by_a_little(q, *args, out, **options):
        attend(q, *args, out=out, **options)
        out[-1, 3] *= 1.001
        return out

    monkeypatch.setattr(pagedattn, "paged_attention", off_by_a_little)
    report = run(distinct(3, prompt=1, output=3), layers=1, verify=64)
    found = report.mismatch
    assert found is not None
    assert (found.request, found.sample, found.position, found.layer, found.head) == (2, 0, 0, 0, 3)
    assert found.error == pytest.approx(1e-3, rel=1e-2)
    text = str(found)
    for part in ("step 1", "request 2", "sequence", "position 0", "layer 0", "head 3", "error 0.001", "allowed 1e-05"):
        assert part in text
    assert report.steps == 1
    assert report.to_dict()["mismatch"]["head"] == 3


def test_a_wrong_slot_is_caught(monkeypatch):
    write = pagedattn.reshape_and_cache

    def swapped(key, value, k_cache, v_cache, slots, **options):
        slots = slots.copy()
        slots[:2] = slots[:2][::-1]
        write(key, value, k_cache, v_cache, slots, **options)

    monkeypatch.setattr(pagedattn, "reshape_and_cache", swapped)
    expect_mismatch(distinct(3))


def test_a_write_that_did_not_happen_is_caught(monkeypatch):
    write = pagedattn.reshape_and_cache

    def skipped(key, value, k_cache, v_cache, slots, **options):
        slots = slots.copy()
        slots[-1] = -1
        write(key, value, k_cache, v_cache, slots, **options)

    monkeypatch.setattr(pagedattn, "reshape_and_cache", skipped)
    report = run(distinct(3), verify=16)
    assert report.mismatch is not None
    # The slot still holds the NaN that the cache was filled with.
    assert np.isnan(report.mismatch.error)
    assert report.to_dict()["mismatch"]["error"] == "nan"


def test_a_wrong_table_entry_is_caught(monkeypatch):
    attend = pagedattn.paged_attention

    def mixed_up(q, k_cache, v_cache, tables, *args, **options):
        tables = tables.copy()
        if len(tables) > 1:
            tables[0, 0] = tables[1, 0]
        return attend(q, k_cache, v_cache, tables, *args, **options)

    monkeypatch.setattr(pagedattn, "paged_attention", mixed_up)
    expect_mismatch(distinct(3))


def test_a_copy_on_write_that_did_not_happen_is_caught(monkeypatch):
    monkeypatch.setattr(pagedattn, "copy_blocks", lambda *_, **__: None)
    expect_mismatch([request(0, (7, 10), output=6, samples=3)])


def test_a_prefix_served_to_another_prompt_is_caught(monkeypatch):
    class Careless(pagedattn.BlockManager):
        def add(self, token_ids, **options):
            return super().add(np.zeros_like(token_ids), **options)

    monkeypatch.setattr(engine_module, "BlockManager", Careless)
    expect_mismatch(distinct(3), max_batch=1)


def test_a_block_served_under_another_prefix_is_caught(monkeypatch):
    # The second block of both prompts holds the same tokens at the same positions, but what precedes it differs.
    class Forgetful(pagedattn.BlockManager):
        def add(self, token_ids, **options):
            token_ids = token_ids.copy()
            token_ids[:4] = 0
            return super().add(token_ids, **options)

    trace = [request(0, (1, 4), (5, 10)), request(1, (2, 4), (5, 10))]
    assert run(trace, max_batch=1, verify=16).mismatch is None
    monkeypatch.setattr(engine_module, "BlockManager", Forgetful)
    expect_mismatch(trace, max_batch=1)


# ---- vectors and the judge ----------------------------------------------------------------------------------------


def test_digests_are_equal_exactly_over_a_common_prefix(rng):
    tokens = rng.integers(0, 1000, 50, np.int32)
    other = tokens.copy()
    other[20] += 1
    a, b = Model.digests(tokens), Model.digests(other)
    assert (a[:20] == b[:20]).all()
    assert (a[20:] != b[20:]).all()
    assert len(np.unique(Model.digests(np.zeros(50, np.int32)))) == 50
    np.testing.assert_array_equal(Model.digests(tokens[:7]), a[:7])


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", None), ("bfloat16", None), ("float16", "float8_e5m2")])
def test_projected_vectors_are_those_that_the_judge_takes(rng, dtype, kv_dtype):
    options = small(dtype=dtype, kv_dtype=kv_dtype)
    model = Model(options, Device("cpu"))
    digests = Model.digests(rng.integers(0, 1000, 30, np.int32))
    q, k, v = model.project(digests, 1)
    assert (q.shape, k.shape, v.shape) == ((30, 4, 16), (30, 2, 16), (30, 2, 16))
    assert q.dtype == k.dtype == v.dtype == ELEMENT[dtype]
    keys, values = model.keys_values(digests, 1, 1)
    np.testing.assert_array_equal(model.query(digests[3], 1, 2), q[3, 2].astype(np.float64))
    if kv_dtype is None:
        np.testing.assert_array_equal(keys, k[:, 1].astype(np.float64))
        np.testing.assert_array_equal(values, v[:, 1].astype(np.float64))
    else:
        # Three bits of significand: within an eighth, and never beyond the type's largest number.
        np.testing.assert_allclose(keys, k[:, 1].astype(np.float64), rtol=0.13, atol=1e-4)
        assert np.isfinite(values).all()
    flat = np.concatenate([x.astype(np.float64).reshape(-1) for x in (q, k, v)])
    assert abs(flat.mean()) < 0.1
    assert abs(flat.std() - 1) < 0.1
    assert not np.array_equal(q[0, 0], q[0, 1])
    assert not np.array_equal(k, v)


def test_the_dense_row_is_attention_written_out(rng):
    options = small(head_dim=8)
    model = Model(options, Device("cpu"))
    digests = Model.digests(rng.integers(0, 1000, 9, np.int32))
    q, k, v = (x.astype(np.float64) for x in model.project(digests, 1))
    weights = [np.exp(sum(q[8, 3, d] * k[j, 1, d] for d in range(8)) / 8**0.5) for j in range(9)]
    exact = sum(w * v[j, 1] for j, w in enumerate(weights)) / sum(weights)
    np.testing.assert_allclose(dense_row(model, options, digests, 1, 3), exact, rtol=1e-12)
    assert relative_error(exact * 1.5, exact) == pytest.approx(0.5)
    assert np.isnan(relative_error(exact * np.nan, exact))


def test_the_block_manager_s_time_holds_no_wait_for_the_device():
    waited = []
    clock = Clock(lambda: waited.append(current))
    for current in PARTS:
        with clock(current):
            pass
    assert waited == ["attention", "cache writes", "making vectors", "verification"]
    assert all(clock.seconds[part] > 0 for part in PARTS)


def test_waste_is_what_is_allocated_and_empty():
    occupancy = Occupancy(block_size=4)
    # Two sequences of 5 and 8 tokens in four blocks; a fork of the first still shares its last block.
    assert occupancy.record(in_use=4, stored=[5, 8, 5], own=[5, 8], final=[10, 8, 12])
    assert occupancy.waste_paged == pytest.approx(3 / 16)
    assert occupancy.waste_at_final_length == pytest.approx(1 - 18 / 30)
    assert occupancy.waste_at_length(20) == pytest.approx(1 - 18 / 60)
    assert not occupancy.record(in_use=4, stored=[6], own=[6], final=[10])
    assert occupancy.waste_paged == pytest.approx((3 + 2) / 32)
    assert occupancy.peak_blocks == 4
    assert Occupancy(block_size=4).waste_paged == 0.0


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "--layers must be at least 1; got 0"),
        ({"kv_heads": 3}, "--heads must be a multiple of --kv-heads; got 4 and 3"),
        ({"head_dim": 12}, "--head-dim must be a multiple of 8 up to 256; got 12"),
        ({"head_dim": 264}, "--head-dim must be a multiple of 8 up to 256; got 264"),
        ({"dtype": "float64"}, "--dtype must be one of float32, float16, bfloat16; got float64"),
        ({"kv_dtype": "float8_e4m3"}, "--kv-dtype float8_e4m3 needs --dtype float16 or bfloat16; got float32"),
        (
            {"dtype": "float16", "kv_dtype": "bfloat16"},
            "--kv-dtype must be one of float16, float8_e4m3, float8_e5m2 with --dtype float16; got bfloat16",
        ),
        ({"num_blocks": 0}, "--num-blocks must be at least 1; got 0"),
        ({"num_blocks": 2**31}, "--num-blocks must be at most 2147483647; got 2147483648"),
        ({"memory": 10**6}, "--num-blocks and --memory both size the cache: give one of them"),
        ({"memory": 100, "num_blocks": None}, "--memory must hold at least one block, which takes 2.0 KiB"),
        ({"block_size": -1}, "--block-size must be at least 1; got -1"),
        ({"chunk": 0}, "--chunk must be at least 1; got 0"),
        ({"max_batch": 0}, "--max-batch must be at least 1; got 0"),
        ({"verify": -1}, "--verify must be at least 0; got -1"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        ({"backend": "tpu"}, "--backend must be auto, cpu or cuda; got tpu"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(SettingsError) as error:
        small(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize("changes", [{"num_blocks": 10**9}, {"chunk": 10**15, "num_blocks": 2**31 - 1}])
def test_what_does_not_fit_into_memory_is_refused_before_it_is_allocated(changes):
    with pytest.raises(SettingsError, match=r"a cache of \d+ blocks takes .* are free"):
        run(distinct(1), head_dim=256, block_size=64, **changes)


def test_the_cache_is_sized_by_blocks_by_memory_or_by_the_longest_request():
    assert small().pool_size(10) == 64
    block = 2 * 4 * (2 * 2 * 16 * 4)
    assert small(num_blocks=None, memory=10 * block + 1).pool_size(10) == 10
    assert small(num_blocks=None).pool_size(10) == 512
    assert small(num_blocks=None).pool_size(4 * 1000 + 1) == 2002


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("512MiB", 2**29), ("2G", 2 * 10**9), ("1.5kib", 1536), (" 1 TB ", 10**12), ("7b", 7)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-5", "5 parsecs", "1e3", "0", "nan", "5ib", "1" * 400])
def test_other_sizes_are_refused(text):
    with pytest.raises(SettingsError, match="--memory must be"):
        parse_bytes(text)


def test_sizes_are_shown_in_binary_units():
    assert [show_bytes(n) for n in (5, 2048, 3 * 2**29, 2**43)] == ["5 B", "2.0 KiB", "1.5 GiB", "8.0 TiB"]
