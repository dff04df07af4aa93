// AVX-512's intrinsics on a processor with AVX2: the few that the kernel units use.
//
// SPDX-License-Identifier: Apache-2.0
//
// For tests alone.  With PAGEDATTN_EMULATE_ISAS the build includes this before the units `avx512`, `avx512_bf16` and
// `amx`, whose sources are then compiled as they are: the compiler lowers their vectors of 64 bytes, and names of
// intrinsics lead here.  What Intel's manual says of NaN and of exact zeros holds; how fast it is does not matter.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define __AVX512F__ 1

namespace emulation {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

#define PA_EMULATED static inline __attribute__((always_inline, unused))

template <class To, class From>
PA_EMULATED To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Half>
struct Halves {
  Half low, high;
};

// Applies an intrinsic of AVX2 to both halves.
template <class Out, class HalfIn, class F, class... In>
PA_EMULATED Out by_halves(F f, In... in) {
  using HalfOut = decltype(f(bits<Halves<HalfIn>>(in).low...));
  return bits<Out>(Halves<HalfOut>{f(bits<Halves<HalfIn>>(in).low...), f(bits<Halves<HalfIn>>(in).high...)});
}

PA_EMULATED __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return by_halves<__m512, __m256>([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
PA_EMULATED __m512 max(__m512 a, __m512 b) {
  return by_halves<__m512, __m256>([](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, a, b);
}
PA_EMULATED __mmask16 sign_mask(__m512i v) {
  const auto halves = bits<Halves<__m256>>(v);
  return static_cast<__mmask16>(_mm256_movemask_ps(halves.low) | _mm256_movemask_ps(halves.high) << 8);
}
PA_EMULATED __m512i widen(__m256i v) {
  return by_halves<__m512i, __m128i>([](__m128i x) { return _mm256_cvtepu16_epi32(x); }, v);
}
PA_EMULATED __m512 half_to_float(__m256i v) {
  return by_halves<__m512, __m128i>([](__m128i x) { return _mm256_cvtph_ps(x); }, v);
}
PA_EMULATED __m256i float_to_half(__m512 v) {
  return by_halves<__m256i, __m256>([](__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }, v);
}
PA_EMULATED __m512i load_unaligned(const void *p) {
  __m512i v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PA_EMULATED void store_past_caches(__m512i *p, __m512i v) {
  const auto halves = bits<Halves<__m256i>>(v);
  _mm256_stream_si256(reinterpret_cast<__m256i *>(p), halves.low);
  _mm256_stream_si256(reinterpret_cast<__m256i *>(p) + 1, halves.high);
}
PA_EMULATED __m256 low_half(__m512 v) { return bits<Halves<__m256>>(v).low; }
PA_EMULATED __m256 high_half(__m512 v) { return bits<Halves<__m256>>(v).high; }

// Element i of the result is element `from(i)` of v.
template <class F>
PA_EMULATED __m512 shuffle(__m512 v, F from) {
  Ints order;
  for (int i = 0; i < 16; ++i) order[i] = from(i);
  return bits<__m512>(__builtin_shuffle(bits<Floats>(v), order));
}
PA_EMULATED __m512 shuffle_quarters(__m512 v, int order) {
  return shuffle(v, [=](int i) { return 4 * (order >> i / 4 * 2 & 3) + i % 4; });
}
PA_EMULATED __m512 shuffle_in_quarters(__m512 v, int order) {
  return shuffle(v, [=](int i) { return i / 4 * 4 + (order >> i % 4 * 2 & 3); });
}

PA_EMULATED __m512 floor(__m512 v) {
  return by_halves<__m512, __m256>([](__m256 x) { return _mm256_floor_ps(x); }, v);
}
// What is left of a number above the next integer below; 0 of an infinite one.
PA_EMULATED __m512 fraction(__m512 v) {
  const Floats x = bits<Floats>(v);
  const Floats rest = x - bits<Floats>(floor(v));
  return bits<__m512>(x - x == 0.0f || x != x ? rest : Floats{});
}
// a * 2**floor(b).
PA_EMULATED __m512 scale_by_power(__m512 a, __m512 b) {
  const Floats power = bits<Floats>(floor(b));
  Floats r = bits<Floats>(a);
  for (int i = 0; i < 16; ++i) {
    if (power[i] != power[i]) {
      r[i] = power[i];
    } else {
      const float bounded = power[i] < -1000.0f ? -1000.0f : (power[i] > 1000.0f ? 1000.0f : power[i]);
      r[i] = __builtin_ldexpf(r[i], static_cast<int>(bounded));
    }
  }
  return bits<__m512>(r);
}
PA_EMULATED __mmask16 not_less_mask(__m512 a, __m512 b) {
  return sign_mask(bits<__m512i>(~(bits<Floats>(a) < bits<Floats>(b))));
}

PA_EMULATED __m512i interleave_low_bytes(__m512i a, __m512i b) {
  return by_halves<__m512i, __m256i>([](__m256i x, __m256i y) { return _mm256_unpacklo_epi8(x, y); }, a, b);
}
PA_EMULATED __m512i interleave_high_bytes(__m512i a, __m512i b) {
  return by_halves<__m512i, __m256i>([](__m256i x, __m256i y) { return _mm256_unpackhi_epi8(x, y); }, a, b);
}
// The bytes of a, then of b, that the lower 7 bits of those of `from` number.
PA_EMULATED __m512i look_up_bytes(__m512i a, __m512i from, __m512i b) {
  struct Bytes {
    uint8_t at[64];
  };
  const Bytes low = bits<Bytes>(a), high = bits<Bytes>(b), numbers = bits<Bytes>(from);
  Bytes r;
  for (int i = 0; i < 64; ++i) {
    const int number = numbers.at[i] & 127;
    r.at[i] = number < 64 ? low.at[number] : high.at[number - 64];
  }
  return bits<__m512i>(r);
}

// What is subnormal counts as zero.
PA_EMULATED Floats flushed(Floats x) {
  const Ints exponent = bits<Ints>(x) & 0x7f800000;
  return exponent == 0 ? Floats{} : x;
}
// The products of pairs of bfloat16, odd elements first, added to `sum` by fused multiply-adds.
PA_EMULATED __m512 add_products_of_pairs(__m512 sum, __m512i a, __m512i b) {
  const auto odd = [](__m512i v) { return bits<__m512>(flushed(bits<Floats>(bits<Ints>(v) & ~0xffff))); };
  const auto even = [](__m512i v) { return bits<__m512>(flushed(bits<Floats>(bits<Ints>(v) << 16))); };
  const Floats with_odd = flushed(bits<Floats>(fmadd(odd(a), odd(b), bits<__m512>(flushed(bits<Floats>(sum))))));
  return bits<__m512>(flushed(bits<Floats>(fmadd(even(a), even(b), bits<__m512>(with_odd)))));
}

}  // namespace emulation

// Immediate operands that nobody has thought of do not compile.
#undef _mm512_cvtps_ph
#undef _mm512_shuffle_f32x4
#undef _mm512_permute_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_reduce_ps
#undef _mm512_cmp_ps_mask
#define _mm512_fmadd_ps emulation::fmadd
#define _mm512_max_ps emulation::max
#define _mm512_movepi32_mask emulation::sign_mask
#define _mm512_cvtepu16_epi32 emulation::widen
#define _mm512_cvtph_ps emulation::half_to_float
#define _mm512_cvtps_ph(v, rounding) \
  (__extension__({ static_assert((rounding) == _MM_FROUND_TO_NEAREST_INT); }), emulation::float_to_half(v))
#define _mm512_loadu_si512 emulation::load_unaligned
#define _mm512_stream_si512 emulation::store_past_caches
#define _mm512_castps512_ps256 emulation::low_half
#define _mm512_extractf32x8_ps(v, half) (__extension__({ static_assert((half) == 1); }), emulation::high_half(v))
#define _mm512_shuffle_f32x4(a, b, order) (static_cast<void>(b), emulation::shuffle_quarters(a, order))
#define _mm512_permute_ps emulation::shuffle_in_quarters
#define _mm512_reduce_ps(v, what) \
  (__extension__({ static_assert((what) == _MM_FROUND_TO_NEG_INF); }), emulation::fraction(v))
#define _mm512_scalef_ps emulation::scale_by_power
#define _mm512_cmp_ps_mask(a, b, what) \
  (__extension__({ static_assert((what) == _CMP_NLT_UQ); }), emulation::not_less_mask(a, b))
#define _mm512_dpbf16_ps(sum, a, b) emulation::add_products_of_pairs(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_unpacklo_epi8 emulation::interleave_low_bytes
#define _mm512_unpackhi_epi8 emulation::interleave_high_bytes
#define _mm512_permutex2var_epi8 emulation::look_up_bytes
