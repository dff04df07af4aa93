// Division by numbers that are known at launch, as multiplications: a hardware division is a hundred instructions, and
// a small call has to fetch each of them from memory first.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace pagedattn::cuda {

// Exact n / divisor for 0 <= n < 2^31 by one wide multiplication and a shift.  With 2^(s-1) < d <= 2^s and
// m = ceil(2^(31+s) / d), the error of m is below d <= 2^s, so n * error < 2^(31+s) and the quotient is exact.
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 1u << 31;
  uint32_t shift = 31;

  static FastDivisor of(int32_t d) {
    uint32_t s = 0;
    while ((uint64_t{1} << s) < static_cast<uint64_t>(d)) ++s;
    const uint64_t power = uint64_t{1} << (31 + s);
    const auto divisor = static_cast<uint64_t>(d);
    return {static_cast<uint32_t>(d), static_cast<uint32_t>((power + divisor - 1) / divisor), 31 + s};
  }
  __host__ __device__ int divide(int n) const {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >> shift);
  }
};

// Exact n / divisor for every n >= 0 of 64 bits.  With m = floor((2^64 - 1) / d), m n / 2^64 falls short of n / d by
// less than n / 2^64 < 1, so the product's upper half is the quotient or one less, which the remainder tells.
struct IndexDivisor {
  uint64_t divisor = 1;
  uint64_t reciprocal = UINT64_MAX;

  static IndexDivisor of(int64_t d) {
    const auto divisor = static_cast<uint64_t>(d);
    return {divisor, UINT64_MAX / divisor};
  }

  // The quotient; n becomes the remainder.
  __device__ int64_t split(int64_t *n) const {
    const auto dividend = static_cast<uint64_t>(*n);
    uint64_t quotient = __umul64hi(dividend, reciprocal);
    uint64_t rest = dividend - quotient * divisor;
    if (rest >= divisor) {
      ++quotient;
      rest -= divisor;
    }
    *n = static_cast<int64_t>(rest);
    return static_cast<int64_t>(quotient);
  }
};

}  // namespace pagedattn::cuda
