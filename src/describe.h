// How errors name things: types, shapes, devices, whole tensors.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "pagedattn/pagedattn.h"

namespace pagedattn {

// An argument as messages name it, `q` or `caches[3]`, in words only where there is a message.
struct Name {
  Name(const char *argument, int64_t index = -1) : argument(argument), index(index) {}
  std::string text() const;

  const char *argument;
  int64_t index;
};

const char *dtype_name(int32_t dtype);                            // "float8_e4m3"
std::string shape_text(int32_t ndim, const int64_t *shape);       // "(8, 64)"
std::string device_text(int32_t device_type, int32_t device_id);  // "cpu", "cuda:0"
std::string tensor_text(const pa_tensor &tensor);                 // "int64 (8, 32)"
std::string number_text(double value);                            // "0.5", "nan"

}  // namespace pagedattn
