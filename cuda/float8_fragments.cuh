// Float8 operands of the tensor-core products, widened to float16 in registers.  Every e4m3 and e5m2 value is a
// float16.
//
// SPDX-License-Identifier: Apache-2.0
//
// ldmatrix moves pairs of bytes, so a register holds four elements: of K (plain load) four neighbouring dimensions of
// one token, of V (transposed load) two neighbouring dimensions of two tokens.  Neither is the order of an mma operand,
// and neither need be:
//  - Q K^T sums over dimensions, so any order serves if Q has the same.  Lane c of a quad takes dimensions 4c ... 4c +
//  3
//    of each 16 where mma counts 2c, 2c + 1, 2c + 8, 2c + 9; Q is stored in shared memory with its pairs so permuted.
//  - P V gives columns in any order that the reader of O knows: the even dimensions of each 16 go to one mma, the odd
//    ones to the next.
#pragma once

#include "ptx.cuh"

namespace pagedattn::cuda {

struct Float8E4M3 {};
struct Float8E5M2 {};

// Bytes 0 and 1 of x to `first`, 2 and 3 to `second`, as pairs of float16.
template <class Float8>
__device__ inline void widen(uint32_t x, uint32_t &first, uint32_t &second);

// e5m2 is the upper byte of a float16.
template <>
__device__ inline void widen<Float8E5M2>(uint32_t x, uint32_t &first, uint32_t &second) {
  first = pick_bytes(x, 0x1404);
  second = pick_bytes(x, 0x3424);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890

template <>
__device__ inline void widen<Float8E4M3>(uint32_t x, uint32_t &first, uint32_t &second) {
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(first), "=r"(second)
      : "r"(x));
}

#else

// The exponent and mantissa of e4m3 one bit below their place in float16 read as the value times 2^-8 (biases 7 and
// 15), subnormals included.  NaN (all ones) then comes out as 480, the one number above 448: times 146 it alone
// overflows, and infinity times 0 is NaN.
__device__ inline uint32_t widen_e4m3_pair(uint32_t upper_bytes) {
  const uint32_t shifted = (upper_bytes & 0x80008000u) | ((upper_bytes & 0x7f007f00u) >> 1);
  __half2 value;
  memcpy(&value, &shifted, sizeof(value));
  value = __hmul2(value, __float2half2_rn(256.0f));
  const __half2 overflowed_if_nan = __hmul2(value, __float2half2_rn(146.0f));
  value = __hfma2(overflowed_if_nan, __float2half2_rn(0.0f), value);
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <>
__device__ inline void widen<Float8E4M3>(uint32_t x, uint32_t &first, uint32_t &second) {
  first = widen_e4m3_pair(pick_bytes(x, 0x1404));
  second = widen_e4m3_pair(pick_bytes(x, 0x3424));
}

#endif

}  // namespace pagedattn::cuda
