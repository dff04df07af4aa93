// One vector of floats, as wide as the unit's instruction set, and the arithmetic on it.
//
// SPDX-License-Identifier: Apache-2.0
//
// Kernel units (everything in this folder) are compiled once for each instruction set, with PAGEDATTN_ISA naming the
// namespace.  They include only this folder's headers and plain C ones: an inline function of the standard library
// emitted by a unit with wider instructions could be the copy that the linker keeps for the whole library, and would
// fault on an older processor.  For the same reason everything here is static.
//
// The vectors are GCC and Clang vector extensions, so that any target compiles; intrinsics appear where the extensions
// have no word (fused multiply-add, maximum, shuffles worth naming).
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef PAGEDATTN_ISA
#error "kernel units are compiled with -DPAGEDATTN_ISA=<generic|avx2|avx512|avx512_bf16|amx>"
#endif

#define PA_INLINE static inline __attribute__((always_inline, unused))
// For inner loops: registers are then given out for them alone.
#define PA_KERNEL static __attribute__((noinline, unused))

namespace pagedattn::cpu::PAGEDATTN_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

// Architectural vector registers, which bound the accumulators of a micro-kernel.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecI __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecU __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kWidth * 2)));
typedef uint8_t VecU8 __attribute__((vector_size(kWidth)));

template <class V>
PA_INLINE V load_as(const void *p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
PA_INLINE void store_as(void *p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
PA_INLINE Vec load(const float *p) { return load_as<Vec>(p); }
PA_INLINE void store(float *p, Vec v) { store_as(p, v); }
PA_INLINE Vec broadcast(float x) { return x - Vec{}; }
PA_INLINE Vec zero() { return Vec{}; }

PA_INLINE VecU as_bits(Vec v) { return (VecU)v; }
PA_INLINE Vec as_float(VecU v) { return (Vec)v; }

// Zero extension, for which compilers do not always find the one instruction by themselves.
PA_INLINE VecU widen(VecU16 v) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VecU);
#endif
}
PA_INLINE VecU16 load_widened(const uint8_t *p) {
#if defined(__AVX512F__)
  return (VecU16)_mm256_cvtepu8_epi16(load_as<__m128i>(p));
#elif defined(__AVX2__)
  return (VecU16)_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
#else
  return __builtin_convertvector(load_as<VecU8>(p), VecU16);
#endif
}

// Makes the compiler take what lies at `p` for something new.
template <class P>
PA_INLINE void hide(const P *&p) {
  asm("" : "+r"(p));
}

PA_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Whether a comparison holds in some lane.
PA_INLINE bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  return ((mask[0] | mask[1]) | (mask[2] | mask[3])) != 0;
#endif
}

// A NaN in `b` is kept.
PA_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// The vector's elements joined by a commutative operation on vectors, in halves.
template <class Join>
PA_INLINE float reduce(Vec v, Join join) {
#if defined(__AVX512F__)
  v = join(v, (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, _MM_SHUFFLE(1, 0, 3, 2)));
  v = join(v, (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, _MM_SHUFFLE(2, 3, 0, 1)));
  v = join(v, (Vec)_mm512_permute_ps((__m512)v, _MM_SHUFFLE(1, 0, 3, 2)));
  v = join(v, (Vec)_mm512_permute_ps((__m512)v, _MM_SHUFFLE(2, 3, 0, 1)));
#elif defined(__AVX2__)
  v = join(v, (Vec)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1));
  v = join(v, (Vec)_mm256_permute_ps((__m256)v, _MM_SHUFFLE(1, 0, 3, 2)));
  v = join(v, (Vec)_mm256_permute_ps((__m256)v, _MM_SHUFFLE(2, 3, 0, 1)));
#else
  v = join(v, Vec{v[2], v[3], v[0], v[1]});
  v = join(v, Vec{v[1], v[0], v[3], v[2]});
#endif
  return v[0];
}
PA_INLINE float reduce_add(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; });
}
PA_INLINE float reduce_max(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return max(a, b); });
}

#if defined(__SSE2__)
// The sums of four vectors of four.
PA_INLINE __m128 sum_each_128(__m128 a, __m128 b, __m128 c, __m128 d) {
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}
#endif
#if defined(__AVX2__)
PA_INLINE __m128 sum_each_256(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 low = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0));
  const __m256 high = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
  const __m256 sum = _mm256_add_ps(low, high);
  return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
}
#endif

typedef float Vec4 __attribute__((vector_size(16)));

// The horizontal sums of four vectors, for fewer shuffles than four reductions.
PA_INLINE Vec4 sum_each(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  const auto fold = [](Vec v) __attribute__((always_inline)) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  };
  return (Vec4)sum_each_256(fold(a), fold(b), fold(c), fold(d));
#elif defined(__AVX2__)
  return (Vec4)sum_each_256((__m256)a, (__m256)b, (__m256)c, (__m256)d);
#elif defined(__SSE2__)
  return (Vec4)sum_each_128((__m128)a, (__m128)b, (__m128)c, (__m128)d);
#else
  return Vec4{reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)};
#endif
}

// 2**x within an ulp or so for x <= 0 (and for moderate positive x); exactly 0 below 2**-126; NaN stays NaN.
PA_INLINE Vec exp2_nonpositive(Vec x) {
  // Adding 1.5 * 2**23 rounds to an integer and leaves it in the low mantissa bits, from where it moves to the
  // exponent.
  const Vec magic = broadcast(12582912.0f);
  const Vec clamped = max(broadcast(-126.0f), x);
  const Vec shifted = clamped + magic;
  const Vec f = clamped - (shifted - magic);
  // Minimax in relative error on [-1/2, 1/2], 1.9e-9; the constant term is 1 so that 2**0 is exact.
  Vec p = broadcast(1.5345812008e-04f);
  p = fma(p, f, broadcast(1.3399931219e-03f));
  p = fma(p, f, broadcast(9.6184889571e-03f));
  p = fma(p, f, broadcast(5.5503287770e-02f));
  p = fma(p, f, broadcast(2.4022646891e-01f));
  p = fma(p, f, broadcast(6.9314720574e-01f));
  p = fma(p, f, broadcast(1.0f));
  const Vec r = as_float(as_bits(p) + (as_bits(shifted) << 23));
  return x < -126.0f ? zero() : r;
}

// tanh, accurate relative to its value near 0 too, so that a large softcap costs no precision.
PA_INLINE Vec tanh(Vec x) {
  const VecU sign = as_bits(x) & 0x80000000u;
  const Vec a = as_float(as_bits(x) ^ sign);
  // Odd minimax polynomial up to 0.625, relative error 4e-9.
  const Vec t = a * a;
  Vec p = broadcast(-5.6599889807e-03f);
  p = fma(p, t, broadcast(2.0590988300e-02f));
  p = fma(p, t, broadcast(-5.3721068011e-02f));
  p = fma(p, t, broadcast(1.3331127536e-01f));
  p = fma(p, t, broadcast(-3.3333260527e-01f));
  const Vec small = fma(p * t, a, a);
  const Vec e = exp2_nonpositive(a * broadcast(-2.8853900817779268f));  // exp(-2a)
  const Vec large = (1.0f - e) / (1.0f + e);
  const Vec r = a < 0.625f ? small : large;
  return as_float(as_bits(r) | sign);
}

#if !defined(__AVX2__) || defined(__AVX512F__)
#if defined(__clang__)
#define PA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif
PA_INLINE Vec interleave_low(Vec a, Vec b) {
#if defined(__AVX512F__)
  return PA_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return PA_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
PA_INLINE Vec interleave_high(Vec a, Vec b) {
#if defined(__AVX512F__)
  return PA_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return PA_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}
#undef PA_SHUFFLE

// Perfect shuffles of the vectors: they move the highest `stages` bits of an element's number to its lowest, so that
// [a][b] becomes [b][a].
template <int kVecs>
PA_INLINE void rotate(Vec (&r)[kVecs], int stages) {
  if constexpr (kVecs > 1) {
#pragma GCC unroll 4
    for (int stage = 0; stage < stages; ++stage) {
      Vec t[kVecs];
#pragma GCC unroll 16
      for (int i = 0; i < kVecs / 2; ++i) {
        t[2 * i] = interleave_low(r[i], r[i + kVecs / 2]);
        t[2 * i + 1] = interleave_high(r[i], r[i + kVecs / 2]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kVecs; ++i) r[i] = t[i];
    }
  }
}
#endif

// Transposes a square of kWidth vectors in place.
PA_INLINE void transpose(Vec (&r)[kWidth]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256 t[8], u[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    r[i] = (Vec)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = (Vec)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#else
  rotate(r, __builtin_ctz(kWidth));
#endif
}

enum class Cache { kL1, kL2 };

template <Cache kCache>
PA_INLINE void prefetch(const void *p) {
  __builtin_prefetch(p, 0, kCache == Cache::kL1 ? 3 : 2);
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
