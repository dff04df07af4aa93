// Element types and the conversions between them.
//
// SPDX-License-Identifier: Apache-2.0
//
// Arithmetic is in float32.  Reading a narrower type is exact; writing one rounds to nearest, ties to even.  float8
// writes saturate to the largest finite value, infinities included, and keep NaN.  (The toolkit's conversions do
// exactly this: one instruction from sm_89 on, integer code before.)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "params.h"
#include "status.h"

namespace pagedattn::cuda {

using float16 = __half;
using bfloat16 = __nv_bfloat16;
using float8_e4m3 = __nv_fp8_e4m3;
using float8_e5m2 = __nv_fp8_e5m2;

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(float16 x) { return __half2float(x); }
__host__ __device__ inline float to_float(bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ inline float to_float(float8_e4m3 x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E4M3)));
}
__host__ __device__ inline float to_float(float8_e5m2 x) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.__x, __NV_E5M2)));
}

template <class T>
__host__ __device__ T from_float(float x);
template <>
__host__ __device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__host__ __device__ inline float16 from_float<float16>(float x) {
  return __float2half_rn(x);
}
template <>
__host__ __device__ inline bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__host__ __device__ inline float8_e4m3 from_float<float8_e4m3>(float x) {
  float8_e4m3 y;
  y.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  return y;
}
template <>
__host__ __device__ inline float8_e5m2 from_float<float8_e5m2>(float x) {
  float8_e5m2 y;
  y.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
  return y;
}

// N neighbouring elements, moved by one access where they fill at most 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T element[N];
};

// float8 is converted in pairs where there are any, by one instruction for both.
template <class T, int N>
__device__ Pack<T, N> from_floats(const float (&x)[N]) {
  Pack<T, N> y;
  constexpr bool kFloat8 = std::is_same_v<T, float8_e4m3> || std::is_same_v<T, float8_e5m2>;
  if constexpr (kFloat8 && N % 2 == 0) {
    constexpr __nv_fp8_interpretation_t kKind = std::is_same_v<T, float8_e4m3> ? __NV_E4M3 : __NV_E5M2;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(make_float2(x[i], x[i + 1]), __NV_SATFINITE, kKind);
      y.element[i].__x = static_cast<__nv_fp8_storage_t>(pair);
      y.element[i + 1].__x = static_cast<__nv_fp8_storage_t>(pair >> 8);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) y.element[i] = from_float<T>(x[i]);
  }
  return y;
}

// The scale of one KV head.
__device__ inline float scale_of(const Scale &scale, int head) {
  return scale.ptr == nullptr ? scale.value : scale.ptr[scale.per_head ? head : 0];
}

// Call `f` with a value of the element type that `dtype` names.
template <class F>
void with_wide_type(DType dtype, F &&f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(float16{});
    case DType::kBFloat16:
      return f(bfloat16{});
    default:
      throw Error(PA_ERROR_INTERNAL, "a float8 type where a wider one must be");
  }
}

template <class F>
void with_float8_type(DType dtype, F &&f) {
  switch (dtype) {
    case DType::kFloat8E4M3:
      return f(float8_e4m3{});
    case DType::kFloat8E5M2:
      return f(float8_e5m2{});
    default:
      throw Error(PA_ERROR_INTERNAL, "a wider type where a float8 type must be");
  }
}

}  // namespace pagedattn::cuda
