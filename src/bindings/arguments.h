// Plain numbers and flags among the arguments, checked as such.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>

namespace pagedattn::bindings {

// A finite host number; a CUDA scalar would have to be read back, and is refused.
double number(const char *operation, const char *argument, pybind11::handle value,
              const char *expected = "a finite number on the host");

// A host integer of at least `least`, cut to what 64 bits hold unless it may be `most` at most.
int64_t whole_number(const char *operation, const char *argument, pybind11::handle value, int64_t least,
                     int64_t most = std::numeric_limits<int64_t>::max());

// A truth value that was meant as one.
bool flag(const char *operation, const char *argument, pybind11::handle value);

// The C ABI's `check`: -1 for None, where the environment decides.
int32_t check_mode(const char *operation, pybind11::handle check);

}  // namespace pagedattn::bindings
