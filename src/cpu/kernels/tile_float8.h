// Float8 to the bfloat16 that it is, as operands of tile registers.
//
// SPDX-License-Identifier: Apache-2.0
//
// A float8 without its sign is one of 128 numbers, and each is a bfloat16 exactly, subnormal ones and NaN included: two
// tables of bytes hold the lower and the upper halves, which shuffles look up for a line of 64 elements at once and
// bring together.  Those of values are joined in pairs of keys before that.
//
// Vectors are interleaved in quarters of 16 bytes, so a line of 64 dimensions gets an order of its own: what queries
// are multiplied with has the quads of dimensions 0, 1, 4, 5, 8 ... first, then 2, 3, 6, 7 ...; values have the quads
// 0, 4, 8, 12, then 1, 5, 9, 13, and so on.
#pragma once

#include "kernels/fetch.h"
#include "kernels/tile_products.h"

#if defined(PAGEDATTN_TILES)

namespace pagedattn::cpu::PAGEDATTN_ISA {

constexpr int kLineDims = 64;

typedef uint8_t Bytes __attribute__((vector_size(64)));

PA_INLINE Bytes interleave_low_bytes(Bytes a, Bytes b) { return (Bytes)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
PA_INLINE Bytes interleave_high_bytes(Bytes a, Bytes b) { return (Bytes)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }

// Halves of the bfloat16 of each float8 without sign.
struct BFloat16Halves {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

template <class T>
constexpr BFloat16Halves bfloat16_halves() {
  constexpr unsigned kLeading = 1u << T::kMantissa;
  BFloat16Halves halves = {};
  for (unsigned code = 0; code < 128; ++code) {
    unsigned exponent = code >> T::kMantissa, mantissa = code % kLeading, bits = 0;
    if (T::is_infinity(code)) {
      bits = 0x7f80;
    } else if (T::is_nan(code)) {
      bits = 0x7fc0;
    } else if (code != 0) {
      if (exponent == 0) {
        for (exponent = 1; mantissa < kLeading; --exponent) mantissa *= 2;
      }
      bits = ((exponent + 127u - T::kBias) << 7) + (mantissa % kLeading << (7 - T::kMantissa));
    }
    halves.low[code] = static_cast<uint8_t>(bits);
    halves.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return halves;
}
template <class T>
constexpr BFloat16Halves kBFloat16Halves = bfloat16_halves<T>();

// Keeps the tables in registers.
template <class T>
class Widening {
 public:
  __attribute__((always_inline)) Widening() {
    constexpr const BFloat16Halves &kHalves = kBFloat16Halves<T>;
    for (int i = 0; i < 2; ++i) {
      low_[i] = load_as<Bytes>(kHalves.low + 64 * i);
      high_[i] = load_as<Bytes>(kHalves.high + 64 * i);
    }
  }

  // 64 float8 as bfloat16, of each 16 the first 8, then the others.
  __attribute__((always_inline)) void widen(Bytes codes, void *first, void *second) const {
    const Bytes low = find(low_, codes), high = find(high_, codes) | (codes & 0x80);
    store_as(first, interleave_low_bytes(low, high));
    store_as(second, interleave_high_bytes(low, high));
  }

 private:
  static __attribute__((always_inline)) Bytes find(const Bytes (&table)[2], Bytes codes) {
    return (Bytes)_mm512_permutex2var_epi8((__m512i)table[0], (__m512i)codes, (__m512i)table[1]);
  }

  Bytes low_[2], high_[2];
};

// The first kDims <= 64 of a line, and zeros.
template <int kDims>
PA_INLINE Bytes load_codes(const uint8_t *p) {
  Bytes codes = {};
  __builtin_memcpy(&codes, p, kDims);
  return codes;
}

// A line of each of 16 keys, row(i), as rows of a left operand `stride` elements apart.
template <int kDims, class T, class Row>
PA_INLINE void widen_rows(const Widening<T> &widening, Row row, uint16_t *dst, int64_t stride, Fetch<T> &fetch) {
  constexpr int kStep = 4;
  for (int i = 0; i < kTileRows; i += kStep) {
#pragma GCC unroll 4
    for (int r = i; r < i + kStep; ++r, dst += stride) {
      widening.widen(load_codes<kDims>(row(r)), dst, dst + kTileDepth);
    }
    fetch.lines(kStep);
  }
}

// A line of each of 32 values, row(i), as four tiles of 16 dimensions, whose rows pair values that are 16 apart.
template <int kDims, class T, class Row>
PA_INLINE void widen_pairs(const Widening<T> &widening, Row row, char *tiles, int lines, Fetch<T> &fetch) {
  constexpr int kStep = 2;
  for (int i = 0; i < kTileRows; i += kStep) {
#pragma GCC unroll 2
    for (int r = i; r < i + kStep; ++r, tiles += 64) {
      const Bytes first = load_codes<kDims>(row(r)), second = load_codes<kDims>(row(r + kTileRows));
      widening.widen(interleave_low_bytes(first, second), tiles, tiles + kTileBytes);
      widening.widen(interleave_high_bytes(first, second), tiles + 2 * kTileBytes, tiles + 3 * kTileBytes);
    }
    fetch.lines(lines);
  }
}

// Between the order of a line of values and that of dimensions, either way.
PA_INLINE void reorder_line(const float *src, float *dst) {
  for (int i = 0; i < 16; ++i) __builtin_memcpy(dst + 4 * i, src + 4 * (i % 4 * 4 + i / 4), 4 * sizeof(float));
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
