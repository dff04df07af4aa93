// SPDX-License-Identifier: Apache-2.0
#include "bindings/libraries.h"

#include <pybind11/numpy.h>

#include "bindings/cupy.h"
#include "bindings/errors.h"
#include "bindings/torch.h"
#include "pagedattn/pagedattn.h"

namespace py = pybind11;

namespace pagedattn::bindings {

namespace {

std::intptr_t cupy_stream(const Cupy &cupy, int device) {
  if (cupy.current_stream_of != nullptr) {
    const std::intptr_t stream = cupy.current_stream_of(device);
    if (stream == -1 && PyErr_Occurred()) throw py::error_already_set();
    return stream;
  }
  static PyObject *const ptr = PyUnicode_InternFromString("ptr");
  const py::int_ id(device);
  PyObject *const arguments[] = {id.ptr()};
  const auto stream =
      py::reinterpret_steal<py::object>(PyObject_Vectorcall(cupy.get_current_stream.ptr(), arguments, 1, nullptr));
  if (!stream) throw py::error_already_set();
  const auto handle = py::reinterpret_steal<py::object>(PyObject_GetAttr(stream.ptr(), ptr));
  if (!handle) throw py::error_already_set();
  return reinterpret_cast<std::intptr_t>(pointer(handle));
}

std::intptr_t current_stream(py::handle array, int device) {
  if (Cupy::of(array) == nullptr && library_of(array) == "torch") return torch_stream(device);
  const Cupy *const cupy = Cupy::find();
  return cupy != nullptr ? cupy_stream(*cupy, device) : 0;
}

}  // namespace

void *given_handle(const char *operation, const char *argument, py::handle value) {
  auto handle = py::reinterpret_borrow<py::object>(value);
  if (!PyLong_Check(value.ptr())) {  // which is the handle itself
    const std::string of_torch = std::string("cuda_") + argument;
    if (py::hasattr(value, "ptr")) {
      handle = value.attr("ptr");
    } else if (py::hasattr(value, of_torch.c_str())) {
      handle = value.attr(of_torch.c_str());
    }
  }
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(handle.ptr()));
  void *const result = number ? PyLong_AsVoidPtr(number.ptr()) : nullptr;
  if (PyErr_Occurred()) {
    PyErr_Clear();
    const std::string type = std::string("cuda") + static_cast<char>(argument[0] - 'a' + 'A') + (argument + 1) + "_t";
    raise_invalid(std::string(operation) + ": `" + argument + "` must be a CuPy or torch " + argument + " or a " +
                  type + " as int; got " + py::repr(value).cast<std::string>());
  }
  return result;
}

bool is_numpy(py::handle object) { return py::isinstance<py::array>(object); }

bool is_cupy(py::handle object) { return Cupy::of(object) != nullptr; }

bool cupy_layout_is_known() { return Cupy::find() != nullptr && Cupy::find()->has_known_layout; }

std::string library_of(py::handle object) {
  const auto module = py::str(py::type::of(object).attr("__module__")).cast<std::string>();
  return module.substr(0, module.find('.'));
}

std::optional<int> cuda_device(py::handle object) {
  if (is_numpy(object)) return std::nullopt;
  if (const Cupy *const cupy = Cupy::of(object)) {
    const CupyArray *const array = cupy->fields(object);
    return array != nullptr ? array->data->device_id : object.attr("data").attr("device_id").cast<int>();
  }
  if (const std::optional<dlpack::Tensor> tensor = view_of_torch_tensor(object)) {
    return tensor->device.type == PA_CUDA ? std::optional<int>(tensor->device.id) : std::nullopt;
  }
  const py::object query = py::getattr(object, "__dlpack_device__", py::none());
  if (query.is_none()) return std::nullopt;
  const py::tuple device = query();
  if (py::int_(device[0]).cast<int>() != PA_CUDA) return std::nullopt;
  return py::int_(device[1]).cast<int>();
}

std::intptr_t stream_of(const char *operation, py::handle stream, py::handle array) {
  const std::optional<int> device = cuda_device(array);
  if (stream.is_none()) return device ? current_stream(array, *device) : 0;
  if (device) return reinterpret_cast<std::intptr_t>(given_handle(operation, "stream", stream));
  raise_invalid(std::string(operation) + ": `stream` must be absent for host arrays; got " +
                py::repr(stream).cast<std::string>());
}

}  // namespace pagedattn::bindings
