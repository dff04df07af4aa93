# SPDX-License-Identifier: Apache-2.0
#
# What users give, turned into C++ values or refused; and arrays turned back.

cdef enum:
    _INT32_MAX = 2147483647
    _NO_TOKEN = -1

cdef int64_t _INT64_MAX = 9223372036854775807
cdef int64_t _INT64_MIN = -_INT64_MAX - 1


cdef _invalid(str call, str argument, str rule, got):
    """Of a call whose name begins with a dot, a method of BlockManager, or of another one."""
    operation = f"BlockManager{call}" if call.startswith(".") else call
    return InvalidArgumentError(f"{operation}: `{argument}` must {rule}; got {got}")


cdef int64_t _integer(value, str call, str argument, int64_t low, int64_t high) except? -1:
    cdef int overflow = 0
    cdef int64_t exact
    if PyLong_CheckExact(value):
        exact = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow == 0 and low <= exact <= high:
            return exact
    try:
        number = operator.index(value)
    except TypeError:
        raise _invalid(call, argument, "be an integer", repr(value)) from None
    if not low <= number <= high:
        raise _invalid(call, argument, f"lie in {low} ... {high}", number)
    return number


cdef int64_t _id(value, str call, str argument) except? -1:
    return _integer(value, call, argument, _INT64_MIN, _INT64_MAX)


cdef object _integer_array(values, str call, str argument):
    """A one-dimensional NumPy array of integers, int32 or int64, C-contiguous."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise _invalid(call, argument, "be a sequence or array of integers", repr(error)) from None
    if array.ndim == 0:
        raise _invalid(call, argument, "be a sequence or array of integers", type(values).__name__)
    if array.ndim != 1:
        raise _invalid(call, argument, "have one dimension", f"shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise _invalid(call, argument, "hold integers", array.dtype)
    if array.dtype == np.uint64 and array.max() > np.uint64(2**63 - 1):
        raise _invalid(call, argument, "fit into int64", array.max())
    return np.ascontiguousarray(array, dtype=np.int32 if array.dtype == np.int32 else np.int64)


cdef char _open_buffer(values, Py_buffer *buffer) except? 0:
    """The element type, "i" for int32 or "q" for int64, of an array that can be read as it lies; else 0.

    It saves an array of the right kind the way through NumPy, which takes longer than many a call.
    """
    cdef char kind
    if not PyObject_CheckBuffer(values):
        return 0
    try:
        PyObject_GetBuffer(values, buffer, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS)
    except (BufferError, ValueError):
        return 0
    if buffer.ndim == 1 and buffer.shape[0] > 0 and buffer.format != NULL and buffer.format[1] == 0:
        kind = buffer.format[0]
        if kind == c"i" and buffer.itemsize == 4:
            return c"i"
        if (kind == c"l" or kind == c"q") and buffer.itemsize == 8:
            return c"q"
    PyBuffer_Release(buffer)
    return 0


cdef int _read_int64(values, str call, str argument, vector[int64_t] &out) except -1:
    cdef Py_buffer buffer
    cdef char kind
    cdef int64_t number
    if type(values) is list or type(values) is tuple:
        out.reserve(len(values))
        for item in values:
            number = _id(item, call, argument)
            out.push_back(number)
        return 0
    kind = _open_buffer(values, &buffer)
    if kind == 0:
        values = _integer_array(values, call, argument)
        if values.size == 0:
            return 0
        kind = _open_buffer(values, &buffer)
    try:
        if kind == c"q":
            out.assign(<const int64_t *>buffer.buf, <const int64_t *>buffer.buf + buffer.shape[0])
        else:
            out.assign(<const int32_t *>buffer.buf, <const int32_t *>buffer.buf + buffer.shape[0])
    finally:
        PyBuffer_Release(&buffer)
    return 0


@cython.final
@cython.no_gc
cdef class _Tokens:
    """Tokens that a caller gave: where they lie if that is an int32 array, and else narrowed in memory of our own."""

    cdef Py_buffer buffer
    cdef bint borrowed
    cdef vector[int32_t] own
    cdef const int32_t *data
    cdef int64_t size

    def __dealloc__(self):
        if self.borrowed:
            PyBuffer_Release(&self.buffer)


cdef _Tokens _read_tokens(values, str call, int64_t least=0):
    cdef _Tokens tokens = _Tokens.__new__(_Tokens)
    cdef vector[int64_t] wide
    cdef pair[int64_t, int64_t] found = (0, 0)
    cdef char kind = 0
    if type(values) is not list and type(values) is not tuple:
        kind = _open_buffer(values, &tokens.buffer)
        tokens.borrowed = kind != 0
    if kind == c"i":
        tokens.data, tokens.size = <const int32_t *>tokens.buffer.buf, tokens.buffer.shape[0]
        if not all_tokens(tokens.data, tokens.size):
            found = range_of(tokens.data, tokens.size)
    else:
        _read_int64(values, call, "token_ids", wide)
        if not all_tokens(<const int64_t *>wide.data(), <int64_t>wide.size()):
            found = range_of(<const int64_t *>wide.data(), <int64_t>wide.size())
        narrow(wide, tokens.own)
        tokens.data, tokens.size = tokens.own.data(), tokens.own.size()
    if found.first < least or found.second > _INT32_MAX:
        raise _invalid(call, "token_ids", f"lie in {least} ... {_INT32_MAX}",
                       found.first if found.first < least else found.second)
    return tokens


cdef cbool _is_single(value):
    if PyLong_CheckExact(value):
        return True
    if type(value) is list:  # the usual ones first: an attribute that is missing takes long to be missed
        return False
    return hasattr(value, "__index__") and not getattr(value, "ndim", 0)


cdef int _read_ids(seqs, str call, vector[int64_t] &out, str argument="seqs") except -1:
    """Ids: one or several."""
    if _is_single(seqs):
        out.push_back(_id(seqs, call, argument))
        return 0
    return _read_int64(seqs, call, argument, out)


cdef int _same_length(size_t got, size_t num_seqs, str call, str argument, str what) except -1:
    if got != num_seqs:
        raise _invalid(call, argument, f"hold {what} for each of {num_seqs} sequences", got)
    return 0


cdef string _read_key(extra_key, str call) except *:
    if not isinstance(extra_key, (bytes, bytearray, memoryview)):
        raise _invalid(call, "extra_key", "be bytes", type(extra_key).__name__)
    return <string>bytes(extra_key)


cdef object _numpy_copy(const void *data, size_t num_bytes, dtype):
    array = np.empty(num_bytes // np.dtype(dtype).itemsize, dtype)
    cdef uint8_t[::1] view
    if num_bytes > 0:
        view = array.view(np.uint8)
        memcpy(&view[0], data, num_bytes)
    return array


cdef object _pairs(const vector[int64_t] &values):
    return _numpy_copy(values.data(), values.size() * sizeof(int64_t), np.int64).reshape(-1, 2)


cdef cbool _flag(value, str call, str argument) except *:
    if not isinstance(value, (bool, np.bool_)):
        raise _invalid(call, argument, "be a bool", repr(value))
    return value


cdef double _fraction(value, str call, str argument) except? -1:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _invalid(call, argument, "be a real number", repr(value))
    number = float(value) if 0 <= value < 1 else 1.0
    if number >= 1:
        raise _invalid(call, argument, "lie in [0, 1)", value)
    return number


cdef uint64_t _seed(value) except? 0:
    try:
        number = operator.index(value)
    except TypeError:
        raise _invalid("BlockManager", "seed", "be an integer or None", repr(value)) from None
    if not 0 <= number < 2**64:
        raise _invalid("BlockManager", "seed", "lie in 0 ... 2**64 - 1", number)
    return number
