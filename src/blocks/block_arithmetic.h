// From tokens to blocks. The processor's division takes tens of cycles and every step divides by the block size, so it
// is a multiplication here: exact for numbers below 2^32 (Lemire, Kaser and Kurz, 2019).
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace pagedattn::blocks {

class BlockArithmetic {
 public:
  explicit BlockArithmetic(int32_t block_size)
      : size_(block_size), reciprocal_(block_size == 1 ? 0 : ~uint64_t{0} / static_cast<uint64_t>(block_size) + 1) {}

  int64_t size() const { return size_; }

  // Blocks that `num_tokens` tokens fill.
  int64_t full(int64_t num_tokens) const {
    __extension__ using uint128 = unsigned __int128;
    if (reciprocal_ == 0) return num_tokens;
    return static_cast<int64_t>((static_cast<uint128>(reciprocal_) * static_cast<uint64_t>(num_tokens)) >> 64);
  }

  // Blocks that hold `num_tokens` tokens.
  int64_t holding(int64_t num_tokens) const {
    const int64_t blocks = full(num_tokens);
    return blocks + (blocks * size_ != num_tokens);
  }

 private:
  int64_t size_;
  uint64_t reciprocal_;
};

}  // namespace pagedattn::blocks
