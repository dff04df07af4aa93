# cython: language_level=3, boundscheck=False, wraparound=False
# distutils: language = c++
#
# SPDX-License-Identifier: Apache-2.0
"""The block manager's Python face.

The data structures and rules are C++ (`src/blocks/manager.h` and the headers beside it).  This module checks what users
give, releases Python's lock, and turns what comes back into NumPy arrays; no Python object exists per block or per
token.
"""

cimport cython

import numbers
import operator
import os

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint64_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport move, pair
from libcpp.vector cimport vector
from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact

from ._manager cimport (
    Check, Config, Counters, HashKey, Layout, Manager, PoolCounters, Snapshot, SnapshotReader, SnapshotWriter,
    StepArrays, StepRequest, all_tokens, assign_field, key_from_seed, narrow, range_of, view_fields,
)

from ._errors import InvalidArgumentError, PagedAttnError

include "_arguments.pxi"
include "_step_batch.pxi"


cdef class BlockManager:
    """The blocks of a paged KV cache: who holds which, what they contain, and where new tokens go.

    A sequence is a list of known tokens of which the first `num_computed_tokens` have their KV in blocks.  `add` makes
    one from a prompt, `append` adds tokens to it, and `step` gives blocks to the next tokens of a batch and the arrays
    that the kernels need to compute them.  Blocks that become full are published in the prefix cache, and a later
    prompt that begins with the same tokens, under the same `extra_key`, uses them instead of computing them again.
    A prompt that goes on in the middle of a cached block shares that block too, if at least half of it is of use, and
    gets a copy with its first write.  When a sequence is freed its published blocks stay cached until their place is
    needed; of the unused ones those of the lowest priority go first, among equals the least recently used, the tail of
    a prefix before its head.

    A published block may be used by the next `step`, `add` or `fork`.  The caller therefore runs what a batch asks for
    (the copies, the cache writes, the attention) before that of a later batch, which one CUDA stream does by itself.

    Every call either succeeds or raises and leaves the state as it was.  Calls may come from several threads: they run
    one after another, without Python's lock.

    Parameters
    ----------
    num_blocks : int
        Blocks of the KV cache.
    block_size : int
        Tokens of a block.
    num_host_blocks : int, optional
        Blocks of the host cache that `swap_out` moves sequences to.
    prefix_caching : bool, optional
        Share the blocks of equal prefixes.
    watermark : float, optional
        Fraction of the blocks, in [0, 1), that the first step of a sequence and `swap_in` leave free, so that those
        already running can grow.  It is waived for a sequence that is alone on the device.
    window : int, optional
        The `window` of the attention.  Blocks that no later token can see are released; their block-table entries
        become -1 (0, which is not read, in the arrays of a step).
    num_events : int, optional
        Keep the last so many events of the prefix cache for `events`.
    seed : int, optional
        Makes the keyed hash of the prefix cache the same in every process.  Without it the key comes from the
        operating system.  Which blocks are shared does not depend on it: tokens are compared, not only hashes.

    Raises
    ------
    InvalidArgumentError
        A parameter is out of range.
    MemoryError
        The book-keeping, 48 bytes a block and its tokens, does not fit into memory.

    Examples
    --------
    >>> from pagedattn import BlockManager
    >>> m = BlockManager(num_blocks=16, block_size=4)
    >>> a = m.add([1, 2, 3, 4, 5, 6])
    >>> batch = m.step([a], [6])
    >>> batch.block_tables, batch.slot_mapping
    (array([[0, 1]], dtype=int32), array([0, 1, 2, 3, 4, 5]))
    >>> b = m.add([1, 2, 3, 4, 9])
    >>> m.num_cached_tokens(b)
    4
    >>> m.append([a], [7])
    >>> m.step([a, b], [1, 1]).seq_lens
    array([7, 5], dtype=int32)
    >>> m.free([a, b])
    >>> m.num_free_blocks, m.num_cached_blocks
    (16, 1)
    """

    # Kinds of `events`.
    EVENT_STORED = 1
    EVENT_REMOVED = 2
    EVENT_EVICTED = 3

    cdef unique_ptr[Manager] _manager

    def __init__(self, num_blocks, block_size, *, num_host_blocks=0, prefix_caching=True, watermark=0.0, window=None,
                 num_events=0, seed=None):
        cdef Config config
        config.num_blocks = _integer(num_blocks, "BlockManager", "num_blocks", 1, _INT32_MAX)
        config.block_size = _integer(block_size, "BlockManager", "block_size", 1, _INT32_MAX)
        config.num_host_blocks = _integer(num_host_blocks, "BlockManager", "num_host_blocks", 0, _INT32_MAX)
        config.prefix_caching = _flag(prefix_caching, "BlockManager", "prefix_caching")
        config.watermark = _fraction(watermark, "BlockManager", "watermark")
        config.window = 0 if window is None else _integer(window, "BlockManager", "window", 1, 4611686018427387904)
        config.num_events = _integer(num_events, "BlockManager", "num_events", 0, _INT32_MAX)
        cdef const uint8_t[::1] entropy
        if seed is None:
            entropy = os.urandom(sizeof(HashKey))
            memcpy(&config.key, &entropy[0], sizeof(HashKey))
        else:
            config.key = key_from_seed(_seed(seed))
        cdef unique_ptr[Manager] manager
        manager.reset(new Manager(config))
        self._start(manager)

    cdef int _start(self, unique_ptr[Manager] &manager) except -1:
        # Never a second time: other threads may be inside the first one, and they have let go of Python's lock.
        if self._manager.get() != NULL:
            raise PagedAttnError("BlockManager: `__init__` has been called already; make another BlockManager instead")
        self._manager.swap(manager)
        return 0

    cdef Manager *_core(self) except NULL nogil:
        if self._manager.get() == NULL:
            with gil:
                raise PagedAttnError("BlockManager: `__init__` has not been called")
        return self._manager.get()

    # --- the life of a sequence --------------------------------------------------------------------------------------

    def add(self, token_ids, *, extra_key=b"", priority=0):
        """Add a sequence and let it take its cached prefix at once.

        Parameters
        ----------
        token_ids : sequence or array of int
            The prompt, at least one token, each in 0 ... 2**31 - 1.
        extra_key : bytes, optional
            Whatever else the KV depends on (adapter, image, tenant).  Only sequences of equal keys share blocks.  Build
            it from labelled parts if it has several, so that two meanings cannot give the same bytes.
        priority : int, optional
            -128 ... 127: how long its blocks stay cached after use.  A block keeps the highest priority of those that
            have used it; a lower one is evicted first, however recently it was used.

        Returns
        -------
        int
            The sequence's id.  Ids are never reused.

        Raises
        ------
        InvalidArgumentError
            The prompt is empty, holds something else than tokens, or can never fit into the pool.

        Notes
        -----
        At most all but the last token come from the cache: the last one's query is needed for the next token.
        Blocks taken here are held until the sequence is freed or preempted, even while it waits for its first step.
        """
        cdef string key = _read_key(extra_key, ".add")
        cdef int8_t level = _integer(priority, ".add", "priority", -128, 127)
        cdef int64_t seq
        cdef _Tokens tokens = _read_tokens(token_ids, ".add")
        if tokens.size == 0:
            raise _invalid(".add", "token_ids", "hold at least one token", "none")
        with nogil:
            seq = self._core().add(tokens.data, tokens.size, key, level)
        return seq

    def take_prefix(self, seq):
        """Let a sequence that waits for its first step, or was preempted, take what is cached of it by now.

        Parameters
        ----------
        seq : int

        Returns
        -------
        int
            `num_cached_tokens` of the sequence.

        Raises
        ------
        InvalidArgumentError
            The sequence is unknown, swapped out, or has had a step.
        """
        cdef int64_t sequence = _id(seq, ".take_prefix", "seq")
        cdef int64_t tokens
        with nogil:
            tokens = self._core().take_prefix(sequence)
        return tokens

    def match(self, token_ids, extra_key=b""):
        """The tokens that `add` would find cached, without adding anything or touching the eviction order.

        Parameters
        ----------
        token_ids : sequence or array of int
        extra_key : bytes, optional

        Returns
        -------
        int
        """
        cdef string key = _read_key(extra_key, ".match")
        cdef int64_t found
        cdef _Tokens tokens = _read_tokens(token_ids, ".match")
        if tokens.size == 0:
            return 0
        with nogil:
            found = self._core().match(tokens.data, tokens.size, key)
        return found

    def append(self, seqs, token_ids, query_start_loc=None):
        """Append tokens, sampled or otherwise known, to sequences.

        Parameters
        ----------
        seqs : int or sequence of int
            Each at most once.
        token_ids : sequence or array of int
            One token a sequence.  All of them where `seqs` is one id.
        query_start_loc : sequence or array of int, optional
            Where each sequence's tokens begin in `token_ids`, and their number at the end.

        Raises
        ------
        InvalidArgumentError
            A sequence is unknown or repeated, the lengths disagree, or a sequence would outgrow the pool.
        """
        cdef vector[int64_t] ids, starts
        cdef size_t i
        _read_ids(seqs, ".append", ids)
        cdef _Tokens tokens = _read_tokens([token_ids] if _is_single(token_ids) else token_ids, ".append")
        if query_start_loc is not None:
            _read_int64(query_start_loc, ".append", "query_start_loc", starts)
            if starts.size() != ids.size() + 1 or starts[0] != 0 or starts[starts.size() - 1] != <int64_t>tokens.size:
                raise _invalid(".append", "query_start_loc",
                               f"hold {ids.size() + 1} offsets from 0 to {tokens.size}", query_start_loc)
            for i in range(ids.size()):
                if starts[i] > starts[i + 1]:
                    raise _invalid(".append", "query_start_loc", "not descend", query_start_loc)
        elif _is_single(seqs):
            starts = [0, tokens.size]
        else:
            _same_length(tokens.size, ids.size(), ".append", "token_ids", "one token")
            starts.resize(ids.size() + 1)
            for i in range(starts.size()):
                starts[i] = i
        with nogil:
            self._core().append(ids.data(), ids.size(), starts.data(), tokens.data)

    def truncate(self, seq, num_tokens):
        """Cut a sequence down to its first tokens, after rejected speculation for instance.

        Blocks that are no longer needed are given back.  What the prefix cache offers stays intact: a block that others
        use is copied before this sequence writes to it again, one that only the cache knows leaves the cache then.

        Parameters
        ----------
        seq : int
        num_tokens : int
            At least 1 and at most the sequence's tokens.

        Raises
        ------
        InvalidArgumentError
            The sequence is unknown, `num_tokens` is out of range, or the sliding window has released blocks that
            would be visible again.
        """
        cdef int64_t sequence = _id(seq, ".truncate", "seq")
        cdef int64_t keep = _id(num_tokens, ".truncate", "num_tokens")
        with nogil:
            self._core().truncate(sequence, keep)

    def fork(self, seq, n=1):
        """Make `n` copies of a sequence that share all its blocks, for parallel samples or beams.

        The last, partly filled block is shared too; whoever writes to it while others use it gets a copy (`copies` of
        the step), and the last one writes in place.

        Parameters
        ----------
        seq : int
        n : int, optional

        Returns
        -------
        list of int
            The ids of the copies.
        """
        cdef int64_t sequence = _id(seq, ".fork", "seq")
        cdef int64_t count = _integer(n, ".fork", "n", 1, _INT32_MAX)
        cdef vector[int64_t] ids
        with nogil:
            ids = self._core().fork(sequence, count)
        return ids

    def reorder(self, seqs, parents):
        """Let sequences go on as copies of others, as the beams do after a step of beam search.

        Sequence ``seqs[i]`` keeps its id and becomes what ``parents[i]`` was before the call, sharing all its blocks as
        after a `fork`; what it was itself is given back unless another one became it.

        Parameters
        ----------
        seqs : int or sequence of int
            Each at most once.
        parents : int or sequence of int
            A live sequence for each; several may go on from the same one, and one from itself.

        Raises
        ------
        InvalidArgumentError
            A sequence is unknown or repeated, or the lengths disagree.
        """
        cdef vector[int64_t] ids, origins
        _read_ids(seqs, ".reorder", ids)
        _read_ids(parents, ".reorder", origins, "parents")
        _same_length(origins.size(), ids.size(), ".reorder", "parents", "one parent")
        with nogil:
            self._core().reorder(ids.data(), ids.size(), origins.data())

    def free(self, seqs):
        """Forget sequences.  Their published blocks stay cached until their place is needed.

        Parameters
        ----------
        seqs : int or sequence of int

        Raises
        ------
        InvalidArgumentError
            A sequence is unknown, has been freed already, or is repeated.  Nothing is freed then.
        """
        cdef vector[int64_t] ids
        _read_ids(seqs, ".free", ids)
        with nogil:
            self._core().free(ids.data(), ids.size())

    def preempt(self, seqs):
        """Preempt by recomputation: give back all blocks of sequences, device or host, and keep their tokens.

        They can be stepped again from their first token, or, after `take_prefix`, from what is still cached of them.

        Parameters
        ----------
        seqs : int or sequence of int
        """
        cdef vector[int64_t] ids
        _read_ids(seqs, ".preempt", ids)
        with nogil:
            self._core().preempt(ids.data(), ids.size())

    def pin(self, token_ids, *, extra_key=b""):
        """Keep what is cached of a prompt, a system prompt for instance, from being evicted.

        Parameters
        ----------
        token_ids : sequence or array of int
            Its whole blocks that are cached now are pinned.
        extra_key : bytes, optional

        Returns
        -------
        int
            The pin's id, for `unpin`.

        Raises
        ------
        InvalidArgumentError
            Not even the first block is cached.

        Notes
        -----
        Pinned blocks are held: they are missing in `num_free_blocks`.
        """
        cdef string key = _read_key(extra_key, ".pin")
        cdef int64_t pin
        cdef _Tokens tokens = _read_tokens(token_ids, ".pin")
        with nogil:
            pin = self._core().pin(tokens.data, tokens.size, key)
        return pin

    def unpin(self, pins):
        """Take pins back.  Their blocks stay cached until their place is needed.

        Parameters
        ----------
        pins : int or sequence of int

        Raises
        ------
        InvalidArgumentError
            One is no pin, has been taken back already, or is repeated.  None is taken back then.
        """
        cdef vector[int64_t] ids
        _read_ids(pins, ".unpin", ids, "pins")
        with nogil:
            self._core().unpin(ids.data(), ids.size())

    def pins(self):
        """The ids of all pins, in the order in which they were made.

        Returns
        -------
        list of int
        """
        return self._core().pins()

    def num_pinned_tokens(self, pin):
        """Tokens that a pin keeps in the cache."""
        return self._core().num_pinned(_id(pin, ".num_pinned_tokens", "pin"))

    def block_hashes(self, token_ids, *, extra_key=b""):
        """The names that the prefix cache gives to the whole blocks of a prompt, cached or not.

        A name is the keyed 128-bit hash of the prefix that ends with the block: comparable between managers that were
        made with the same `seed`, and what `events` tells of.

        Parameters
        ----------
        token_ids : sequence or array of int
        extra_key : bytes, optional

        Returns
        -------
        ndarray of uint64, shape (num_blocks, 2)
        """
        cdef string key = _read_key(extra_key, ".block_hashes")
        cdef vector[uint64_t] hashes
        cdef _Tokens tokens = _read_tokens(token_ids, ".block_hashes")
        with nogil:
            hashes = self._core().block_hashes(tokens.data, tokens.size, key)
        return _numpy_copy(hashes.data(), hashes.size() * sizeof(uint64_t), np.uint64).reshape(-1, 2)

    def events(self):
        """What has happened in the prefix cache since the last call, the oldest first.

        The manager keeps the last `num_events` of them; `stats` counts those that were dropped.

        Returns
        -------
        ndarray of a structured dtype
            ``hash`` and ``parent_hash`` (two uint64 each; see `block_hashes`), ``kind`` (int32: ``EVENT_STORED``,
            ``EVENT_REMOVED`` or ``EVENT_EVICTED`` of this class), ``block`` (int32) and ``token_ids`` (int32, a
            block's).  The parent of a first block is its namespace; a block whose parent has left the cache has zeros
            there.
        """
        cdef vector[uint8_t] records
        with nogil:
            records = self._core().drain_events()
        return _numpy_copy(records.data(), records.size(), np.dtype([
            ("hash", np.uint64, 2), ("parent_hash", np.uint64, 2), ("kind", np.int32), ("block", np.int32),
            ("token_ids", np.int32, self.block_size)]))

    def reset_prefix_cache(self):
        """Forget all cached prefixes, after a change of weights for instance.

        Live sequences keep their blocks and publish nothing more; preempt them to compute them afresh.  Pins keep
        nothing any more.
        """
        with nogil:
            self._core().reset_prefix_cache()

    # --- blocks for a batch ------------------------------------------------------------------------------------------

    def step(self, seqs, num_new_tokens, out=None, *, token_ids=None):
        """Give blocks to the next tokens of a batch, all or nothing, and say where everything lies.

        Sequence i computes its next ``num_new_tokens[i]`` tokens that are known and not computed: the whole prompt, a
        chunk of it, one sampled token, or several drafted ones.  They count as computed when the call returns.

        Parameters
        ----------
        seqs : int or sequence of int
            Each at most once.
        num_new_tokens : int or sequence of int
            At least one for each sequence; a single number counts for all.
        out : StepBatch, optional
            A batch whose arrays are to be reused.
        token_ids : int or sequence or array of int, optional
            One token for each sequence, appended to it first: what was sampled in the last step.  -1 appends nothing.

        Returns
        -------
        StepBatch
            `out` where it is given.

        Raises
        ------
        OutOfBlocks
            There are not enough free or evictable blocks (`needed`, `free`).
        InvalidArgumentError
            A sequence is unknown, repeated or swapped out, has not that many tokens to compute, or `out` is too small.
        """
        cdef vector[int64_t] ids, counts
        cdef _Tokens tokens
        cdef int64_t width, count, num_tokens = 0
        cdef StepBatch batch
        cdef StepRequest request
        _read_ids(seqs, ".step", ids)
        if _is_single(num_new_tokens):
            count = _integer(num_new_tokens, ".step", "num_new_tokens", 1, _INT32_MAX)
            counts.assign(ids.size(), count)
        else:
            _read_int64(num_new_tokens, ".step", "num_new_tokens", counts)
        _same_length(counts.size(), ids.size(), ".step", "num_new_tokens", "a number")
        request.ids, request.counts, request.num_seqs = ids.data(), counts.data(), ids.size()
        request.tokens = NULL
        if token_ids is not None:
            tokens = _read_tokens([token_ids] if _is_single(token_ids) else token_ids, ".step", _NO_TOKEN)
            _same_length(tokens.size, ids.size(), ".step", "token_ids", "one token")
            request.tokens = tokens.data
        if out is None:
            with nogil:
                width = self._core().max_table_blocks(request)
                for count in counts:
                    num_tokens += count
            batch = StepBatch(ids.size(), width, num_tokens)
        elif isinstance(out, StepBatch):
            batch = out
            if batch.block_tables is None:
                raise _invalid(".step", "out", "have arrays", "a StepBatch whose `__init__` has not been called")
        else:
            raise _invalid(".step", "out", "be a StepBatch", type(out).__name__)
        with nogil:
            self._core().step(request, batch._arrays)
        batch._show()
        return batch

    def swap_out(self, seqs):
        """Preempt by swapping: move the blocks of sequences to the host pool.

        Parameters
        ----------
        seqs : int or sequence of int
            Blocks that they share with each other are moved once.

        Returns
        -------
        ndarray of int64, shape (num_blocks, 2)
            Pairs of (device block, host block) for `swap_blocks`, to be copied before the next step's kernels run.

        Raises
        ------
        OutOfBlocks
            The host pool is too small.
        InvalidArgumentError
            A sequence is unknown, repeated or swapped out already.
        """
        cdef vector[int64_t] ids, mapping
        _read_ids(seqs, ".swap_out", ids)
        with nogil:
            mapping = self._core().swap_out(ids.data(), ids.size())
        return _pairs(mapping)

    def swap_in(self, seqs):
        """Bring swapped sequences back to the device.

        Leading blocks that the prefix cache still holds are taken from it and need no copy.

        Parameters
        ----------
        seqs : int or sequence of int

        Returns
        -------
        ndarray of int64, shape (num_blocks, 2)
            Pairs of (host block, device block) for `swap_blocks`, to be copied before the next step's kernels run.

        Raises
        ------
        OutOfBlocks
            There are not enough free or evictable blocks besides those that the watermark keeps back.
        InvalidArgumentError
            A sequence is unknown, repeated or not swapped out.
        """
        cdef vector[int64_t] ids, mapping
        _read_ids(seqs, ".swap_in", ids)
        with nogil:
            mapping = self._core().swap_in(ids.data(), ids.size())
        return _pairs(mapping)

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def num_blocks(self):
        """Blocks of the device pool."""
        return self._core().config().num_blocks

    @property
    def block_size(self):
        """Tokens of a block."""
        return self._core().config().block_size

    @property
    def num_host_blocks(self):
        """Blocks of the host pool."""
        return self._core().config().num_host_blocks

    @property
    def prefix_caching(self):
        """Whether equal prefixes share blocks."""
        return self._core().config().prefix_caching

    @property
    def watermark(self):
        """Fraction of the blocks that admission leaves free."""
        return self._core().config().watermark

    @property
    def window(self):
        """The sliding window in tokens, or None."""
        return self._core().config().window or None

    @property
    def num_events(self):
        """Events of the prefix cache that are kept for `events`."""
        return self._core().config().num_events

    @property
    def num_free_blocks(self):
        """Blocks that can be handed out: free ones and unused cached ones."""
        return self._core().num_free()

    @property
    def num_free_host_blocks(self):
        """Free blocks of the host pool."""
        return self._core().num_free_host()

    @property
    def num_cached_blocks(self):
        """Blocks that the prefix cache offers, in use or not."""
        return self._core().num_published()

    @property
    def usage(self):
        """Fraction of the blocks that sequences hold."""
        return self._core().num_held() / self._core().config().num_blocks

    def seqs(self):
        """The ids of all live sequences, in the order in which they were made.

        Returns
        -------
        list of int
        """
        return self._core().ids()

    def num_tokens(self, seq):
        """Tokens of a sequence that are known, computed or not."""
        return self._core().num_tokens(_id(seq, ".num_tokens", "seq"))

    def num_computed_tokens(self, seq):
        """Tokens of a sequence whose KV is in its blocks, those of the last step included."""
        return self._core().num_computed(_id(seq, ".num_computed_tokens", "seq"))

    def num_cached_tokens(self, seq):
        """Tokens of a sequence that were found in the prefix cache when it was added or last took its prefix."""
        return self._core().num_cached(_id(seq, ".num_cached_tokens", "seq"))

    def is_swapped(self, seq):
        """Whether the blocks of a sequence are in the host pool."""
        return self._core().swapped(_id(seq, ".is_swapped", "seq"))

    def token_ids(self, seq):
        """A copy of a sequence's tokens.

        Returns
        -------
        ndarray of int32, shape (num_tokens,)
        """
        cdef vector[int32_t] tokens = self._core().token_ids(
            _id(seq, ".token_ids", "seq"))
        return _numpy_copy(tokens.data(), tokens.size() * sizeof(int32_t), np.int32)

    def block_table(self, seq):
        """A copy of a sequence's block table: device blocks, or host blocks while it is swapped out.

        Returns
        -------
        ndarray of int32, shape (num_blocks,)
            -1 where a sliding window has released the block.
        """
        cdef vector[int32_t] table = self._core().block_table(
            _id(seq, ".block_table", "seq"))
        return _numpy_copy(table.data(), table.size() * sizeof(int32_t), np.int32)

    def ref_count(self, block):
        """How many sequences hold a device block."""
        return self._core().ref_count(_id(block, ".ref_count", "block"))

    def stats(self):
        """Counters since the manager was made.

        Returns
        -------
        dict of str to int
            ``allocated`` blocks handed out; ``freed`` blocks that their last sequence gave back, cached or not;
            ``evicted`` cached blocks whose place was taken; ``published`` blocks put into the prefix cache;
            ``merged_duplicates`` blocks given back because the cache held the same prefix already;
            ``prefix_queried_tokens`` and ``prefix_hit_tokens``, whose quotient is the hit rate, and those of the hits
            that were a part of a block, ``partial_hit_tokens``; ``cow_copies``;
            ``window_released`` block-table entries; ``preemptions``; ``swapped_out_blocks`` and ``swapped_in_blocks``
            copied; ``dropped_events``; ``peak_blocks`` held at once; ``held_blocks``, ``cached_blocks`` and
            ``sequences`` at present.
        """
        cdef PoolCounters pool = self._core().pool_counters()
        cdef Counters counters = self._core().counters()
        return {
            "allocated": pool.allocated,
            "freed": pool.freed,
            "evicted": pool.evicted,
            "published": pool.published,
            "merged_duplicates": counters.merged_duplicates,
            "prefix_queried_tokens": counters.prefix_queried_tokens,
            "prefix_hit_tokens": counters.prefix_hit_tokens,
            "partial_hit_tokens": counters.partial_hit_tokens,
            "cow_copies": counters.cow_copies,
            "window_released": counters.window_released,
            "preemptions": counters.preemptions,
            "swapped_out_blocks": counters.swapped_out_blocks,
            "swapped_in_blocks": counters.swapped_in_blocks,
            "dropped_events": self._core().num_dropped_events(),
            "peak_blocks": pool.peak_held,
            "held_blocks": self._core().num_held(),
            "cached_blocks": self._core().num_published(),
            "sequences": self._core().num_sequences(),
        }

    def check(self):
        """Prove the invariants: every block is held, free or cached, counted rightly, and listed once.

        Takes time in proportion to the blocks and the block-table entries.

        Raises
        ------
        PagedAttnError
            An invariant is broken; the message names it.  This is a bug.
        """
        with nogil:
            Check.run(self._core()[0])

    def layout(self):
        """What a picture of the cache needs, as plain data, to be drawn later by ``pagedattn._svg.render``.

        Returns
        -------
        dict
            ``num_blocks``, ``block_size``; for each sequence ``seq_ids``, ``num_tokens``, ``num_computed_tokens``,
            ``is_swapped`` and ``table_offsets`` (one more) into ``tables``; for each block ``ref_counts`` and
            ``is_cached``.
        """
        cdef Layout layout
        with nogil:
            layout = self._core().layout()
        fields = _numpy_copy(layout.sequences.data(), layout.sequences.size() * sizeof(int64_t), np.int64)
        fields = fields.reshape(-1, 5)
        return {
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "seq_ids": fields[:, 0].copy(),
            "num_tokens": fields[:, 1].copy(),
            "num_computed_tokens": fields[:, 2].copy(),
            "is_swapped": fields[:, 4].astype(np.bool_),
            "table_offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(fields[:, 3])]),
            "tables": _numpy_copy(layout.tables.data(), layout.tables.size() * sizeof(int32_t), np.int32),
            "ref_counts": _numpy_copy(layout.ref_counts.data(), layout.ref_counts.size() * sizeof(int32_t), np.int32),
            "is_cached": _numpy_copy(layout.published.data(), layout.published.size(), np.bool_),
        }

    # --- the whole state ---------------------------------------------------------------------------------------------

    def snapshot(self):
        """The whole state as plain arrays, in the same form whatever it holds: `restore` continues from it exactly.

        Returns
        -------
        dict of str to ndarray
            Ready for ``numpy.savez``.  It holds the secret hash key and all tokens, and no events.
        """
        cdef Snapshot snapshot
        with nogil:
            snapshot = SnapshotWriter.write(self._core()[0])
        return {field.name.decode(): _numpy_copy(field.data, field.num_bytes, field.dtype.decode())
                for field in view_fields(snapshot)}

    @classmethod
    def restore(cls, snapshot):
        """A manager in the state that `snapshot` holds.

        Parameters
        ----------
        snapshot : mapping of str to ndarray
            What `BlockManager.snapshot` returned.

        Returns
        -------
        BlockManager

        Raises
        ------
        InvalidArgumentError
            A field is missing or damaged, or the version is another one.

        Notes
        -----
        Damage is found where fields contradict each other: the hash of every cached block that can be found is computed
        anew.  What stands in one field alone, a token that has not been computed for instance, is taken as it is.
        """
        return cls._restore(snapshot, 64)

    @classmethod
    def _restore(cls, snapshot, hash_bits):
        """For tests of collisions: `restore`, of a manager that kept only so many bits of each hash lane."""
        cdef Snapshot state
        cdef const uint8_t[::1] view
        cdef int bits = hash_bits
        cdef unique_ptr[Manager] restored
        cdef BlockManager manager = cls.__new__(cls)
        for field in view_fields(state):
            name, dtype = field.name.decode(), np.dtype(field.dtype.decode())
            try:
                array = np.ascontiguousarray(snapshot[name])
            except (KeyError, IndexError, TypeError):
                raise InvalidArgumentError(f"BlockManager.restore: `snapshot` must hold {name!r}") from None
            if array.dtype != dtype or array.ndim != 1:
                raise InvalidArgumentError(f"BlockManager.restore: `snapshot[{name!r}]` must be {dtype} with one "
                                           f"dimension; got {array.dtype} {array.shape}")
            if array.size > 0:
                view = array.view(np.uint8)
                assign_field(state, field.name, &view[0], view.shape[0])
        with nogil:
            restored = move(SnapshotReader.read(state, bits))
        manager._start(restored)
        return manager

    def __repr__(self):
        return (f"BlockManager(num_blocks={self.num_blocks}, block_size={self.block_size}, "
                f"sequences={self._core().num_sequences()}, held={self._core().num_held()}, "
                f"cached={self.num_cached_blocks}, free={self.num_free_blocks})")

    def _repr_svg_(self):
        from . import _svg  # here, since few programs draw

        return _svg.render(self.layout(), title=f"BlockManager: {self._core().num_sequences()} sequences")

    def _weaken_hash(self, bits):
        """For tests of collisions: keep only so many bits of each hash lane.  Call it on an empty manager."""
        self._core().weaken_hash(_integer(bits, "._weaken_hash", "bits", 0, 64))
