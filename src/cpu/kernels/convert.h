// Between the stored element types and vectors of fp32.
//
// SPDX-License-Identifier: Apache-2.0
//
// Each element type is a tag with the storage type, load (kWidth elements to a Vec) and store (round to nearest even).
// Float8 stores saturate to the largest finite value; NaN stays NaN everywhere.
//
// load_pair takes 2 * kWidth elements to two Vecs in the type's pair order, which is what converts with the fewest
// instructions: even elements, then odd ones, for bfloat16 (a shift and a mask), else as they lie in memory.  Sums over
// all elements do not mind, and rows of sums go back through store_pair.
#pragma once

#include "kernels/simd.h"
#include "params.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

struct Float32 {
  using Storage = float;
  PA_INLINE Vec load(const float *p) { return load_as<Vec>(p); }
  PA_INLINE void store(float *p, Vec v) { store_as(p, v); }
};

#if defined(__AVX512F__)
PA_INLINE Vec half_to_float(VecU16 h) { return (Vec)_mm512_cvtph_ps((__m256i)h); }
PA_INLINE VecU16 float_to_half(Vec v) { return (VecU16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
PA_INLINE Vec half_to_float(VecU16 h) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
PA_INLINE VecU16 float_to_half(Vec v) { return (VecU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
PA_INLINE Vec half_to_float(VecU16 h) {
  const VecU x = widen(h);
  const VecU magnitude = (x & 0x7fffu) << 13;
  const VecU sign = (x & 0x8000u) << 16;
  const VecU exponent = magnitude & (0x1fu << 23);
  const VecU normal = magnitude + ((127u - 15u) << 23);
  const VecU special = magnitude + ((255u - 31u) << 23);  // infinities and NaN
  // A subnormal becomes the mantissa of a float in [2**-14, 2**-13), whose leading one is then taken away: no
  // subnormal fp32 arises, which processors are slow at.
  const Vec subnormal = as_float(magnitude + (113u << 23)) - as_float(VecU{} + (113u << 23));
  const VecU r = exponent == 0u ? as_bits(subnormal) : (exponent == (0x1fu << 23) ? special : normal);
  return as_float(r | sign);
}
PA_INLINE VecU16 float_to_half(Vec v) {
  const VecU bits = as_bits(v);
  const VecU sign = bits & 0x80000000u;
  const VecU magnitude = bits ^ sign;
  const VecU odd = (magnitude >> 13) & 1u;
  const VecU normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  // Adding 1/2, whose last place is the smallest half subnormal 2**-24, rounds to a multiple of it.
  const VecU subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(broadcast(0.5f));
  VecU r = magnitude < (113u << 23) ? subnormal : normal;
  r = magnitude >= (143u << 23) ? VecU{} + 0x7c00u : r;  // 65536 and more; 65520 up to there round to infinity above
  r = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : r;
  return __builtin_convertvector(r | (sign >> 16), VecU16);
}
#endif

struct Float16 {
  using Storage = uint16_t;
  PA_INLINE Vec load(const uint16_t *p) { return half_to_float(load_as<VecU16>(p)); }
  PA_INLINE void store(uint16_t *p, Vec v) { store_as(p, float_to_half(v)); }
};

PA_INLINE VecU round_to_bfloat16(Vec v) {  // in the upper halves; the lower ones are rubbish
  const VecU bits = as_bits(v);
  const VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded;
}

struct BFloat16 {
  using Storage = uint16_t;
  PA_INLINE Vec load(const uint16_t *p) { return as_float(widen(load_as<VecU16>(p)) << 16); }
  PA_INLINE void store(uint16_t *p, Vec v) { store_as(p, __builtin_convertvector(round_to_bfloat16(v) >> 16, VecU16)); }
  PA_INLINE void load_pair(const uint16_t *p, Vec &even, Vec &odd) {
    const VecU both = load_as<VecU>(p);
    even = as_float(both << 16);
    odd = as_float(both & 0xffff0000u);
  }
  PA_INLINE void store_pair(uint16_t *p, Vec even, Vec odd) {
    store_as(p, (round_to_bfloat16(even) >> 16) | (round_to_bfloat16(odd) & 0xffff0000u));
  }
};

// Rounds to a float8 of `kMantissa` bits.  `max_bits` are the fp32 bits of the largest finite value.
template <int kMantissa, int kBias>
PA_INLINE VecU8 float_to_float8(Vec v, uint32_t max_bits, uint32_t nan) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kMinNormal = (127u - kBias + 1u) << 23;
  // The float whose last place is the smallest subnormal, 2**(1 - bias - mantissa).
  constexpr uint32_t kMagic = (127u + 23u + 1u - kBias - kMantissa) << 23;
  const VecU bits = as_bits(v);
  const VecU sign = bits & 0x80000000u;
  const VecU all = bits ^ sign;
  const VecU magnitude = all > max_bits ? VecU{} + max_bits : all;
  const VecU odd = (magnitude >> kShift) & 1u;
  const VecU normal = (magnitude - ((127u - kBias) << 23) + ((1u << (kShift - 1)) - 1u) + odd) >> kShift;
  const VecU subnormal = as_bits(as_float(magnitude) + as_float(VecU{} + kMagic)) - kMagic;
  VecU r = magnitude < kMinNormal ? subnormal : normal;
  r = all > 0x7f800000u ? VecU{} + nan : r;
  return __builtin_convertvector(r | (sign >> 24), VecU8);
}

struct Float8E4M3 {
  using Storage = uint8_t;
  static constexpr int kMantissa = 3, kBias = 7;
  static constexpr bool is_infinity(unsigned) { return false; }
  static constexpr bool is_nan(unsigned code) { return code == 0x7f; }  // without sign
  PA_INLINE Vec load(const uint8_t *p) {
    const VecU16 x = load_widened(p);
    const VecU16 magnitude = x & (uint16_t)0x7f;
    // As a half of exponent bias 15 instead of 7 the value is 2**8 too small.  0x7f is NaN.
    const VecU16 nan = (VecU16)(magnitude == (uint16_t)0x7f) & (uint16_t)0x7c00;
    const VecU16 half = (magnitude << 7) | ((x << 8) & (uint16_t)0x8000) | nan;
    return half_to_float(half) * 256.0f;
  }
  PA_INLINE void store(uint8_t *p, Vec v) {
    store_as(p, float_to_float8<kMantissa, kBias>(v, 0x43e00000u, 0x7fu));
  }  // 448
};

struct Float8E5M2 {
  using Storage = uint8_t;
  static constexpr int kMantissa = 2, kBias = 15;
  static constexpr bool is_infinity(unsigned code) { return code == 0x7c; }
  static constexpr bool is_nan(unsigned code) { return code > 0x7c; }
  PA_INLINE Vec load(const uint8_t *p) { return half_to_float(load_widened(p) << 8); }
  PA_INLINE void store(uint8_t *p, Vec v) {
    store_as(p, float_to_float8<kMantissa, kBias>(v, 0x47600000u, 0x7fu));
  }  // 57344
};

// The first `n` < kWidth elements, zeros behind them; touches no others.
template <class T>
PA_INLINE Vec load_partial(const typename T::Storage *p, int64_t n) {
  typename T::Storage padded[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return T::load(padded);
}
// kWidth elements, or the last of a row whose length is no multiple of it.
template <class T>
PA_INLINE Vec load_tail(const typename T::Storage *p, int64_t left) {
  return left >= kWidth ? T::load(p) : load_partial<T>(p, left);
}
template <class T>
PA_INLINE void store_partial(typename T::Storage *p, Vec v, int64_t n) {
  typename T::Storage padded[kWidth];
  T::store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

// Types without a pair order of their own.
template <class T>
PA_INLINE void load_pair(const typename T::Storage *p, Vec &first, Vec &second) {
  if constexpr (requires { T::load_pair(p, first, second); }) {
    T::load_pair(p, first, second);
  } else {
    first = T::load(p);
    second = T::load(p + kWidth);
  }
}

template <class T>
PA_INLINE void store_pair(typename T::Storage *p, Vec first, Vec second) {
  if constexpr (requires { T::store_pair(p, first, second); }) {
    T::store_pair(p, first, second);
  } else {
    T::store(p, first);
    T::store(p + kWidth, second);
  }
}

// Calls `f` with the tag of a run-time element type.
template <class F>
PA_INLINE void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      f(Float32{});
      break;
    case DType::kFloat16:
      f(Float16{});
      break;
    case DType::kBFloat16:
      f(BFloat16{});
      break;
    case DType::kFloat8E4M3:
      f(Float8E4M3{});
      break;
    case DType::kFloat8E5M2:
      f(Float8E5M2{});
      break;
  }
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
