// What happened in the prefix cache, for routers and indexes outside: a ring of fixed-size records.
//
// A record names a block by the hash of the whole prefix that ends in it. When nobody drains the ring the oldest
// records go, and are counted. The records' bytes are those of a NumPy structured array, so draining is one copy.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "blocks/block_hash.h"
#include "blocks/lazy_array.h"

namespace pagedattn::blocks {

enum class EventKind : int32_t { kStored = 1, kRemoved = 2, kEvicted = 3 };

struct EventHead {
  Hash128 hash;
  Hash128 parent_hash;
  EventKind kind;
  int32_t block;
};

class EventRing {
 public:
  EventRing(int64_t capacity, int32_t block_size)
      : capacity_(capacity),
        token_bytes_(static_cast<size_t>(block_size) * sizeof(int32_t)),
        record_bytes_(sizeof(EventHead) + token_bytes_),
        bytes_(checked_product(capacity, static_cast<int64_t>(record_bytes_))) {}

  bool enabled() const { return capacity_ > 0; }
  int64_t capacity() const { return capacity_; }
  int64_t dropped() const { return dropped_; }

  void push(const EventHead &head, const int32_t *tokens) {
    uint8_t *record = &bytes_[(first_ + size_) % capacity_ * static_cast<int64_t>(record_bytes_)];
    std::memcpy(record, &head, sizeof(head));
    std::memcpy(record + sizeof(head), tokens, token_bytes_);
    if (size_ < capacity_) {
      ++size_;
    } else {
      first_ = (first_ + 1) % capacity_;
      ++dropped_;
    }
  }

  // All records, the oldest first; the ring is empty afterwards.
  std::vector<uint8_t> drain() {
    std::vector<uint8_t> out(static_cast<size_t>(size_) * record_bytes_);
    for (int64_t i = 0; i < size_; ++i) {
      std::memcpy(&out[static_cast<size_t>(i) * record_bytes_],
                  &bytes_[(first_ + i) % capacity_ * static_cast<int64_t>(record_bytes_)], record_bytes_);
    }
    first_ = size_ = 0;
    return out;
  }

 private:
  int64_t capacity_;
  size_t token_bytes_;
  size_t record_bytes_;
  LazyArray<uint8_t> bytes_;
  int64_t first_ = 0;
  int64_t size_ = 0;
  int64_t dropped_ = 0;
};

}  // namespace pagedattn::blocks
