// Division by a number that is known at launch, as a multiplication.
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

}  // namespace pagedattn::cuda
