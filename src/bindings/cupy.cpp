// SPDX-License-Identifier: Apache-2.0
#include "bindings/cupy.h"

namespace py = pybind11;

namespace pagedattn::bindings {

Property::Property(py::handle type, const char *name)
    : descriptor_(py::object(py::getattr(type, name, py::handle())).release()),
      type_(reinterpret_cast<PyTypeObject *>(type.ptr())) {
  if (descriptor_ && Py_TYPE(descriptor_.ptr()) == &PyGetSetDescr_Type) {
    definition_ = reinterpret_cast<PyGetSetDescrObject *>(descriptor_.ptr())->d_getset;
  }
}

py::object Property::operator()(py::handle object) const {
  PyObject *const descriptor = descriptor_.ptr();
  PyTypeObject *const type = Py_TYPE(object.ptr());
  PyObject *const value =
      type == type_ && definition_ != nullptr
          ? definition_->get(object.ptr(), definition_->closure)
          : Py_TYPE(descriptor)->tp_descr_get(descriptor, object.ptr(), reinterpret_cast<PyObject *>(type));
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

const Cupy *Cupy::find() {
  static Cupy cupy;
  if (cupy.ndarray != nullptr) return &cupy;
  static PyObject *const name = PyUnicode_InternFromString("cupy");
  const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name));
  if (!module || !py::hasattr(module, "ndarray") || !py::hasattr(module, "cuda")) return nullptr;
  const py::object cuda = module.attr("cuda"), array = module.attr("ndarray"), memory = cuda.attr("MemoryPointer");
  cupy.dtype = Property(array, "dtype");
  cupy.data = Property(array, "data");
  cupy.shape = Property(array, "shape");
  cupy.strides = Property(array, "strides");
  cupy.c_contiguous = Property(array, "_c_contiguous");
  cupy.ptr = Property(memory, "ptr");
  cupy.device_id = Property(memory, "device_id");
  cupy.get_current_stream = py::object(cuda.attr("get_current_stream")).release();
  cupy.ndarray = reinterpret_cast<PyTypeObject *>(py::object(array).release().ptr());
  return &cupy;
}

}  // namespace pagedattn::bindings
