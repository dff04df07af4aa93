# SPDX-License-Identifier: Apache-2.0
"""Random calls to the block manager, compared with the model of `block_manager_model` after each."""

from __future__ import annotations

import secrets
from random import Random

from block_manager_model import CheckedManager, live_long
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

RANDOM = st.randoms(use_true_random=False)


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(r=RANDOM)
    def make(self, r: Random) -> None:
        self.checked = CheckedManager.random(r)
        self.checked.add(r)

    @invariant()
    def the_manager_agrees_with_the_model(self) -> None:
        self.checked.compare()

    def teardown(self) -> None:
        if hasattr(self, "checked"):
            self.checked.finish()


def _rule(name: str) -> object:
    def call(self: BlockManagerMachine, r: Random) -> None:
        getattr(self.checked, name)(r)

    call.__name__ = name
    return precondition(lambda self: self.checked.possible()[name] > 0)(rule(r=RANDOM)(call))


for _name in CheckedManager(64, num_blocks=1, block_size=1).possible():
    setattr(BlockManagerMachine, _name, _rule(_name))

BlockManagerMachine.TestCase.settings = settings(
    deadline=None, max_examples=400, stateful_step_count=50, suppress_health_check=list(HealthCheck)
)
TestBlockManagerMachine = BlockManagerMachine.TestCase


def test_a_long_life_under_random_calls() -> None:
    """Fewer shapes than the machine above draws, but long lives, in which blocks change hands many times."""
    stats = live_long(calls=60_000, seed=secrets.randbits(32))
    well_trodden = ("evicted", "cow_copies", "merged_duplicates", "partial_hit_tokens", "swapped_in_blocks")
    assert min(stats[name] for name in well_trodden) > 100, stats
