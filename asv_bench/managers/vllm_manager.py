# SPDX-License-Identifier: Apache-2.0
"""What vLLM's block managers cost, in the units of `benchmarks.block_manager_units`.

The manager of its second engine does all but forks, which only the first engine's had (vLLM up to 0.10).  Requests and
their hashes are made beforehand: what is timed is the manager alone, which neither takes in tokens nor writes slots.
"""

from __future__ import annotations

import gc

import torch
import vllm
from benchmarks.unit_timing import BLOCK_SIZE, PROMPT, PROMPT_BLOCKS, best, prompts
from vllm.core.block_manager import SelfAttnBlockSpaceManager
from vllm.inputs import token_inputs
from vllm.sampling_params import SamplingParams
from vllm.sequence import Sequence, SequenceGroup, SequenceStatus
from vllm.utils import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

TITLE = "vLLM"
VERSION = f"vLLM {vllm.__version__}"

init_none_hash(sha256)
hash_blocks = get_request_block_hasher(BLOCK_SIZE, sha256)
made = 0


def request(ids: list[int]) -> Request:
    """A request whose full blocks have been hashed."""
    global made
    made += 1
    return Request(str(made), ids, SamplingParams(max_tokens=10_000), None, None, block_hasher=hash_blocks)


def manager(num_blocks: int) -> KVCacheManager:
    spec = FullAttentionSpec(BLOCK_SIZE, 1, 1, torch.float16, use_mla=False)
    # One block of the pool is the null block.
    config = KVCacheConfig(num_blocks + 1, [], [KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, max_model_len=1 << 20)


def compute(kv: KVCacheManager, one: Request, tokens: int) -> None:
    """The next tokens of a request get their blocks, and count as computed."""
    assert kv.allocate_slots(one, tokens) is not None
    one.num_computed_tokens += tokens


def computed(kv: KVCacheManager, num_prompts: int, tokens: int, seed: int = 0) -> list[Request]:
    requests = [request(row.tolist()) for row in prompts(num_prompts, tokens, seed)]
    for one in requests:
        compute(kv, one, tokens)
    return requests


def allocate() -> float:
    pool = BlockPool(2048 + 1, enable_caching=True)
    held: list[object] = []

    def call(_: None) -> None:
        nonlocal held
        held = pool.get_new_blocks(2048)

    return best(call, lambda: pool.free_blocks(held), 100) / 2048


def allocate_evicting() -> float:
    kv = manager(16 * PROMPT_BLOCKS)
    seed = 0
    held: list[object] = []

    def full_of_cached_blocks() -> None:
        nonlocal seed
        seed += 1
        kv.block_pool.free_blocks(held)
        for one in computed(kv, 16, PROMPT, seed):
            kv.free(one)
        assert kv.usage == 0

    def call(_: None) -> None:
        nonlocal held
        held = kv.block_pool.get_new_blocks(16 * PROMPT_BLOCKS)

    return best(call, full_of_cached_blocks, 5) / (16 * PROMPT_BLOCKS)


def free() -> float:
    kv = manager(8192)
    kept = [request(row.tolist()) for row in prompts(128, 1024)]

    def fill() -> None:
        for one in kept:
            one.num_computed_tokens = 0
            compute(kv, one, 1024)

    def call(_: None) -> None:
        for one in kept:
            kv.free(one)

    return best(call, fill, 5) / 8192


def hash_block() -> float:
    one = request(prompts(1, PROMPT)[0].tolist())

    def forget() -> None:
        one.block_hashes = []

    return best(lambda _: hash_blocks(one), forget, 20) / PROMPT_BLOCKS


def look_up() -> float:
    kv = manager(2 * PROMPT_BLOCKS)
    (one,) = computed(kv, 1, PROMPT + 1)
    assert kv.get_computed_blocks(one)[1] == PROMPT
    return best(lambda _: kv.get_computed_blocks(one), lambda: None, 50)


def look_up_fragmented() -> float:
    kv = manager(64 * (PROMPT_BLOCKS + 1))
    requests = [request(row.tolist()) for row in prompts(64, PROMPT + 1)]
    for _ in range(PROMPT_BLOCKS):
        for one in requests:
            compute(kv, one, BLOCK_SIZE)
    assert kv.get_computed_blocks(requests[0])[1] == PROMPT
    return best(lambda _: kv.get_computed_blocks(requests[0]), lambda: None, 50)


def admit_miss() -> float:
    kv = manager(16 * PROMPT_BLOCKS)
    kept = [request(row.tolist()) for row in prompts(16, PROMPT)]
    running: list[Request] = []

    def forget() -> None:
        for one in running:
            kv.free(one)
            one.num_computed_tokens = 0
        assert kv.reset_prefix_cache()
        running[:] = kept

    def admit(_: None) -> None:
        for one in kept:
            kv.get_computed_blocks(one)
            kv.allocate_slots(one, PROMPT)

    return best(admit, forget, 8) / len(kept)


def decode() -> float:
    kv = manager(1024 * 64)
    running = computed(kv, 1024, 120)

    def steps(_: None) -> None:
        for _ in range(16):
            for one in running:
                one.append_output_token_ids(7)
                kv.allocate_slots(one, 1)
                one.num_computed_tokens += 1

    return best(steps, lambda: None, 4) / 16 / 1024


def fork() -> float:
    kv = SelfAttnBlockSpaceManager(BLOCK_SIZE, 1024, 0, watermark=0)
    ids = prompts(1, 257 * BLOCK_SIZE)[0].tolist()
    parent = Sequence(0, token_inputs(ids), BLOCK_SIZE)
    kv.allocate(SequenceGroup("0", [parent], 0.0, SamplingParams()))
    parent.status = SequenceStatus.RUNNING
    child = parent.fork(1)

    def free() -> None:
        if child.seq_id in kv.block_tables:
            kv.free(child)

    return best(lambda _: kv.fork(parent, child), free, 50)


def garbage_collection() -> float:
    before = best(lambda _: gc.collect(), lambda: None, 20)
    kv = manager(100_000)
    assert kv.block_pool.get_num_free_blocks() == 100_000
    return max(0.0, best(lambda _: gc.collect(), lambda: None, 20) - before)


UNITS = {
    "allocate, a block": allocate,
    "allocate while evicting, a block": allocate_evicting,
    "free, a block": free,
    "hash, a block": hash_block,
    "look up 4096 cached tokens": look_up,
    "look them up, fragmented": look_up_fragmented,
    "admit 4096 new tokens": admit_miss,
    "decode, a sequence of 1024": decode,
    "fork 257 blocks": fork,
    "full collection at 100 000 blocks": garbage_collection,
}
