// NumPy, CuPy, torch and other libraries where they differ: whose an array is, where it lies, which stream is current.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

namespace pagedattn::bindings {

bool is_numpy(pybind11::handle object);
bool is_cupy(pybind11::handle object);
// Whether CuPy's arrays are read by their fields (cupy.h); for tests.
bool cupy_layout_is_known();
// Name of the package that an object's type comes from: "torch", "jaxlib", ...
std::string library_of(pybind11::handle object);

// The CUDA device that an array lies on; none for host arrays and for what is no array.
std::optional<int> cuda_device(pybind11::handle object);

// The cudaStream_t to enqueue on: the one given, which may be an int or have a `ptr` (CuPy) or a `cuda_stream` (torch),
// else the current one of the array's library.  Host arrays take none.
std::intptr_t stream_of(const char *operation, pybind11::handle stream, pybind11::handle array);

// What a CUDA handle given as an argument stands for: an int, or what has it as `ptr` (CuPy) or `cuda_<argument>`
// (torch).
void *given_handle(const char *operation, const char *argument, pybind11::handle value);

// A Python int in 64 bits.
inline int64_t integer(pybind11::handle number) {
  const long long value = PyLong_AsLongLong(number.ptr());
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

// A Python int as an address or a handle.
inline void *pointer(pybind11::handle number) {
  void *const value = PyLong_AsVoidPtr(number.ptr());
  if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

}  // namespace pagedattn::bindings
