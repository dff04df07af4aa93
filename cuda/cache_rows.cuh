// Tokens and caches in bytes, as the kernels that move rows between them address them.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "access.cuh"
#include "convert.cuh"
#include "params.h"

namespace pagedattn::cuda {

// Where heads lie from the base on, which is a parameter of its own: layers share strides.
struct TokenRows {
  int64_t token_stride;  // bytes
  int64_t head_stride;   // bytes

  __device__ char *head(void *base, int64_t token, int head) const {
    return static_cast<char *>(base) + token * token_stride + head * head_stride;
  }
};

struct CacheRows {
  int64_t block_stride;  // bytes
  int64_t token_stride;  // bytes
  int64_t head_stride;   // bytes

  __device__ char *head(void *base, int64_t block, int64_t offset, int head) const {
    return static_cast<char *>(base) + block * block_stride + offset * token_stride + head * head_stride;
  }
};

inline TokenRows token_rows(const TokensView &view, DType dtype) {
  const int64_t size = dtype_size(dtype);
  return {view.token_stride * size, view.head_stride * size};
}

inline CacheRows cache_rows(const CacheView &view, DType dtype) {
  const int64_t size = dtype_size(dtype);
  return {view.block_stride * size, view.token_stride * size, view.head_stride * size};
}

// What an access into such rows must divide, beside their addresses.
inline void include_strides(AccessWidth *width, const TokenRows &rows, int64_t num_tokens, int64_t num_heads) {
  width->stride(rows.token_stride, num_tokens);
  width->stride(rows.head_stride, num_heads);
}

inline void include_strides(AccessWidth *width, const CacheRows &rows, int64_t num_blocks, int64_t block_size,
                            int64_t num_heads) {
  width->stride(rows.block_stride, num_blocks);
  width->stride(rows.token_stride, block_size);
  width->stride(rows.head_stride, num_heads);
}

// What happens to elements on their way.  `From` and `To` are what one thread reads and writes at a time.
template <class Access>
struct CopyUnchanged {
  using From = Access;
  using To = Access;
  static constexpr bool kScaled = false;
  __device__ static To apply(const From &from, float) { return from; }
};

// 1 / scale, rounded to one of the two nearest numbers, and exact if the scale is a power of two; for scales that are
// neither very small nor very large, which a division would have to ask first.
__device__ inline float reciprocal_of(float scale) {
  float nearly;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(nearly) : "f"(scale));
  return __fmaf_rn(nearly, __fmaf_rn(-scale, nearly, 1.0f), nearly);
}

// The float8 numbers nearest to x / scale, at half the instructions of N divisions.  Products with the reciprocal are
// off by at most three units in the last place, or exact if the scale is a power of two.  That matters only beside
// numbers half way between two of float8: their 19 low bits are zeros, and if one of the products is as near to such,
// all are divided.
template <class Target, int N>
__device__ Pack<Target, N> divide_and_round(const float (&x)[N], float scale) {
  const float reciprocal = reciprocal_of(scale);
  const bool exact = (__float_as_uint(scale) & 0x7fffff) == 0;
  float quotient[N];
  uint32_t nearest = scale >= 0x1p-60f && scale <= 0x1p60f ? 0x7fffff : 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    quotient[i] = x[i] * reciprocal;
    if (!exact) nearest = min(nearest, (__float_as_uint(quotient[i]) + 3) & 0x7ffff);
  }
  if (nearest <= 6) {
#pragma unroll
    for (int i = 0; i < N; ++i) quotient[i] = x[i];
    // One division that all take in turns: code that is hardly ever run would still have to be fetched.
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
      const float next = quotient[0] / scale;
#pragma unroll
      for (int k = 0; k + 1 < N; ++k) quotient[k] = quotient[k + 1];
      quotient[N - 1] = next;
    }
  }
  return from_floats<Target>(quotient);
}

template <class Source, class Target, int N>
struct Quantize {
  using From = Pack<Source, N>;
  using To = Pack<Target, N>;
  static constexpr bool kScaled = true;
  __device__ static To apply(const From &from, float scale) {
    float element[N];
#pragma unroll
    for (int i = 0; i < N; ++i) element[i] = to_float(from.element[i]);
    return divide_and_round<Target>(element, scale);
  }
};

template <class Source, class Target, int N>
struct Dequantize {
  using From = Pack<Source, N>;
  using To = Pack<Target, N>;
  static constexpr bool kScaled = true;
  __device__ static To apply(const From &from, float scale) {
    To to;
#pragma unroll
    for (int i = 0; i < N; ++i) to.element[i] = from_float<Target>(to_float(from.element[i]) * scale);
    return to;
  }
};

}  // namespace pagedattn::cuda
