// SPDX-License-Identifier: Apache-2.0
#include "bindings/cupy.h"

#include <pybind11/stl.h>

#include <cstddef>

namespace py = pybind11;

namespace pagedattn::bindings {

namespace {

PyTypeObject *as_type(py::handle type) { return reinterpret_cast<PyTypeObject *>(type.ptr()); }

// Whether an array's fields are what its properties say.
bool fields_tell(py::handle array) {
  const auto &fields = *reinterpret_cast<const CupyArray *>(array.ptr());
  const py::object data = array.attr("data");
  return fields.dtype == array.attr("dtype").ptr() && reinterpret_cast<PyObject *>(fields.data) == data.ptr() &&
         fields.data->address == data.attr("ptr").cast<std::intptr_t>() &&
         fields.data->device_id == data.attr("device_id").cast<int>() &&
         fields.shape == array.attr("shape").cast<std::vector<Py_ssize_t>>() &&
         fields.strides == array.attr("strides").cast<std::vector<Py_ssize_t>>() &&
         (fields.is_c_contiguous != 0) == array.attr("flags").attr("c_contiguous").cast<bool>();
}

// Tries it on two arrays, dense in C's order and in Fortran's, all of whose numbers differ.  Making them asks no
// device.
bool has_known_layout(py::handle cuda, py::handle ndarray) {
  constexpr std::intptr_t kAddress = 0x7000;
  constexpr int kOffset = 0x300, kDevice = 5;
  const py::handle memory_pointer = cuda.attr("MemoryPointer");
  if (as_type(memory_pointer)->tp_basicsize != sizeof(CupyMemoryPointer)) return false;
  // What Python adds for its subclass, a dictionary, lies behind.
  if (as_type(ndarray)->tp_base->tp_basicsize != sizeof(CupyArray)) return false;
  try {
    const py::object memory = cuda.attr("UnownedMemory")(kAddress, 0x1000, py::none(), kDevice);
    for (const char *order : {"C", "F"}) {
      const py::object pointer = memory_pointer(memory, kOffset);
      if (!fields_tell(ndarray(py::make_tuple(2, 3, 4), "float16", pointer, py::none(), order))) return false;
    }
    return true;
  } catch (const py::error_already_set &) {
    return false;
  }
}

// A function that one of CuPy's modules has for others written in Cython.
void *find_c_function(const char *module, const char *name, const char *signature) {
  try {
    const py::object capsule = py::module_::import(module).attr("__pyx_capi__")[name];
    if (PyCapsule_IsValid(capsule.ptr(), signature)) return PyCapsule_GetPointer(capsule.ptr(), signature);
  } catch (const py::error_already_set &) {
    // Another version of CuPy.
  }
  return nullptr;
}

}  // namespace

const Cupy *Cupy::search() {
  static Cupy cupy;
  static PyObject *const name = PyUnicode_InternFromString("cupy");
  const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name));
  if (!module || !py::hasattr(module, "ndarray") || !py::hasattr(module, "cuda")) return nullptr;
  const py::object cuda = module.attr("cuda"), array = module.attr("ndarray");
  cupy.memory_pointer = as_type(py::object(cuda.attr("MemoryPointer")).release());
  cupy.has_known_layout = bindings::has_known_layout(cuda, array);
  cupy.get_current_stream = py::object(cuda.attr("get_current_stream")).release();
  cupy.current_stream_of = reinterpret_cast<std::intptr_t (*)(int)>(
      find_c_function("cupy_backends.cuda.stream", "get_stream_ptr", "intptr_t (int)"));
  cupy.ndarray = as_type(py::object(array).release());
  return found = &cupy;
}

}  // namespace pagedattn::bindings
