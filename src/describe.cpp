// SPDX-License-Identifier: Apache-2.0
#include "describe.h"

#include <cstdio>

namespace pagedattn {

std::string Name::text() const {
  return index < 0 ? argument : std::string(argument) + "[" + std::to_string(index) + "]";
}

const char *dtype_name(int32_t dtype) {
  switch (dtype) {
    case PA_FLOAT32:
      return "float32";
    case PA_FLOAT16:
      return "float16";
    case PA_BFLOAT16:
      return "bfloat16";
    case PA_FLOAT8_E4M3:
      return "float8_e4m3";
    case PA_FLOAT8_E5M2:
      return "float8_e5m2";
    case PA_INT32:
      return "int32";
    case PA_INT64:
      return "int64";
    case PA_UINT8:
      return "uint8";
    case PA_UINT16:
      return "uint16";
    case PA_FLOAT64:
      return "float64";
    default:
      return "an unknown type";
  }
}

std::string shape_text(int32_t ndim, const int64_t *shape) {
  std::string text = "(";
  for (int32_t i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

std::string device_text(int32_t device_type, int32_t device_id) {
  return device_type == PA_CUDA ? "cuda:" + std::to_string(device_id) : "cpu";
}

std::string tensor_text(const pa_tensor &tensor) {
  return dtype_name(tensor.dtype) + (" " + shape_text(tensor.ndim, tensor.shape));
}

std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

}  // namespace pagedattn
