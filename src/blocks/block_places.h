// Where every block of the pool is, in four bytes a block, one for its priority, and five while it waits for eviction.
//
// A block is in exactly one of three places. *Held*: one sequence or more refer to it, and it counts them. *Free*:
// nobody does and its contents are worthless; never-used blocks come from a bump counter, given-back ones from a stack,
// so making a pool touches no memory. *Evictable*: nobody refers to it but the prefix cache offers it; it waits in the
// least recently used list of its priority. As it is never in two places, count and link share their bytes.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "blocks/eviction_lists.h"

namespace pagedattn::blocks {

class BlockPlaces {
 public:
  explicit BlockPlaces(int32_t num_blocks)
      : num_blocks_(num_blocks), states_(num_blocks), priority_(num_blocks), evictable_(num_blocks) {}

  int32_t num_blocks() const { return num_blocks_; }
  int32_t num_used() const { return next_unused_; }  // blocks from here on have never been handed out
  int64_t num_held() const { return num_held_; }
  int32_t ref_count(int32_t block) const { return std::max(0, -states_[block]); }
  bool held(int32_t block) const { return states_[block] < 0; }
  int8_t priority(int32_t block) const { return priority_[block]; }
  void set_priority(int32_t block, int8_t priority) { priority_[block] = priority; }  // not of an evictable block
  void prefetch(int32_t block) const { states_.prefetch(block); }

  // --- held blocks ---
  void add_reference(int32_t block) { --states_[block]; }
  // Whether it was the last reference: the caller then puts the block somewhere.
  bool drop_reference(int32_t block) {
    const bool last = ++states_[block] == 0;
    num_held_ -= last;
    return last;
  }

  // --- taking blocks; each is held once afterwards ---
  // Up to `n` free blocks, given-back ones first; how many there were.
  int64_t take_free(int64_t n, int32_t *out) {
    int64_t taken = 0;
    int32_t top = free_top_;
    for (; taken < n && top != kNone; ++taken) {
      out[taken] = top;
      top = std::exchange(states_[top], -1) - 1;
    }
    free_top_ = top;
    num_stacked_ -= taken;
    for (; taken < n && next_unused_ < num_blocks_; ++taken, ++next_unused_) {
      out[taken] = next_unused_;
      states_[next_unused_] = -1;
    }
    num_held_ += taken;
    return taken;
  }

  // The `n` least recently used blocks, those of the lowest priority first; there must be as many.
  void take_oldest(int64_t n, int32_t *out) {
    evictable_.pop(n, out);
    for (int64_t i = 0; i < n; ++i) states_[out[i]] = -1;
    num_held_ += n;
  }

  void take(int32_t evictable) {
    unlink(evictable);
    hold_first(evictable);
  }

  // --- giving blocks back ---
  void put_free(int32_t block) {
    states_[block] = free_top_ + 1;
    free_top_ = block;
    ++num_stacked_;
  }

  void put_evictable(int32_t block) { evictable_.push(block, priority_[block], states_); }
  void unlink(int32_t evictable) { evictable_.take(evictable, priority_[evictable], states_); }
  const EvictionLists &evictable() const { return evictable_; }

 private:
  friend class Check;
  friend class SnapshotWriter;
  friend class SnapshotReader;

  void hold_first(int32_t block) {
    states_[block] = -1;
    ++num_held_;
  }

  int32_t num_blocks_;
  LazyArray<int32_t>
      states_;  // held: minus the count; evictable: its chunk; free: the block below in the stack, plus one
  LazyArray<int8_t> priority_;
  EvictionLists evictable_;
  int64_t num_held_ = 0;
  int64_t num_stacked_ = 0;
  int32_t next_unused_ = 0;
  int32_t free_top_ = kNone;
};

}  // namespace pagedattn::blocks
