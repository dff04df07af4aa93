// Elements as sums of bfloat16, the only numbers that tile registers multiply.
//
// SPDX-License-Identifier: Apache-2.0
//
// A bfloat16 is its one part, as is a float8; a float16 is the sum of two.  A float32 is the sum of three, exactly:
// each takes the upper 8 bits of what the one before left, and 24 bits are 3 times 8.  That holds as long as no part is
// subnormal, which tile registers take for zero, and nothing overflows; so numbers far from 1 are watched for, and left
// to vectors of float32.
#pragma once

#include "kernels/attention_state.h"

#if defined(PAGEDATTN_BFLOAT16_PRODUCTS)

namespace pagedattn::cpu::PAGEDATTN_ISA {

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;                         // bfloat16 in a row of a tile
constexpr int kStepKeys = 64;                          // keys whose scores are in flight
constexpr int kPanelStride = 4 * kMaxLanes;            // bytes from one key, dimension or pair to the next
constexpr int kRightBytes = kTileRows * kPanelStride;  // of a part, 16 pairs

// 2 * kWidth bfloat16 of each part.
template <int kParts>
struct Depth {
  VecU part[kParts];
};

// The parts of two vectors, in pairs of an element of each.  A single part is rounded, ties up.
template <int kParts>
PA_INLINE Depth<kParts> split(Vec even, Vec odd) {
  Depth<kParts> depth;
#pragma GCC unroll 3
  for (int p = 0; p < kParts; ++p) {
    const uint32_t half = kParts == 1 ? 0x8000u : 0u;
    const VecU even_bits = as_bits(even) + half, odd_part = (as_bits(odd) + half) & 0xffff0000u;
    depth.part[p] = (even_bits >> 16) | odd_part;
    even -= as_float(even_bits & 0xffff0000u);
    odd -= as_float(odd_part);
  }
  return depth;
}

// Watches for numbers whose parts would not be exact, or whose products and sums not finite.
class Range {
 public:
  __attribute__((always_inline)) void take(Vec v) {
    const VecU magnitude = as_bits(v) << 1;
    const VecU nonzero = magnitude - 1u;  // 0 becomes the largest
    least_ = nonzero < least_ ? nonzero : least_;
    most_ = magnitude > most_ ? magnitude : most_;
  }
  // Whether all that was taken was 0, or between 2**-100 and 2**56.
  bool holds() const {
    constexpr uint32_t kLeast = (127u - 100u) << 24, kMost = (127u + 56u) << 24;
    return !any((VecI)(least_ < kLeast - 1u) | (VecI)(most_ > kMost));
  }

 private:
  VecU least_ = VecU{} - 1u, most_ = VecU{};
};

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
