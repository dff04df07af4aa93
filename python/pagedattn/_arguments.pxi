# SPDX-License-Identifier: Apache-2.0
#
# What users give, turned into C++ values or refused; and arrays turned back.

_INT32_MAX = 2**31 - 1


cdef _invalid(str call, str argument, str rule, got):
    return InvalidArgumentError(f"BlockManager{call}: `{argument}` must {rule}; got {got}")


cdef int64_t _integer(value, str call, str argument, low, high) except? -1:
    try:
        number = operator.index(value)
    except TypeError:
        raise _invalid(call, argument, "be an integer", repr(value)) from None
    if not low <= number <= high:
        raise _invalid(call, argument, f"lie in {low} ... {high}", number)
    return number


cdef object _integer_array(values, str call, str argument):
    """A one-dimensional NumPy array of integers, int32 or int64, C-contiguous."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise _invalid(call, argument, "be a sequence or array of integers", repr(error)) from None
    if array.ndim != 1:
        raise _invalid(call, argument, "have one dimension", f"shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise _invalid(call, argument, "hold integers", array.dtype)
    if array.dtype == np.uint64 and array.max() > np.uint64(2**63 - 1):
        raise _invalid(call, argument, "fit into int64", array.max())
    return np.ascontiguousarray(array, dtype=np.int32 if array.dtype == np.int32 else np.int64)


cdef int _read_int64(values, str call, str argument, vector[int64_t] &out) except -1:
    cdef const int64_t[::1] wide
    cdef const int32_t[::1] narrow
    cdef int64_t number = 0
    cdef int overflow = 0
    if type(values) is list or type(values) is tuple:
        out.reserve(len(values))
        for item in values:
            if PyLong_CheckExact(item):
                number = PyLong_AsLongLongAndOverflow(item, &overflow)
            if not PyLong_CheckExact(item) or overflow != 0:
                number = _integer(item, call, argument, -2**63, 2**63 - 1)
            out.push_back(number)
        return 0
    array = _integer_array(values, call, argument)
    if array.size == 0:
        return 0
    if array.dtype == np.int64:
        wide = array
        out.assign(&wide[0], &wide[0] + wide.shape[0])
    else:
        narrow = array
        out.assign(&narrow[0], &narrow[0] + narrow.shape[0])
    return 0


cdef int _read_tokens(values, str call, vector[int32_t] &out) except -1:
    cdef const int32_t[::1] narrow
    cdef vector[int64_t] wide
    cdef int64_t bad = 0
    cdef cbool found = False
    cdef size_t i
    if type(values) is not list and type(values) is not tuple:
        values = _integer_array(values, call, "token_ids")
        if values.dtype == np.int32:
            narrow = values
            if narrow.shape[0] > 0:
                out.assign(&narrow[0], &narrow[0] + narrow.shape[0])
            with nogil:
                for i in range(out.size()):
                    if out[i] < 0:
                        bad = out[i]
                        found = True
                        break
            if found:
                raise _invalid(call, "token_ids", f"lie in 0 ... {_INT32_MAX}", bad)
            return 0
    _read_int64(values, call, "token_ids", wide)
    with nogil:
        out.resize(wide.size())
        for i in range(wide.size()):
            if wide[i] < 0 or wide[i] > 2147483647:
                bad = wide[i]
                found = True
                break
            out[i] = <int32_t>wide[i]
    if found:
        raise _invalid(call, "token_ids", f"lie in 0 ... {_INT32_MAX}", bad)
    return 0


cdef cbool _is_single(value) noexcept:
    return PyLong_CheckExact(value) or (hasattr(value, "__index__") and not getattr(value, "ndim", 0))


cdef int _read_ids(seqs, str call, vector[int64_t] &out) except -1:
    """Sequence ids: one or several."""
    if _is_single(seqs):
        out.push_back(_integer(seqs, call, "seqs", -2**63, 2**63 - 1))
        return 0
    return _read_int64(seqs, call, "seqs", out)


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


cdef double _fraction(value, str argument) except? -1:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _invalid("", argument, "be a number", repr(value)) from None
    if not 0 <= number < 1:
        raise _invalid("", argument, "lie in [0, 1)", value)
    return number


cdef uint64_t _seed(value) except? 0:
    try:
        number = operator.index(value)
    except TypeError:
        raise _invalid("", "seed", "be an integer or None", repr(value)) from None
    if not 0 <= number < 2**64:
        raise _invalid("", "seed", "lie in 0 ... 2**64 - 1", number)
    return number
