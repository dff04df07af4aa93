// Division of 64-bit indices by a number that is known at launch, as a multiplication: a hardware division is a hundred
// instructions, and a small call has to fetch each of them from memory first.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace pagedattn::cuda {

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
