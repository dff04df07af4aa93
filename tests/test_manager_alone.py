# SPDX-License-Identifier: Apache-2.0
"""A trace through the block manager alone finds what an ideal LRU cache would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lru_oracle import oracle_hit_tokens
from pagedattn.replay import read_trace, synthetic_trace
from pagedattn.replay.manager_alone import replay_manager, turns


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up Mooncake trace: conversations whose every turn begins with all that went before."""
    rng = np.random.default_rng()
    talks: list[list[int]] = [[i % 3] for i in range(40)]
    lines = []
    for ids in range(1000, 1400):
        talk = talks[rng.integers(len(talks))]
        talk += range(1000 * ids, 1000 * ids + int(rng.integers(1, 4)))
        length = 512 * len(talk) - int(rng.integers(512))
        record = {"timestamp": 0, "input_length": length, "output_length": int(rng.integers(1, 300)), "hash_ids": talk}
        lines.append(json.dumps(record))
    path: Path = tmp_path_factory.mktemp("trace") / "conversations.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("num_blocks", [2_000, 8_000])
def test_prefix_hits_are_those_of_an_ideal_lru_cache(conversations: Path, num_blocks: int) -> None:
    requests = read_trace(conversations, requests=400)
    run = replay_manager(requests, num_blocks=num_blocks, max_batch=8)
    ideal = oracle_hit_tokens(requests, num_blocks, 16, 8)
    assert run.stats["evicted"] > 10_000
    assert ideal > 0.02 * run.prompt_tokens
    assert run.hit_tokens - run.partial_hit_tokens == pytest.approx(ideal, rel=0.005)


def test_samples_and_system_prompts_hit_as_in_an_ideal_cache() -> None:
    requests = synthetic_trace(400)
    run = replay_manager(requests, num_blocks=1_000, max_batch=4)
    ideal = oracle_hit_tokens(requests, 1_000, 16, 4)
    assert run.stats["evicted"] > 1_000
    assert run.hit_tokens - run.partial_hit_tokens == pytest.approx(ideal, rel=0.005)
    assert run.stats["held_blocks"] == 0


def test_everybody_runs_once_and_no_more_than_fit() -> None:
    requests = synthetic_trace(100, length_scale=0.2)
    running: dict[int, int] = {}
    seen = []
    for turn in turns(requests, 500, 4, 7):
        running.update({request.index: -(-request.final_length // 4) for request in turn.admitted})
        seen += [request.index for request in turn.admitted]
        assert len(running) <= 7
        assert sum(running.values()) <= 500
        for request in turn.finished:
            del running[request.index]
    assert seen == [request.index for request in requests]
    assert not running


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"request 0 needs .* blocks of 1"):
        replay_manager(synthetic_trace(1), num_blocks=1)
