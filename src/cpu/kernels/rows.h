// Rows of elements: conversion with a scale, and the weighted sum that joins partial attention results.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/convert.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

// dst[i] = f(src[i]).
template <class Dst, class Src, class F>
PA_INLINE void map_row(void *dst, const void *src, int64_t n, F f) {
  auto *d = static_cast<typename Dst::Storage *>(dst);
  const auto *s = static_cast<const typename Src::Storage *>(src);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Dst::store(d + i, f(Src::load(s + i)));
  if (i < n) store_partial<Dst>(d + i, f(load_partial<Src>(s + i, n - i)), n - i);
}

static void quantize_row(DType dst_dtype, void *dst, DType src_dtype, const void *src, float scale, int64_t n) {
  // A division, not a product with the reciprocal: the result is then what `x / scale` gives anywhere else.
  with_dtype(dst_dtype, [&](auto to) {
    with_dtype(src_dtype, [&](auto from) {
      map_row<decltype(to), decltype(from)>(dst, src, n, [scale](Vec v) { return v / scale; });
    });
  });
}

static void dequantize_row(DType dst_dtype, void *dst, DType src_dtype, const void *src, float scale, int64_t n) {
  with_dtype(dst_dtype, [&](auto to) {
    with_dtype(src_dtype, [&](auto from) {
      map_row<decltype(to), decltype(from)>(dst, src, n, [scale](Vec v) { return v * scale; });
    });
  });
}

static void merge_row(DType dtype, void *out, const void *const *parts, const float *weights, int64_t num_parts,
                      int64_t n) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    using Storage = typename T::Storage;
    auto *dst = static_cast<Storage *>(out);
    const auto sum_at = [&](int64_t i, auto load_at) {
      Vec sum = zero();
      for (int64_t p = 0; p < num_parts; ++p) {
        // A part without keys may hold anything, NaN included.
        if (weights[p] == 0.0f) continue;
        sum = fma(load_at(static_cast<const Storage *>(parts[p]) + i), broadcast(weights[p]), sum);
      }
      return sum;
    };
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      T::store(dst + i, sum_at(i, [](const Storage *p) { return T::load(p); }));
    }
    if (i < n) {
      const int64_t rest = n - i;
      store_partial<T>(dst + i, sum_at(i, [rest](const Storage *p) { return load_partial<T>(p, rest); }), rest);
    }
  });
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
