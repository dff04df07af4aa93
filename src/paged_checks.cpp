// SPDX-License-Identifier: Apache-2.0
#include "paged_checks.h"

namespace pagedattn {

namespace {

// Each is what a number given instead must be.  Those in the GPU's memory are not read back.
void check_scale_values(const Checker &check, const char *argument, const pa_tensor &scales) {
  if (check.on_cuda()) return;
  const int64_t rows = scales.ndim == 2 ? scales.shape[0] : 1;
  const int64_t columns = scales.ndim == 0 ? 1 : scales.shape[scales.ndim - 1];
  for (int64_t row = 0; row < rows; ++row) {
    const float *values = static_cast<const float *>(scales.data) + (scales.ndim == 2 ? row * scales.strides[0] : 0);
    for (int64_t column = 0; column < columns; ++column) {
      if (is_positive_finite(values[column])) continue;
      const std::string place = scales.ndim == 0   ? ""
                                : scales.ndim == 1 ? "[" + std::to_string(column) + "]"
                                                   : "[" + std::to_string(row) + ", " + std::to_string(column) + "]";
      check.fail("`" + std::string(argument) + "`" + place + " must be a positive finite number; got " +
                 number_text(values[column]));
    }
  }
}

}  // namespace

DType cache_dtype(const Checker &check, const char *argument, const pa_tensor &cache, int32_t kv_dtype) {
  if (kv_dtype == PA_DTYPE_NONE) {
    if (cache.dtype >= PA_FLOAT32 && cache.dtype <= PA_FLOAT8_E5M2) return static_cast<DType>(cache.dtype);
    if (cache.dtype == PA_UINT8 || cache.dtype == PA_UINT16) {
      check.fail("`" + std::string(argument) + "` is " + dtype_name(cache.dtype) +
                 " storage; name what it holds with `kv_dtype`");
    }
    check.fail(argument, "float32, float16, bfloat16, float8_e4m3 or float8_e5m2", tensor_text(cache));
  }
  if (kv_dtype < PA_FLOAT32 || kv_dtype > PA_FLOAT8_E5M2) {
    check.fail("kv_dtype", "float32, float16, bfloat16, float8_e4m3 or float8_e5m2", dtype_name(kv_dtype));
  }
  const auto wanted = static_cast<DType>(kv_dtype);
  const bool storage =
      (cache.dtype == PA_UINT8 && dtype_size(wanted) == 1) || (cache.dtype == PA_UINT16 && dtype_size(wanted) == 2);
  if (cache.dtype != kv_dtype && !storage) {
    check.fail(argument, std::string("an array that can hold `kv_dtype` ") + dtype_name(kv_dtype), tensor_text(cache));
  }
  return wanted;
}

DType wide_dtype(const Checker &check, const char *argument, const pa_tensor &tensor, int32_t kv_dtype) {
  if (tensor.dtype >= PA_FLOAT32 && tensor.dtype <= PA_BFLOAT16) return static_cast<DType>(tensor.dtype);
  if (tensor.dtype == PA_UINT16) {
    if (kv_dtype == PA_FLOAT16 || kv_dtype == PA_BFLOAT16) return static_cast<DType>(kv_dtype);
    check.fail("`" + std::string(argument) +
               "` is uint16 storage, and nothing says what it holds; give a typed array, " +
               "or name float16 or bfloat16 where the operation takes `kv_dtype`");
  }
  check.fail(argument, "float32, float16 or bfloat16", tensor_text(tensor));
}

Scale head_scale(const Checker &check, const char *argument, const pa_tensor *tensor, double value,
                 int32_t num_kv_heads, const pa_tensor *layers) {
  Scale scale;
  if (tensor == nullptr) {
    scale.value = static_cast<float>(check.positive_finite(argument, value));
    return scale;
  }
  check.tensor(argument, tensor);
  const int64_t count = tensor->ndim == 0 ? 1 : tensor->ndim == 1 ? tensor->shape[0] : -1;
  if (tensor->dtype != PA_FLOAT32 || (count != 1 && count != num_kv_heads)) {
    check.fail(argument,
               "a number or float32 with shape (1,) or (num_kv_heads,) = (" + std::to_string(num_kv_heads) + ",)",
               tensor_text(*tensor));
  }
  if (tensor->ndim == 1) check.vector(argument, tensor, PA_FLOAT32, {"num_kv_heads", count});
  check_scale_values(check, argument, layers == nullptr ? *tensor : *layers);
  scale.ptr = static_cast<const float *>(tensor->data);
  scale.per_head = count == num_kv_heads && count > 1;
  return scale;
}

Scale cache_scale(const Checker &check, const char *argument, const pa_tensor *tensor, double value, DType kv_dtype,
                  int32_t num_kv_heads, const pa_tensor *layers) {
  if (!is_float8(kv_dtype) && (tensor != nullptr || value != 1.0)) {
    check.fail(argument, std::string("absent: only float8 caches are scaled"),
               std::string("a scale for a ") + dtype_name(static_cast<int32_t>(kv_dtype)) + " cache");
  }
  return head_scale(check, argument, tensor, value, num_kv_heads, layers);
}

CacheView cache_view(const pa_tensor &tensor) {
  return {tensor.data, tensor.strides[0], tensor.strides[1], tensor.strides[2]};
}

TokensView tokens_view(const pa_tensor &tensor) { return {tensor.data, tensor.strides[0], tensor.strides[1]}; }

}  // namespace pagedattn
