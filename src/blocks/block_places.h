// Where every block of the pool is, in eight bytes a block and one for its priority.
//
// A block is in exactly one of three places. *Held*: one sequence or more refer to it, and it counts them. *Free*:
// nobody does and its contents are worthless; never-used blocks come from a bump counter, given-back ones from a stack,
// so making a pool touches no memory. *Evictable*: nobody refers to it but the prefix cache offers it; it waits in the
// least recently used list of its priority. As it is never in two places, count and links share their bytes.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "blocks/prefix_index.h"

namespace pagedattn::blocks {

class BlockPlaces {
 public:
  static constexpr int kNumPriorities = 256;  // int8

  explicit BlockPlaces(int32_t num_blocks) : num_blocks_(num_blocks), links_(num_blocks), priority_(num_blocks) {}

  int32_t num_blocks() const { return num_blocks_; }
  int32_t num_used() const { return next_unused_; }  // blocks from here on have never been handed out
  int64_t num_held() const { return num_held_; }
  int64_t num_evictable() const { return num_evictable_; }
  int32_t ref_count(int32_t block) const { return std::max(0, -links_[block].back); }
  bool held(int32_t block) const { return links_[block].back < 0; }
  int8_t priority(int32_t block) const { return priority_[block]; }
  void set_priority(int32_t block, int8_t priority) { priority_[block] = priority; }  // not of an evictable block
  void prefetch(int32_t block) const { links_.prefetch(block); }

  // --- held blocks ---
  void add_reference(int32_t block) { --links_[block].back; }
  // Whether it was the last reference: the caller then puts the block somewhere.
  bool drop_reference(int32_t block) {
    const bool last = ++links_[block].back == 0;
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
      links_[top].back = -1;
      top = links_[top].next;
    }
    free_top_ = top;
    num_stacked_ -= taken;
    for (; taken < n && next_unused_ < num_blocks_; ++taken, ++next_unused_) {
      out[taken] = next_unused_;
      links_[next_unused_].back = -1;
    }
    num_held_ += taken;
    return taken;
  }

  // The least recently used block of the lowest priority; there must be one.
  int32_t take_oldest() {
    const int32_t block = oldest();
    take(block);
    return block;
  }

  void take(int32_t evictable) {
    unlink(evictable);
    hold_first(evictable);
  }

  // --- giving blocks back ---
  void put_free(int32_t block) {
    links_[block] = {0, free_top_};
    free_top_ = block;
    ++num_stacked_;
  }

  void put_evictable(int32_t block) {
    List &list = lists_[index(priority_[block])];
    const int32_t before = list.tail;
    links_[block] = {before + 1, kNone};
    list.tail = block;
    ++num_evictable_;
    if (before != kNone) {
      links_[before].next = block;
      return;
    }
    list.head = block;
    mark(index(priority_[block]), true);
  }

  void unlink(int32_t evictable) {
    List &list = lists_[index(priority_[evictable])];
    const int32_t before = links_[evictable].back - 1;
    const int32_t after = links_[evictable].next;
    (before == kNone ? list.head : links_[before].next) = after;
    (after == kNone ? list.tail : links_[after].back) = after == kNone ? before : before + 1;
    if (list.head == kNone) mark(index(priority_[evictable]), false);
    --num_evictable_;
  }

  int32_t oldest() const {
    for (int word = 0; word < 4; ++word) {
      if (occupied_[word] != 0) return lists_[word * 64 + std::countr_zero(occupied_[word])].head;
    }
    return kNone;
  }
  int32_t next_oldest(int32_t evictable) const { return links_[evictable].next; }

 private:
  friend class Check;
  friend class SnapshotWriter;
  friend class SnapshotReader;

  // held: minus the count and nothing; evictable: the neighbour before, plus one, and the one behind; free: 0 and the
  // block below in the stack.
  struct Link {
    int32_t back;
    int32_t next;
  };
  struct List {
    int32_t head = kNone;
    int32_t tail = kNone;
  };

  static int index(int8_t priority) { return priority + 128; }

  void hold_first(int32_t block) {
    links_[block].back = -1;
    ++num_held_;
  }

  void mark(int list, bool occupied) {
    const uint64_t bit = uint64_t{1} << (list % 64);
    occupied_[list / 64] = occupied ? occupied_[list / 64] | bit : occupied_[list / 64] & ~bit;
  }

  int32_t num_blocks_;
  LazyArray<Link> links_;
  LazyArray<int8_t> priority_;
  List lists_[kNumPriorities];
  uint64_t occupied_[4] = {};  // a bit for each list that is not empty
  int64_t num_held_ = 0;
  int64_t num_evictable_ = 0;
  int64_t num_stacked_ = 0;
  int32_t next_unused_ = 0;
  int32_t free_top_ = kNone;
};

}  // namespace pagedattn::blocks
