// The chained hashes of a prompt's blocks, computed some blocks ahead of their use.
//
// They depend on the prompt's tokens alone. So while one block is looked up, the multiplications of a later one run
// beside it and the memory that its look-up will read is on its way: a look-up costs what it computes, not what it
// waits for.
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
  struct Entry {
    Hash hash;
    int32_t guess;  // the block that has probably this hash, or kNone
  };

  // Of `n` blocks that follow one whose hash is `above`.
  HashesAhead(const BlockPool &pool, Hash above, const int32_t *tokens, int64_t n)
      : pool_(pool), above_(above), tokens_(tokens), n_(static_cast<uint64_t>(n)) {}

  // For a look-up.
  Entry next() {
    // What is not cached mostly differs from its first block on: nothing is done ahead for that one.
    if (used_ == 0) {
      hash_until(1);
    } else {
      hash_until(used_ + kDistance);
      if (const uint64_t near = used_ + kDistance / 2; near < hashed_) {
        Entry &entry = ring_[near % kDistance];
        entry.guess = pool_.prefetch_guess(low_lane(entry.hash));
      }
    }
    return ring_[used_++ % kDistance];
  }

  // For an insertion.
  Hash next_hash() {
    hash_until(used_ + kDistance);
    return ring_[used_++ % kDistance].hash;
  }

 private:
  static constexpr uint64_t kDistance = 8;

  static uint64_t low_lane(uint64_t hash) { return hash; }
  static uint64_t low_lane(Hash128 hash) { return hash.lo; }

  void hash_until(uint64_t wanted) {
    for (wanted = std::min(wanted, n_); hashed_ < wanted; ++hashed_) {
      above_ = pool_.child_hash(above_, tokens_);
      tokens_ += pool_.block_size();
      pool_.prefetch_entry(low_lane(above_));
      ring_[hashed_ % kDistance] = {above_, kNone};
    }
  }

  const BlockPool &pool_;
  Hash above_;
  const int32_t *tokens_;
  uint64_t n_;
  uint64_t used_ = 0;
  uint64_t hashed_ = 0;
  Entry ring_[kDistance];
};

}  // namespace pagedattn::blocks
