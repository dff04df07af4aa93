# SPDX-License-Identifier: Apache-2.0
#
# The arrays of a step.

cdef Py_ssize_t _length(array):
    """The first extent of an array; 0 for what has none, and is refused."""
    return array.shape[0] if isinstance(array, np.ndarray) and array.ndim > 0 else 0


cdef class StepBatch:
    """The arrays of one step, as the kernels take them.

    Made by `BlockManager.step`.  Make one yourself, with room for the largest batch, and give it as ``out=`` to have
    the same memory reused by every step: then a step allocates nothing and writes only the table rows that changed.

    Parameters
    ----------
    max_seqs, max_blocks, max_tokens : int
        Sequences of a batch, blocks of a sequence and new tokens of a batch, at most.

    Attributes
    ----------
    block_tables : ndarray of int32, shape (num_seqs, max_blocks)
        Entries behind a sliding window and past the end of a sequence are in range and never read by a kernel.
    seq_lens : ndarray of int32, shape (num_seqs,)
        Tokens in the cache, the new ones included.
    query_start_loc : ndarray of int32, shape (num_seqs + 1,)
    slot_mapping : ndarray of int64, shape (num_tokens,)
        Where `reshape_and_cache` puts each new token: block times block size plus offset.
    positions : ndarray of int64, shape (num_tokens,)
        The position of each new token in its sequence.
    copies : ndarray of int64, shape (num_copies, 2)
        Pairs of (source block, destination block) for `copy_blocks`, to be run before the slots are written.

    Examples
    --------
    >>> from pagedattn import BlockManager
    >>> m = BlockManager(num_blocks=8, block_size=4)
    >>> batch = m.step([m.add([1, 2, 3, 4, 5])], [5])
    >>> batch.slot_mapping
    array([0, 1, 2, 3, 4])
    """

    cdef StepArrays _arrays
    cdef object _block_tables, _seq_lens, _query_start_loc, _slot_mapping, _positions, _copies
    cdef readonly object block_tables
    cdef readonly object seq_lens
    cdef readonly object query_start_loc
    cdef readonly object slot_mapping
    cdef readonly object positions
    cdef readonly object copies

    def __init__(self, max_seqs, max_blocks, max_tokens):
        cdef object seqs, blocks, tokens  # Python's integers, whose product does not overflow
        seqs = _integer(max_seqs, "StepBatch", "max_seqs", 0, _INT32_MAX)
        blocks = _integer(max_blocks, "StepBatch", "max_blocks", 0, _INT32_MAX)
        tokens = _integer(max_tokens, "StepBatch", "max_tokens", 0, _INT32_MAX)
        try:
            tables = np.zeros((seqs, blocks), np.int32)
            lens, starts = np.zeros(seqs, np.int32), np.zeros(seqs + 1, np.int32)
            slots, positions = np.zeros(tokens, np.int64), np.zeros(tokens, np.int64)
            copies = np.zeros((seqs, 2), np.int64)
        except (MemoryError, ValueError):  # NumPy's ValueError: more bytes than can be counted
            size = 4 * (seqs * (blocks + 6) + 1) + 16 * tokens
            raise MemoryError(f"StepBatch: arrays of {size} bytes do not fit into memory") from None
        self._bind(tables, lens, starts, slots, positions, copies)

    @classmethod
    def from_arrays(cls, block_tables, seq_lens, query_start_loc, slot_mapping, positions=None, copies=None):
        """A batch over arrays of your own, pinned ones for instance; their shapes are the capacities.

        Parameters
        ----------
        block_tables : ndarray of int32, shape (max_seqs, max_blocks)
        seq_lens : ndarray of int32, shape (max_seqs,)
        query_start_loc : ndarray of int32, shape (max_seqs + 1,)
        slot_mapping, positions : ndarray of int64, shape (max_tokens,)
        copies : ndarray of int64, shape (max_copies, 2)

        Returns
        -------
        StepBatch

        Raises
        ------
        InvalidArgumentError
            An array has another dtype or shape, is not contiguous or is read-only, or two share memory.
        """
        seqs = _length(seq_lens)
        tokens = _length(slot_mapping)
        if positions is None:
            positions = np.zeros(tokens, np.int64)
        if copies is None:
            copies = np.zeros((seqs, 2), np.int64)
        width = block_tables.shape[1] if getattr(block_tables, "ndim", 0) == 2 else 0
        arrays = (  # those whose lengths others must have come first
            ("seq_lens", seq_lens, np.int32, (seqs,)),
            ("slot_mapping", slot_mapping, np.int64, (tokens,)),
            ("block_tables", block_tables, np.int32, (seqs, width)),
            ("query_start_loc", query_start_loc, np.int32, (seqs + 1,)),
            ("positions", positions, np.int64, (tokens,)),
            ("copies", copies, np.int64, (_length(copies), 2)),
        )
        for i, (name, array, dtype, shape) in enumerate(arrays):
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
                got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
                raise InvalidArgumentError(
                    f"StepBatch.from_arrays: `{name}` must be {np.dtype(dtype)} with shape {shape}; got {got}")
            if not array.flags.c_contiguous or not array.flags.writeable:
                raise InvalidArgumentError(f"StepBatch.from_arrays: `{name}` must be C-contiguous and writable")
            for other_name, other, _, _ in arrays[:i]:
                if np.may_share_memory(array, other):
                    raise InvalidArgumentError(
                        f"StepBatch.from_arrays: `{name}` must be memory apart from `{other_name}`")
        cdef StepBatch batch = cls.__new__(cls)
        batch._bind(block_tables, seq_lens, query_start_loc, slot_mapping, positions, copies)
        return batch

    cdef _bind(self, block_tables, seq_lens, query_start_loc, slot_mapping, positions, copies):
        # Never a second time: a step in another thread, without Python's lock, may be writing to the first arrays.
        if self._block_tables is not None:
            raise PagedAttnError("StepBatch: `__init__` has been called already; make another StepBatch instead")
        self._block_tables, self._seq_lens, self._query_start_loc = block_tables, seq_lens, query_start_loc
        self._slot_mapping, self._positions, self._copies = slot_mapping, positions, copies
        self._arrays.block_tables = <int32_t *><size_t>block_tables.ctypes.data
        self._arrays.seq_lens = <int32_t *><size_t>seq_lens.ctypes.data
        self._arrays.query_start_loc = <int32_t *><size_t>query_start_loc.ctypes.data
        self._arrays.slot_mapping = <int64_t *><size_t>slot_mapping.ctypes.data
        self._arrays.positions = <int64_t *><size_t>positions.ctypes.data
        self._arrays.copies = <int64_t *><size_t>copies.ctypes.data
        self._arrays.max_seqs, self._arrays.max_blocks = block_tables.shape
        self._arrays.max_tokens = len(slot_mapping)
        self._arrays.max_copies = len(copies)
        self._arrays.num_seqs = self._arrays.num_tokens = self._arrays.num_copies = 0
        self._arrays.manager = 0  # these arrays hold nothing of any manager yet
        self._show()

    cdef _show(self):
        cdef Py_ssize_t seqs = self._arrays.num_seqs
        cdef Py_ssize_t tokens = self._arrays.num_tokens
        cdef Py_ssize_t copies = self._arrays.num_copies
        if self.seq_lens is None or len(self.seq_lens) != seqs:
            self.block_tables = self._block_tables[:seqs]
            self.seq_lens = self._seq_lens[:seqs]
            self.query_start_loc = self._query_start_loc[: seqs + 1]
        if self.positions is None or len(self.positions) != tokens:
            self.slot_mapping = self._slot_mapping[:tokens]
            self.positions = self._positions[:tokens]
        if self.copies is None or len(self.copies) != copies:
            self.copies = self._copies[:copies]

    @property
    def num_seqs(self):
        """Sequences of the last step."""
        return self._arrays.num_seqs

    @property
    def num_tokens(self):
        """New tokens of the last step."""
        return self._arrays.num_tokens

    def __repr__(self):
        return (f"StepBatch(num_seqs={self._arrays.num_seqs}, num_tokens={self._arrays.num_tokens}, "
                f"copies={self._arrays.num_copies})")
