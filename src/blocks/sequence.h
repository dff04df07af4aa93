// A sequence of the block manager, the host pool it may be swapped to, and the map from public ids to sequences.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "blocks/block_pool.h"

namespace pagedattn::blocks {

struct Sequence {
  int64_t id = 0;
  std::vector<int32_t> tokens;  // all that are known, computed or not
  std::vector<int32_t> table;   // ceil(num_computed / block_size) blocks; kNone where the window has passed
  int64_t num_computed = 0;     // tokens whose KV is in the blocks
  int64_t num_cached = 0;       // of these, found in the prefix cache
  int64_t num_published = 0;    // leading blocks that are in the prefix cache
  int64_t num_released = 0;     // leading blocks that the window has passed
  Parent tip;                   // the parent of the next block to publish
  int32_t space = 0;            // namespace
  int8_t priority = 0;
  bool swapped = false;        // the table names host blocks
  bool started = false;        // has had a step since it was added or preempted
  bool chain_broken = false;   // an ancestor has left the cache: nothing more can be published
  bool queried = false;        // its prompt has been counted in the hit rate
  uint32_t table_version = 0;  // changes when an entry that may have been written to a batch changes
  uint64_t batch_mark = 0;     // the last call that named this sequence, to find repeated ids

  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
  int64_t num_blocks() const { return static_cast<int64_t>(table.size()); }
};

// Ids are handed out in rising order and never again. Linear probing with the identity as hash puts neighbours side by
// side, so a look-up is usually one cache line.
class SequenceMap {
 public:
  SequenceMap() : slots_(16) {}

  Sequence *find(int64_t id) const {
    for (size_t i = home(id);; i = next(i)) {
      Sequence *sequence = slots_[i].get();
      if (sequence == nullptr || sequence->id == id) return sequence;
    }
  }

  Sequence &insert(std::unique_ptr<Sequence> sequence) {
    if ((size_ + 1) * 2 > slots_.size()) grow();
    Sequence &placed = *sequence;
    place(std::move(sequence));
    ++size_;
    return placed;
  }

  void erase(int64_t id) {
    size_t hole = home(id);
    while (slots_[hole]->id != id) hole = next(hole);
    slots_[hole].reset();
    --size_;
    // Close the gap: whoever probed past the hole moves back into it.
    for (size_t i = next(hole); slots_[i] != nullptr; i = next(i)) {
      const size_t wanted = home(slots_[i]->id);
      if (((i - wanted) & (slots_.size() - 1)) < ((i - hole) & (slots_.size() - 1))) continue;
      slots_[hole] = std::move(slots_[i]);
      hole = i;
    }
  }

  int64_t size() const { return static_cast<int64_t>(size_); }

  template <typename Visit>
  void for_each(Visit visit) const {
    for (const auto &slot : slots_) {
      if (slot != nullptr) visit(*slot);
    }
  }

 private:
  size_t home(int64_t id) const { return static_cast<size_t>(id) & (slots_.size() - 1); }
  size_t next(size_t i) const { return (i + 1) & (slots_.size() - 1); }

  void place(std::unique_ptr<Sequence> sequence) {
    size_t i = home(sequence->id);
    while (slots_[i] != nullptr) i = next(i);
    slots_[i] = std::move(sequence);
  }

  void grow() {
    std::vector<std::unique_ptr<Sequence>> old(slots_.size() * 2);
    old.swap(slots_);
    for (auto &sequence : old) {
      if (sequence != nullptr) place(std::move(sequence));
    }
  }

  std::vector<std::unique_ptr<Sequence>> slots_;  // a power of two
  size_t size_ = 0;
};

// Blocks in host memory: counted like device blocks, but never cached.
class HostPool {
 public:
  explicit HostPool(int32_t num_blocks) : num_blocks_(num_blocks), count_(num_blocks), free_link_(num_blocks) {}

  int32_t num_blocks() const { return num_blocks_; }
  int32_t num_free() const { return num_blocks_ - num_held_; }
  int32_t ref_count(int32_t block) const { return count_[block]; }

  int32_t allocate() {
    int32_t block = free_top_;
    if (block != kNone) {
      free_top_ = free_link_[block];
    } else {
      block = next_unused_++;
    }
    count_[block] = 1;
    ++num_held_;
    return block;
  }

  void hold(int32_t block) { ++count_[block]; }

  void release(int32_t block) {
    if (--count_[block] > 0) return;
    free_link_[block] = free_top_;
    free_top_ = block;
    --num_held_;
  }

 private:
  friend class State;  // check() and snapshots

  int32_t num_blocks_;
  LazyArray<int32_t> count_;
  LazyArray<int32_t> free_link_;
  int32_t num_held_ = 0;
  int32_t next_unused_ = 0;
  int32_t free_top_ = kNone;
};

}  // namespace pagedattn::blocks
