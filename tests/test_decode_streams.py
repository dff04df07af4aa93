"""Chains of kernels on one stream without a wait in between: each sees all that came before it, and nothing after it.

A kernel may be launched while the one before it still runs, and must itself wait for what it reads, and for whoever
reads what it writes.  Every chain here feeds results back, so that one stale read changes all that follows.  It must
give the bits of the same chain with a wait after each kernel.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pagedattn
import pytest
import reference
from accuracy import assert_close, assert_same_bytes
from backends import DTYPES, Array, CupyBackend
from batches import Batch, make_batch, normal, poison
from cuda_graphs import refill, workspace_for

pytestmark = pytest.mark.gpu

# Names the block and the slot of each new token, as an engine's scheduler does.
PLACE_TOKENS = """
    const int seq = i / query_len;
    const int position = seq_lens[seq] - query_len + i % query_len;
    const int column = position / block_size;
    const int block = plan[seq * max_blocks + column];
    tables[seq * max_blocks + column] = block;
    slots[i] = static_cast<long long>(block) * block_size + position % block_size;
"""


class Decoder:
    """One attention layer whose queries, keys and values follow from its last output, its whole state on the device."""

    BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 128
    SEQ_LENS = (0, 15, 16, 100, 3000)
    STATE = ("seq_lens", "tables", "slots", "q", "key", "value", "k_cache", "v_cache", "out")

    def __init__(
        self, cuda: CupyBackend, rng: np.random.Generator, kv_dtype: str, query_len: int, num_steps: int
    ) -> None:
        self.cuda, self.kv_dtype, self.query_len = cuda, DTYPES[kv_dtype], query_len
        self.place_tokens = cuda.cupy.ElementwiseKernel(
            "raw int32 plan, raw int32 seq_lens, int32 query_len, int32 block_size, int32 max_blocks",
            "raw int32 tables, raw int64 slots",
            PLACE_TOKENS,
            "place_tokens",
        )
        num_seqs = len(self.SEQ_LENS)
        num_tokens = num_seqs * query_len
        self.max_blocks = -(-(max(self.SEQ_LENS) + num_steps * query_len) // self.BLOCK_SIZE)
        num_blocks = num_seqs * self.max_blocks
        plan = rng.permutation(num_blocks).reshape(num_seqs, self.max_blocks).astype(np.int32)
        self.host = self._start(rng, plan, num_blocks, num_tokens)
        self.device = dict(zip(self.host, cuda.arrays(*self.host.values()), strict=True))
        self.options: dict[str, Any] = {"query_start_loc": self.device["starts"]} if query_len > 1 else {}
        if cuda.kv_dtype(self.kv_dtype) is not None:
            self.options["kv_dtype"] = cuda.kv_dtype(self.kv_dtype)
        self.workspace = workspace_for(cuda, [(self._attention_arguments(), self.options)])

    def _start(
        self, rng: np.random.Generator, plan: np.ndarray, num_blocks: int, num_tokens: int
    ) -> dict[str, np.ndarray]:
        """Return the state before the first step, and what never changes."""
        cache_shape = (num_blocks, self.BLOCK_SIZE, self.KV_HEADS, self.HEAD_DIM)
        caches = {name: poison(cache_shape, self.kv_dtype) for name in ("k_cache", "v_cache")}
        tables = np.full(plan.shape, -7, np.int32)
        for seq, seq_len in enumerate(self.SEQ_LENS):
            used = -(-seq_len // self.BLOCK_SIZE)
            tables[seq, :used] = plan[seq, :used]
            positions = np.arange(seq_len)
            slots = plan[seq, positions // self.BLOCK_SIZE], positions % self.BLOCK_SIZE
            for cache in caches.values():
                cache[slots] = normal(rng, (seq_len, self.KV_HEADS, self.HEAD_DIM), self.kv_dtype)
        q_shape = (num_tokens, self.HEADS, self.HEAD_DIM)
        kv_shape = (num_tokens, self.KV_HEADS, self.HEAD_DIM)
        return {
            **caches,
            "plan": plan,
            "tables": tables,
            "seq_lens": np.array(self.SEQ_LENS, np.int32),
            "starts": (self.query_len * np.arange(len(self.SEQ_LENS) + 1)).astype(np.int32),
            "slots": np.full(num_tokens, -1, np.int64),
            "q": poison(q_shape, np.float16),
            "key": poison(kv_shape, np.float16),
            "value": poison(kv_shape, np.float16),
            "out": normal(rng, q_shape, np.float16),
            "q_noise": normal(rng, q_shape, np.float16),
            "key_noise": normal(rng, kv_shape, np.float16),
            "value_noise": normal(rng, kv_shape, np.float16),
        }

    def _attention_arguments(self) -> list[Array]:
        return [self.device[name] for name in ("q", "k_cache", "v_cache", "tables", "seq_lens")]

    def restart(self) -> None:
        """Put the state back to that before the first step; the workspace stays as the last call left it."""
        self.cuda.synchronize()
        for name in self.STATE:
            refill(self.device[name], self.host[name])
        self.cuda.synchronize()

    def step(self, stream: Any, wait: Callable[[], None]) -> None:
        """Enqueue one step: lengths, tables, slots, q and new keys and values, the cache, then attention."""
        d, cupy = self.device, self.cuda.cupy
        group = self.HEADS // self.KV_HEADS
        with stream:
            cupy.add(d["seq_lens"], self.query_len, out=d["seq_lens"])
            wait()
            sizes = (self.query_len, self.BLOCK_SIZE, self.max_blocks)
            self.place_tokens(d["plan"], d["seq_lens"], *sizes, d["tables"], d["slots"], size=len(d["slots"]))
            wait()
            for name, last in (("q", d["out"]), ("key", d["out"][:, ::group]), ("value", d["out"][:, 1::group])):
                cupy.multiply(last, 0.5, out=d[name])
                wait()
                cupy.add(d[name], d[name + "_noise"], out=d[name])
                wait()
        kv = {"kv_dtype": self.options["kv_dtype"]} if "kv_dtype" in self.options else {}
        pagedattn.reshape_and_cache(d["key"], d["value"], d["k_cache"], d["v_cache"], d["slots"], stream=stream, **kv)
        wait()
        pagedattn.paged_attention(
            *self._attention_arguments(), out=d["out"], workspace=self.workspace, stream=stream, **self.options
        )
        wait()

    def state(self) -> dict[str, np.ndarray]:
        """Return the whole state, in host memory."""
        state = {name: self.cuda.host(self.device[name]) for name in self.STATE}
        return {name: a.view(self.kv_dtype) if name.endswith("_cache") else a for name, a in state.items()}

    def check_last_step(self) -> None:
        """Compare the last output with the reference on the last state."""
        state = self.state()
        expected, _ = reference.paged_attention(
            *(state[name] for name in ("q", "k_cache", "v_cache", "tables", "seq_lens")),
            query_start_loc=self.host["starts"],
        )
        assert_close(state["out"], expected, np.float16)


def nothing() -> None:
    pass


@pytest.mark.parametrize("kv_dtype", ["float16", "float8_e4m3"])
@pytest.mark.parametrize("query_len", [1, 4])
def test_a_chain_of_decode_steps_needs_no_wait(
    cuda: CupyBackend, rng: np.random.Generator, query_len: int, kv_dtype: str
) -> None:
    num_steps, steps_a_graph = 64, 8
    decoder = Decoder(cuda, rng, kv_dtype, query_len, num_steps)
    stream = cuda.cupy.cuda.Stream(non_blocking=True)

    decoder.restart()
    for step in range(num_steps):
        decoder.step(stream, stream.synchronize)
        if step % 16 == 15:
            decoder.check_last_step()
    expected = decoder.state()

    def check(what: str) -> None:
        cuda.synchronize()
        for name, array in decoder.state().items():
            assert_same_bytes(array, expected[name], f"{name} {what}")

    for _ in range(3):
        decoder.restart()
        for _ in range(num_steps):
            decoder.step(stream, nothing)
        check("of steps that were enqueued")

    for steps in (1, steps_a_graph):
        decoder.restart()
        graph = captured(cuda, stream, lambda steps=steps: [decoder.step(stream, nothing) for _ in range(steps)])
        for _ in range(2):
            decoder.restart()
            for _ in range(num_steps // steps):
                graph.launch(stream)
            check(f"of graphs of {steps} steps")


def captured(cuda: CupyBackend, stream: Any, enqueue: Callable[[], Any]) -> Any:
    """Return a graph of what `enqueue` puts on the stream."""
    cuda.synchronize()
    with stream:
        stream.begin_capture()
        enqueue()
        return stream.end_capture()


# Of a stack of layers: one long sequence, so that a call takes far longer than the next one's launch, among short ones.
LAYER_SEQ_LENS = [20_011, 5, 0, 64, 1, 300]
NUM_LAYERS, NUM_CALLS = 3, 24


@pytest.mark.parametrize("in_turn", [False, True], ids=["an output each", "two outputs in turn"])
@pytest.mark.parametrize("kv_dtype", ["float16", "float8_e4m3"])
@pytest.mark.parametrize("group", [4, 80])  # the latter for kernels of many rows
def test_a_stack_of_attentions_needs_no_wait(
    cuda: CupyBackend, rng: np.random.Generator, group: int, kv_dtype: str, in_turn: bool
) -> None:
    # Each call's output is the next one's q.  In between, at times, a call that has nothing to do and could be done
    # before all that was enqueued ahead of it.
    heads = {"num_q_heads": group, "num_kv_heads": 1, "head_dim": 128}
    layers = [
        make_batch(rng, LAYER_SEQ_LENS, dtype=np.float16, kv_dtype=DTYPES[kv_dtype], **heads) for _ in range(NUM_LAYERS)
    ]
    calls = [layer.on(cuda) for layer in layers]
    idle_args, idle_options = make_batch(rng, [0], dtype=np.float16, kv_dtype=DTYPES[kv_dtype], **heads).on(cuda)
    idle_out, no_slots, no_keys = cuda.arrays(
        poison((1, group, 128), np.float16), np.full(2, -1, np.int64), np.zeros((2, 1, 128), np.float16)
    )
    first_q = calls[0][0][0]
    outs = [cuda.array(poison(layers[0].q.shape, np.float16)) for _ in range(2 if in_turn else NUM_CALLS)]
    workspace = workspace_for(cuda, [*calls, (idle_args, idle_options)])

    def run(stream: Any, wait: Callable[[], None]) -> None:
        q = first_q
        for i in range(NUM_CALLS):
            (_, k_cache, v_cache, tables, lens), options = calls[i % NUM_LAYERS]
            out = outs[i % len(outs)]
            pagedattn.paged_attention(
                q, k_cache, v_cache, tables, lens, out=out, workspace=workspace, stream=stream, **options
            )
            wait()
            if i % 3 == 1:
                pagedattn.paged_attention(*idle_args, out=idle_out, workspace=workspace, stream=stream, **idle_options)
            if i % 3 == 2:
                pagedattn.reshape_and_cache(no_keys, no_keys, k_cache, v_cache, no_slots, stream=stream, **options)
            wait()
            q = out

    def results() -> list[np.ndarray]:
        fresh = [cuda.host(out) for out in outs]
        for out in outs:
            refill(out, poison(out.shape, np.float16))
        cuda.synchronize()
        return fresh

    stream = cuda.cupy.cuda.Stream(non_blocking=True)
    cuda.synchronize()
    run(stream, stream.synchronize)
    expected = results()
    if not in_turn:
        check_stack(layers, expected)

    def check(what: str) -> None:
        for number, (actual, right) in enumerate(zip(results(), expected, strict=True)):
            assert_same_bytes(actual, right, f"output {number} {what}")

    for _ in range(3):
        run(stream, nothing)
        stream.synchronize()
        check("of calls that were enqueued")
    graph = captured(cuda, stream, lambda: run(stream, nothing))
    for _ in range(3):
        graph.launch(stream)
        stream.synchronize()
        check("of a graph")


def check_stack(layers: list[Batch], outs: list[np.ndarray]) -> None:
    """Compare the first outputs of a stack with the reference, each on the output before it."""
    q = layers[0].q
    for layer, out in zip(layers, outs, strict=False):
        assert_close(out, replace(layer, q=q).reference()[0], np.float16)
        q = out
