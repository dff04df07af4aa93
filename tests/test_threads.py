"""Calls from many Python threads, changes of the number of threads under way, and fork after use.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_same_bytes
from backends import CupyBackend, NumpyBackend
from batches import Batch, make_batch

NUM_THREADS = 8


def batches(rng: np.random.Generator) -> list[Batch]:
    return [make_batch(rng, [400, 7, 90], [1, 7, 30], dtype=np.float16) for _ in range(NUM_THREADS)]


def test_calls_from_many_threads_give_the_bits_of_calls_in_turn(rng: np.random.Generator) -> None:
    calls = [batch.on(NumpyBackend()) for batch in batches(rng)]
    expected = [pagedattn.paged_attention(*args, **options) for args, options in calls]
    start = threading.Barrier(NUM_THREADS)

    def work(i: int) -> list[Any]:
        args, options = calls[i]
        start.wait()
        return [pagedattn.paged_attention(*args, **options) for _ in range(20)]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for i, results in enumerate(pool.map(work, range(NUM_THREADS))):
            for result in results:
                assert_same_bytes(result, expected[i])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_workers_that_are_woken_elsewhere_may_run_where_they_might_before() -> None:
    # In a process of its own, whose threads are the pool's.
    script = """
import os, time
import numpy as np, pagedattn

pagedattn.set_num_threads(2)
cache = np.ones((64, 16, 2, 64), np.float32)
tables, lens = np.arange(64, dtype=np.int32)[None], np.full(1, 1024, np.int32)
q = np.ones((1, 4, 64), np.float32)
call = lambda: pagedattn.paged_attention(q, cache, cache, tables, lens)

def masks(expected):  # of all threads, once they are as expected, or after two seconds
    for _ in range(200):
        found = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
        if sorted(map(sorted, found)) == expected:
            break
        time.sleep(0.01)
    return sorted(map(sorted, found))

def sleeping_calls():
    for _ in range(5):
        time.sleep(0.01)  # long enough for a worker to sleep
        call()

before = sorted(os.sched_getaffinity(0))
everywhere = [before] * (len(os.listdir("/proc/self/task")) + 1)  # a worker joins them
sleeping_calls()
assert masks(everywhere) == everywhere, masks(everywhere)
worker = max(map(int, os.listdir("/proc/self/task")))
os.sched_setaffinity(worker, before[:1])
sleeping_calls()
time.sleep(0.1)
assert os.sched_getaffinity(worker) == set(before[:1]), os.sched_getaffinity(worker)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=60)


def test_errors_in_one_thread_do_not_reach_another(rng: np.random.Generator) -> None:
    args, options = batches(rng)[0].on(NumpyBackend())
    expected = pagedattn.paged_attention(*args, **options)

    def work(i: int) -> bool:
        for turn in range(50):
            if (i + turn) % 2:
                with pytest.raises(pagedattn.InvalidArgumentError, match=f"`window`.*got -{i + 1}"):
                    pagedattn.paged_attention(*args, **options, window=-i - 1)
            else:
                assert_same_bytes(pagedattn.paged_attention(*args, **options), expected)
        return True

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert all(pool.map(work, range(NUM_THREADS)))


def test_the_number_of_threads_may_change_while_others_compute(rng: np.random.Generator) -> None:
    args, options = batches(rng)[0].on(NumpyBackend())
    expected = pagedattn.paged_attention(*args, deterministic=True, **options)
    threads = pagedattn.get_num_threads()
    done = threading.Event()

    def turn_the_knob() -> None:
        while not done.is_set():
            for n in (1, 3, 2):
                pagedattn.set_num_threads(n)

    knob = threading.Thread(target=turn_the_knob)
    knob.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for result in pool.map(
                lambda _: pagedattn.paged_attention(*args, deterministic=True, **options), range(100)
            ):
                assert_same_bytes(result, expected)
    finally:
        done.set()
        knob.join()
        pagedattn.set_num_threads(threads)
    assert pagedattn.get_num_threads() == threads


def test_a_malformed_number_of_threads_is_an_error_until_another_is_set() -> None:
    script = """
import numpy as np, pagedattn

cache = np.zeros((4, 16, 2, 8), np.float32)
copy = lambda: pagedattn.copy_blocks(cache, np.array([[0, 1]]))
for call in (pagedattn.get_num_threads, pagedattn.config, copy, pagedattn.get_num_threads):
    try:
        call()
    except pagedattn.InvalidArgumentError as error:
        assert "`PAGEDATTN_NUM_THREADS` must be a number of threads, 1 to 4096; got `abc`" in str(error), error
    else:
        raise AssertionError(call)
pagedattn.set_num_threads(2)
assert pagedattn.get_num_threads() == 2
copy()
"""
    environment = {**os.environ, "PAGEDATTN_NUM_THREADS": "abc"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=60)


FORK = """
import os, sys, threading, warnings
import numpy as np
import pagedattn

warnings.simplefilter("ignore")  # Python 3.12 warns of forks in a process with threads: the point of this test
rng = np.random.default_rng(0)
q = rng.standard_normal((64, 8, 64), np.float32)
cache = rng.standard_normal((2, 64, 16, 2, 64), np.float32)
args = q, cache[0], cache[1], np.arange(64, dtype=np.int32).reshape(1, 64), np.array([1000], np.int32)
starts = np.array([0, 64], np.int32)
pagedattn.set_num_threads(4)

def attend():
    return pagedattn.paged_attention(*args, query_start_loc=starts)

expected = attend()
busy = threading.Thread(target=lambda: [attend() for _ in range({parent_calls})])
busy.start()
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        good = pagedattn.get_num_threads() == 4 and all((attend() == expected).all() for _ in range(3))
        os._exit(0 if good else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
busy.join()
assert codes == [0, 0, 0, 0], codes
assert (attend() == expected).all()
"""


@pytest.mark.parametrize("parent_calls", [0, 40], ids=["idle parent", "parent computing in another thread"])
def test_a_forked_child_computes_and_so_does_its_parent(parent_calls: int) -> None:
    script = FORK.format(parent_calls=parent_calls)
    result = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_child_forked_in_the_middle_of_calls_to_managers_finds_them_whole_and_unlocked() -> None:
    script = """
import os, signal, threading, time, warnings
import numpy as np
import pagedattn

warnings.simplefilter("ignore")
managers = [pagedattn.BlockManager(20000, 4) for _ in range(2)]
stop = threading.Event()

def work(i):
    first = i * 10**8
    while not stop.is_set():
        m = managers[i % 2]
        seq = m.add(np.arange(first, first + 20000, dtype=np.int32))
        m.step(seq, m.num_tokens(seq) - m.num_computed_tokens(seq))
        m.free(seq)
        pagedattn.BlockManager(2, 4).check()  # those that come and go have a lock too
        first += 20000

threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads:
    thread.start()
codes = []
for turn in range(40):
    time.sleep(0.001 * (turn % 7))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        for m in managers:
            m.check()
            m.step(m.add([1, 2, 3]), 3)
        pagedattn.BlockManager(2, 4).check()
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop.set()
for thread in threads:
    thread.join()
assert codes == [0] * 40, codes
for m in managers:
    m.check()
"""
    result = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_process_that_has_computed_ends_cleanly_with_threads_asleep_or_busy() -> None:
    script = """
import threading
import numpy as np
import pagedattn
cache = np.ones((64, 16, 2, 64), np.float32)
q, tables = np.ones((64, 8, 64), np.float32), np.arange(64, dtype=np.int32).reshape(1, 64)
def attend():
    starts = np.array([0, 64], np.int32)
    return pagedattn.paged_attention(q, cache, cache, tables, np.array([1000], np.int32), query_start_loc=starts)
attend()
threading.Thread(target=lambda: [attend() for _ in range(10**6)], daemon=True).start()
attend()
print("done", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


@pytest.mark.gpu
def test_threads_with_streams_of_their_own_get_the_bits_of_calls_in_turn(
    cuda: CupyBackend, rng: np.random.Generator
) -> None:
    calls = [batch.on(cuda) for batch in batches(rng)]
    expected = [cuda.host(pagedattn.paged_attention(*args, **options)) for args, options in calls]

    def work(i: int) -> list[np.ndarray]:
        args, options = calls[i]
        with cuda.cupy.cuda.Stream(non_blocking=True) as stream:
            results = [pagedattn.paged_attention(*args, **options) for _ in range(20)]
            stream.synchronize()
        return [cuda.host(result) for result in results]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for i, results in enumerate(pool.map(work, range(NUM_THREADS))):
            for result in results:
                assert_same_bytes(result, expected[i])
