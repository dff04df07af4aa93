// SPDX-License-Identifier: Apache-2.0
#include "bindings/errors.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace pagedattn::bindings {

namespace {

[[noreturn]] void raise(const char *exception, const std::string &message) {
  const py::object type = py::module_::import("pagedattn._errors").attr(exception);
  PyErr_SetString(type.ptr(), message.c_str());
  throw py::error_already_set();
}

}  // namespace

void raise_invalid(const std::string &message) { raise("InvalidArgumentError", message); }

void raise_on_error(pa_status status, const pa_error &error) {
  switch (status) {
    case PA_OK:
      return;
    case PA_ERROR_INVALID_ARGUMENT:
      raise("InvalidArgumentError", error.message);
    case PA_ERROR_UNSUPPORTED:
      raise("UnsupportedError", error.message);
    case PA_ERROR_OUT_OF_MEMORY:
      raise("OutOfMemoryError", error.message);
    case PA_ERROR_NO_DEVICE:
    case PA_ERROR_CUDA:
      raise("DeviceError", error.message);
    default:
      raise("PagedAttnError", std::string("internal error: ") + error.message);
  }
}

}  // namespace pagedattn::bindings
