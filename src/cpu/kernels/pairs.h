// Pairs of block numbers, narrowed to 32 bits for who moves the blocks, and verified on the way.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/simd.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

// A number outside of 0 ... last has its highest bit set, or last less it has: so one loop without an exit finds any,
// and vectorises.  Groups make what alternates between the numbers of a pair constant along a vector.
static bool narrow_pairs(const int64_t *pairs, int64_t num_pairs, int64_t num_first, int64_t num_second,
                         int32_t *narrow) {
  constexpr int64_t kGroup = 8;  // numbers
  const uint64_t last_first = static_cast<uint64_t>(num_first - 1), last_second = static_cast<uint64_t>(num_second - 1);
  const uint64_t last[kGroup] = {last_first, last_second, last_first, last_second,
                                 last_first, last_second, last_first, last_second};
  uint64_t signs[kGroup] = {};
  const auto take = [&](int64_t i, int64_t k) {
    const uint64_t number = static_cast<uint64_t>(pairs[i + k]);
    signs[k] |= number | (last[k] - number);
    narrow[i + k] = static_cast<int32_t>(number);
  };
  int64_t i = 0;
  for (; i + kGroup <= 2 * num_pairs; i += kGroup) {
    for (int64_t k = 0; k < kGroup; ++k) take(i, k);
  }
  for (int64_t k = 0; i + k < 2 * num_pairs; ++k) take(i, k);
  uint64_t all = 0;
  for (int64_t k = 0; k < kGroup; ++k) all |= signs[k];
  return all >> 63 == 0;
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
