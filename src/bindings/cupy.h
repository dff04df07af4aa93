// CuPy, as far as its arrays are read and its current stream is asked for.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace pagedattn::bindings {

// A property of an extension type, looked up once: reading it of an object searches for no name, and for an object of
// exactly this type asks nobody whether it is one.
class Property {
 public:
  Property() = default;
  // Empty where the type has none of this name.
  Property(pybind11::handle type, const char *name);
  explicit operator bool() const { return static_cast<bool>(descriptor_); }
  pybind11::object operator()(pybind11::handle object) const;

 private:
  pybind11::handle descriptor_;  // kept for the process's life
  PyTypeObject *type_ = nullptr;
  const PyGetSetDef *definition_ = nullptr;  // null where the property is not an extension type's own
};

struct Cupy {
  // Null as long as nobody has imported CuPy, or its import has not come to an end.
  static const Cupy *find();

  bool is_array(pybind11::handle object) const { return PyObject_TypeCheck(object.ptr(), ndarray); }

  PyTypeObject *ndarray = nullptr;
  Property dtype, data, shape, strides;  // of an array
  Property c_contiguous;                 // of an array; private to CuPy, and may be empty
  Property ptr, device_id;               // of an array's data
  pybind11::handle get_current_stream;   // of a device
};

}  // namespace pagedattn::bindings
