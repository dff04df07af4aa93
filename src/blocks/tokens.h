// Tokens as callers give them: checked, and narrowed to 32 bits. The loops run without a branch, so they are
// vectorised.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace pagedattn::blocks {

// Whether all numbers are tokens, 0 ... 2^31 - 1: none has a bit that tokens have not.
template <typename Number>
bool all_tokens(const Number *numbers, int64_t n) {
  Number bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= numbers[i];
  return static_cast<uint64_t>(int64_t{bits}) >> 31 == 0;
}

// The least and the greatest of some numbers and 0.
template <typename Number>
std::pair<int64_t, int64_t> range_of(const Number *numbers, int64_t n) {
  Number low = 0;
  Number high = 0;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, numbers[i]);
    high = std::max(high, numbers[i]);
  }
  return {low, high};
}

inline void narrow(const std::vector<int64_t> &wide, std::vector<int32_t> &out) {
  out.resize(wide.size());
  for (size_t i = 0; i < wide.size(); ++i) out[i] = static_cast<int32_t>(wide[i]);
}

}  // namespace pagedattn::blocks
