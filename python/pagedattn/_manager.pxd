# SPDX-License-Identifier: Apache-2.0
#
# The C++ core of the block manager, as Cython sees it.
from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.utility cimport pair
from libcpp.vector cimport vector


cdef extern from "blocks/current_error.h" namespace "pagedattn::blocks" nogil:
    cdef enum class ErrorKind:
        kOther
        kInvalidArgument
        kNotEnoughBlocks
        kCorruptState
        kOutOfMemory

    struct CurrentError:
        ErrorKind kind
        string message
        int64_t needed
        int64_t free
    CurrentError current_error() noexcept


cdef inline int raise_error() except -1:
    from pagedattn._errors import InvalidArgumentError, OutOfBlocks, PagedAttnError

    cdef CurrentError error = current_error()
    message = (<bytes>error.message).decode("utf-8", "replace")
    if error.kind == ErrorKind.kInvalidArgument:
        raise InvalidArgumentError(message)
    if error.kind == ErrorKind.kNotEnoughBlocks:
        raise OutOfBlocks(message, error.needed, error.free)
    if error.kind == ErrorKind.kCorruptState:
        raise PagedAttnError(message)
    if error.kind == ErrorKind.kOutOfMemory:
        raise MemoryError(message)
    raise RuntimeError(message)


cdef extern from "blocks/tokens.h" namespace "pagedattn::blocks" nogil:
    cbool all_tokens[T](const T *, int64_t)
    pair[int64_t, int64_t] range_of[T](const T *, int64_t)
    void narrow(const vector[int64_t] &, vector[int32_t] &) except +raise_error


cdef extern from "blocks/layout.h" namespace "pagedattn::blocks" nogil:
    cdef cppclass HashKey:
        uint64_t words[22]
    HashKey key_from_seed(uint64_t seed)

    cdef cppclass Config:
        int32_t num_blocks
        int32_t block_size
        int32_t num_host_blocks
        cbool prefix_caching
        double watermark
        int64_t window
        int64_t num_events
        HashKey key

    cdef cppclass StepRequest:
        const int64_t *ids
        const int64_t *counts
        const int32_t *tokens
        int64_t num_seqs

    cdef cppclass StepArrays:
        int32_t *block_tables
        int32_t *seq_lens
        int32_t *query_start_loc
        int64_t *slot_mapping
        int64_t *positions
        int64_t *copies
        int64_t max_seqs
        int64_t max_blocks
        int64_t max_tokens
        int64_t max_copies
        int64_t num_seqs
        int64_t num_tokens
        int64_t num_copies
        uint64_t manager

    cdef cppclass PoolCounters:
        int64_t allocated
        int64_t freed
        int64_t evicted
        int64_t published
        int64_t peak_held

    cdef cppclass Counters:
        int64_t prefix_queried_tokens
        int64_t prefix_hit_tokens
        int64_t partial_hit_tokens
        int64_t cow_copies
        int64_t merged_duplicates
        int64_t window_released
        int64_t preemptions
        int64_t swapped_out_blocks
        int64_t swapped_in_blocks

    cdef cppclass Layout:
        vector[int64_t] sequences
        vector[int32_t] tables
        vector[int32_t] ref_counts
        vector[uint8_t] published

    cdef cppclass Manager:
        Manager(const Config &) except +raise_error
        int64_t add(const int32_t *, int64_t, const string &, int8_t) except +raise_error
        int64_t take_prefix(int64_t) except +raise_error
        int64_t match(const int32_t *, int64_t, const string &) except +raise_error
        void append(const int64_t *, int64_t, const int64_t *, const int32_t *) except +raise_error
        void truncate(int64_t, int64_t) except +raise_error
        vector[int64_t] fork(int64_t, int64_t) except +raise_error
        void reorder(const int64_t *, int64_t, const int64_t *) except +raise_error
        void free(const int64_t *, int64_t) except +raise_error
        void preempt(const int64_t *, int64_t) except +raise_error
        int64_t pin(const int32_t *, int64_t, const string &) except +raise_error
        void unpin(const int64_t *, int64_t) except +raise_error
        vector[uint64_t] block_hashes(const int32_t *, int64_t, const string &) except +raise_error
        void reset_prefix_cache() except +raise_error
        vector[uint8_t] drain_events() except +raise_error
        int64_t max_table_blocks(const StepRequest &) except +raise_error
        void step(const StepRequest &, StepArrays &) except +raise_error
        vector[int64_t] swap_out(const int64_t *, int64_t) except +raise_error
        vector[int64_t] swap_in(const int64_t *, int64_t) except +raise_error
        int64_t num_tokens(int64_t) except +raise_error
        int64_t num_computed(int64_t) except +raise_error
        int64_t num_cached(int64_t) except +raise_error
        cbool swapped(int64_t) except +raise_error
        vector[int32_t] token_ids(int64_t) except +raise_error
        vector[int32_t] block_table(int64_t) except +raise_error
        vector[int64_t] ids() except +raise_error
        vector[int64_t] pins() except +raise_error
        int64_t num_pinned(int64_t) except +raise_error
        int32_t ref_count(int64_t) except +raise_error
        int64_t num_free() except +raise_error
        int64_t num_free_host() except +raise_error
        int64_t num_held() except +raise_error
        int64_t num_published() except +raise_error
        int64_t num_sequences() except +raise_error
        int64_t num_dropped_events() except +raise_error
        Counters counters() except +raise_error
        PoolCounters pool_counters() except +raise_error
        Layout layout() except +raise_error
        const Config &config()
        void weaken_hash(int)


cdef extern from "blocks/snapshot.h" namespace "pagedattn::blocks" nogil:
    cdef cppclass Snapshot:
        pass

    cdef cppclass FieldView:
        const char *name
        const char *dtype
        const void *data
        size_t num_bytes

    vector[FieldView] view_fields(const Snapshot &) except +raise_error
    void assign_field(Snapshot &, string, const void *, size_t) except +raise_error

    cdef cppclass Check:
        @staticmethod
        void run(const Manager &) except +raise_error

    cdef cppclass SnapshotWriter:
        @staticmethod
        Snapshot write(const Manager &) except +raise_error

    cdef cppclass SnapshotReader:
        @staticmethod
        unique_ptr[Manager] read(const Snapshot &, int hash_bits) except +raise_error
