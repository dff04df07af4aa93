// C++ functions of Python objects as functions of a module, called by position.
//
// SPDX-License-Identifier: Apache-2.0
//
// pybind11's own functions convert each argument and choose between overloads at run time, which for the twenty
// arguments of an operation costs as much as everything else before its launch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <exception>
#include <new>
#include <type_traits>
#include <utility>

namespace pagedattn::bindings {

template <auto function>
struct Positional;

// The arguments' references are the caller's, who holds them until the call is over.
template <class Result, class... Handles, Result (*function)(Handles...)>
struct Positional<function> {
  static PyObject *call(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
    if (count != static_cast<Py_ssize_t>(sizeof...(Handles))) {
      return PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(Handles), count);
    }
    try {
      return spread(arguments, std::index_sequence_for<Handles...>());
    } catch (pybind11::error_already_set &error) {
      error.restore();
    } catch (const std::bad_alloc &) {
      PyErr_NoMemory();
    } catch (const std::exception &error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

 private:
  template <std::size_t... i>
  static PyObject *spread(PyObject *const *arguments, std::index_sequence<i...>) {
    if constexpr (std::is_void_v<Result>) {
      function(pybind11::handle(arguments[i])...);
      return pybind11::none().release().ptr();
    } else {
      return pybind11::cast(function(pybind11::handle(arguments[i])...)).release().ptr();
    }
  }
};

// An entry of a method table.  `signature` is what the stub says: "name(q: typing.Any) -> None".
template <auto function>
PyMethodDef positional(const char *name, const char *signature) {
  // The way CPython itself stores a function that takes an array of arguments.
  const auto pointer = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Positional<function>::call));
  return {name, pointer, METH_FASTCALL, signature};
}

}  // namespace pagedattn::bindings
