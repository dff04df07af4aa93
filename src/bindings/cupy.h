// CuPy, as far as its arrays are read and its current stream is asked for.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace pagedattn::bindings {

// CuPy's arrays as Cython lays them out, the same from CuPy 11 to 14.  Reading a property instead makes an object or
// two, which for the arrays of an operation costs as much as all its checks.
struct CupyMemoryPointer {
  PyObject_HEAD const void *methods;
  std::intptr_t address;
  int device_id;
  PyObject *memory;
};

struct CupyArray {
  PyObject_HEAD const void *methods;
  PyObject *weak_references;
  Py_ssize_t size;
  std::vector<Py_ssize_t> shape, strides;  // in bytes
  int is_c_contiguous, is_f_contiguous, has_32_bit_indices;
  PyObject *dtype;
  CupyMemoryPointer *data;
  PyObject *base;
};

struct Cupy {
  // Null as long as nobody has imported CuPy, or its import has not come to an end.
  static const Cupy *find() { return found != nullptr ? found : search(); }
  // Null where the object is no array of CuPy's.
  static const Cupy *of(pybind11::handle object) {
    const Cupy *const cupy = find();
    return cupy != nullptr && PyObject_TypeCheck(object.ptr(), cupy->ndarray) ? cupy : nullptr;
  }

  // An array's fields, or null where this CuPy's arrays do not lie as above; then its properties tell.
  const CupyArray *fields(pybind11::handle array) const {
    const auto *const fields = reinterpret_cast<const CupyArray *>(array.ptr());
    return has_known_layout && Py_TYPE(fields->data) == memory_pointer ? fields : nullptr;
  }

  PyTypeObject *ndarray = nullptr, *memory_pointer = nullptr;
  bool has_known_layout = false;
  pybind11::handle get_current_stream;                // of a device
  std::intptr_t (*current_stream_of)(int) = nullptr;  // the same, as a handle; null where this CuPy has none

 private:
  static const Cupy *search();
  static inline const Cupy *found = nullptr;
};

}  // namespace pagedattn::bindings
