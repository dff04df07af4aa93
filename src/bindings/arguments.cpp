// SPDX-License-Identifier: Apache-2.0
#include "bindings/arguments.h"

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "bindings/errors.h"
#include "bindings/libraries.h"

namespace py = pybind11;

namespace pagedattn::bindings {

namespace {

[[noreturn]] void refuse(const char *operation, const char *argument, const std::string &expected, py::handle value) {
  raise_invalid(std::string(operation) + ": `" + argument + "` must be " + expected + "; got " +
                py::repr(value).cast<std::string>());
}

// NaN for what is no number, or too large for one.
double as_double(py::handle value) {
  const bool plain = PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr());
  if (!plain && cuda_device(value)) return std::numeric_limits<double>::quiet_NaN();
  const double result = PyFloat_AsDouble(value.ptr());
  if (result != -1.0 || !PyErr_Occurred()) return result;
  py::error_already_set error;
  if (error.matches(PyExc_TypeError) || error.matches(PyExc_ValueError) || error.matches(PyExc_OverflowError)) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  throw error;
}

// Nothing for what is no integer, or one that would have to be read back; cut to what 64 bits hold.
std::optional<int64_t> as_integer(py::handle value) {
  // To ask an int where it lies takes a microsecond.
  if (!PyLong_Check(value.ptr()) && cuda_device(value)) return std::nullopt;
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    py::error_already_set error;
    if (error.matches(PyExc_TypeError)) return std::nullopt;
    throw error;
  }
  int overflow = 0;
  const long long result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  using Limits = std::numeric_limits<int64_t>;
  return overflow == 0 ? result : overflow > 0 ? Limits::max() : Limits::min();
}

}  // namespace

double number(const char *operation, const char *argument, py::handle value, const char *expected) {
  const double result = as_double(value);
  if (!std::isfinite(result)) refuse(operation, argument, expected, value);
  return result;
}

int64_t whole_number(const char *operation, const char *argument, py::handle value, int64_t least, int64_t most) {
  const std::optional<int64_t> result = as_integer(value);
  if (!result || *result < least || *result > most) {
    const bool bounded = most < std::numeric_limits<int64_t>::max();
    refuse(operation, argument,
           "a whole number on the host " + (bounded ? "from " + std::to_string(least) + " to " + std::to_string(most)
                                                    : "of at least " + std::to_string(least)),
           value);
  }
  return *result;
}

bool flag(const char *operation, const char *argument, py::handle value) {
  if (value.ptr() == Py_True) return true;
  if (value.ptr() == Py_False) return false;
  if (!py::isinstance(value, py::module_::import("numpy").attr("bool_"))) {
    refuse(operation, argument, "True or False", value);
  }
  return PyObject_IsTrue(value.ptr()) == 1;
}

int32_t check_mode(const char *operation, py::handle check) {
  return check.is_none() ? -1 : int32_t{flag(operation, "check", check)};
}

}  // namespace pagedattn::bindings
