// Blocks in host memory: counted like device blocks, but never cached.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "blocks/prefix_index.h"

namespace pagedattn::blocks {

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

  // The blocks of a table, kNone among them.
  void share(std::span<const int32_t> blocks) {
    for (const int32_t block : blocks) {
      if (block != kNone) hold(block);
    }
  }
  void release(std::span<const int32_t> blocks) {
    for (const int32_t block : blocks) {
      if (block != kNone) release(block);
    }
  }

 private:
  friend class Check;
  friend class SnapshotWriter;
  friend class SnapshotReader;

  int32_t num_blocks_;
  LazyArray<int32_t> count_;
  LazyArray<int32_t> free_link_;
  int32_t num_held_ = 0;
  int32_t next_unused_ = 0;
  int32_t free_top_ = kNone;
};

}  // namespace pagedattn::blocks
