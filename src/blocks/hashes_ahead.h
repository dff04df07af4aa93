// The chained hashes of a prompt's blocks, computed some blocks ahead of their use.
//
// They depend on the prompt's tokens alone. So they are made sixteen at a time, in a loop that does nothing else, and
// while that runs, the memory that their look-ups will read is on its way: a look-up costs what it computes, not what
// it waits for.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "blocks/block_pool.h"

namespace pagedattn::blocks {

// `Hash` is Hash128, or uint64_t for the one lane that look-ups need.
template <typename Hash>
class HashesAhead {
 public:
  struct Found {
    Hash hash;
    int32_t guess;  // the block that has probably this hash, or kNone
  };

  // Of `n` blocks that follow one whose hash is `above`.
  HashesAhead(const BlockPool &pool, Hash above, const int32_t *tokens, int64_t n)
      : pool_(pool), above_(above), tokens_(tokens), left_(n) {}

  // For a look-up.
  Found next() {
    if (used_ == hashed_) {
      // What is not cached mostly differs from its first block on: nothing is done ahead for that one.
      hash(hashed_ == 0 ? 1 : kAhead);
      for (int i = 0; i < hashed_; ++i) guesses_[i] = pool_.prefetch_guess(hashes_[i]);
    }
    const int at = used_++;
    return {hashes_[at], guesses_[at]};
  }

  // For an insertion.
  Hash next_hash() {
    if (used_ == hashed_) hash(kAhead);
    return hashes_[used_++];
  }

 private:
  static constexpr int kAhead = 16;

  void hash(int most) {
    hashed_ = static_cast<int>(std::min<int64_t>(most, left_));
    used_ = 0;
    left_ -= hashed_;
    Hash above = above_;
    const int32_t *tokens = tokens_;
    for (int i = 0; i < hashed_; ++i, tokens += pool_.block_size()) {
      hashes_[i] = above = pool_.child_hash(above, tokens);
      pool_.prefetch_entry(above);
    }
    above_ = above;
    tokens_ = tokens;
  }

  const BlockPool &pool_;
  Hash above_;
  const int32_t *tokens_;
  int64_t left_;
  int used_ = 0;
  int hashed_ = 0;
  Hash hashes_[kAhead];
  int32_t guesses_[kAhead];
};

}  // namespace pagedattn::blocks
