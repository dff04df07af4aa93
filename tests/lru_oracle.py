# SPDX-License-Identifier: Apache-2.0
"""What an ideal LRU cache of blocks finds in a trace: an oracle for the block manager's hit rate.

It knows neither tokens nor hashes nor block numbers.  A block's name is the path of segments that leads to it and its
place.  Unused blocks are in one ordered dictionary; whatever needs room takes the least recently used, and a finished
request's blocks become the most recently used, the last before the first.

    python tests/lru_oracle.py TRACE [NUM_BLOCKS [MAX_BATCH]]

runs a trace through the block manager too, and compares.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Sequence

from pagedattn.replay import Request, read_trace
from pagedattn.replay.manager_alone import replay_manager, turns

Name = tuple[int, int, int]


class LruOracle:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.hit_tokens = 0
        self._num_blocks = num_blocks
        self._size = block_size
        self._nodes: dict[tuple[int, int, int], int] = {}
        self._held: Counter[Name] = Counter()
        self._unused: OrderedDict[Name, None] = OrderedDict()
        self._running: dict[int, tuple[Request, list[Name]]] = {}

    def admit(self, request: Request) -> None:
        names = self._prompt_blocks(request)
        found = 0
        most = (request.prompt_length - 1) // self._size  # a prompt's last token is always computed
        while found < most and (names[found] in self._held or names[found] in self._unused):
            found += 1
        self.hit_tokens += found * self._size
        for name in names[:found]:
            self._hold(name)
        for name in names[found:]:
            if name not in self._held:
                self._unused.pop(name, None)
                self._make_room()
            self._hold(name)
        self._running[request.index] = request, names

    def decode(self, generated: dict[int, int]) -> None:
        """Everybody who runs writes a token, the n-th that it generated."""
        for index, (request, names) in self._running.items():
            generated[index] += 1
            if (request.prompt_length + generated[index] - 1) % self._size == 0:
                self._make_room()
                names.append((-1, index, len(names)))
                self._hold(names[-1])

    def finish(self, request: Request) -> None:
        _, names = self._running.pop(request.index)
        if (request.final_length - 1) % self._size != 0:  # the last token has been sampled and not computed
            del self._held[names.pop()]
        for name in reversed(names):
            self._held[name] -= 1
            if self._held[name] == 0:
                del self._held[name]
                self._unused[name] = None

    def _hold(self, name: Name) -> None:
        self._held[name] += 1
        self._unused.pop(name, None)

    def _make_room(self) -> None:
        if len(self._held) + len(self._unused) == self._num_blocks:
            self._unused.popitem(last=False)

    def _prompt_blocks(self, request: Request) -> list[Name]:
        names: list[Name] = []
        node, end = 0, 0
        for stream, length in zip(request.streams.tolist(), request.lengths.tolist(), strict=True):
            end += length
            names += [(node, stream, i) for i in range(len(names), end // self._size)]
            node = self._nodes.setdefault((node, stream, length), len(self._nodes) + 1)
        if end % self._size:
            names.append((-1, request.index, len(names)))
        return names


def oracle_hit_tokens(requests: Sequence[Request], num_blocks: int, block_size: int, max_batch: int) -> int:
    """Prompt tokens in whole blocks that the ideal cache finds in the turns of `replay_manager`."""
    oracle = LruOracle(num_blocks, block_size)
    generated: dict[int, int] = {}
    for turn in turns(requests, num_blocks, block_size, max_batch):
        oracle.decode(generated)
        for request in turn.admitted:
            oracle.admit(request)
            generated[request.index] = 0
        for request in turn.finished:
            oracle.finish(request)
    return oracle.hit_tokens


def main(trace: str, num_blocks: str = "200000", max_batch: str = "64") -> None:
    requests = read_trace(trace)
    run = replay_manager(requests, num_blocks=int(num_blocks), max_batch=int(max_batch))
    ideal = oracle_hit_tokens(requests, int(num_blocks), 16, int(max_batch))
    whole = run.hit_tokens - run.partial_hit_tokens
    print(f"{run.requests} requests, {run.prompt_tokens} prompt and {run.generated_tokens} generated tokens")
    print(f"{run.seconds:.3f} s in {run.steps} steps of the block manager")
    print(f"hit tokens: {whole} in whole blocks, {run.partial_hit_tokens} besides, {ideal} ideal", end=" ")
    print(f"({100 * (whole / max(ideal, 1) - 1):+.3f} %, hit rate {run.hit_tokens / run.prompt_tokens:.3f})")
    print(run.stats)


if __name__ == "__main__":
    main(*sys.argv[1:])
