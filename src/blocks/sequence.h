// A sequence of the block manager, and the map from public ids to sequences.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "blocks/namespaces.h"

namespace pagedattn::blocks {

// What every step looks at comes first and fills two cache lines.
struct Sequence {
  int64_t id = 0;
  std::vector<int32_t> tokens;  // all that are known, computed or not
  std::vector<int32_t> table;   // ceil(num_computed / block_size) blocks; kNone where the window has passed
  int64_t num_computed = 0;     // tokens whose KV is in the blocks
  uint64_t batch_mark = 0;      // the last call that named this sequence, to find repeated ids
  int64_t num_published = 0;    // leading blocks that are in the prefix cache
  int64_t num_released = 0;     // leading blocks that the window has passed
  Parent tip;                   // the parent of the next block to publish
  uint32_t table_version = 0;   // changes when an entry that may have been written to a batch changes
  bool swapped = false;         // the table names host blocks
  bool started = false;         // has had a step since it was added or preempted
  bool chain_broken = false;    // an ancestor has left the cache: nothing more can be published
  bool shares_tail = false;     // the last block may be another sequence's too, or the cache's: look before writing
  bool borrows_tail = false;    // the last block is a cached one whose first tokens happen to be this sequence's
  bool queried = false;         // its prompt has been counted in the hit rate,
  bool counts_hits = false;     // and so is what it finds: not so of a copy, whose prompt is the original's
  int8_t priority = 0;
  int32_t space = 0;       // namespace
  int64_t num_cached = 0;  // of the computed tokens, found in the prefix cache

  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }
  int64_t num_blocks() const { return static_cast<int64_t>(table.size()); }
};

// Ids are handed out in rising order and never again. Linear probing with the identity as hash puts neighbours side by
// side, so a look-up is usually one cache line. A slot belongs to whoever is farther from home (Robin Hood hashing), so
// that a gap is closed as soon as somebody is at home, however long the row of neighbours behind it.
class SequenceMap {
 public:
  SequenceMap() : slots_(16) {}

  Sequence *find(int64_t id) const {
    for (size_t i = home(id);; i = next(i)) {
      const Slot &slot = slots_[i];
      if (slot.id == id || slot.sequence == nullptr) return slot.sequence.get();
    }
  }

  // Afterwards that many can be inserted without any memory being sought.
  void make_room(int64_t num_sequences) {
    while ((size_ + static_cast<size_t>(num_sequences)) * 2 > slots_.size()) grow();
  }

  Sequence &insert(std::unique_ptr<Sequence> sequence) {
    make_room(1);
    Sequence &placed = *sequence;
    place(std::move(sequence));
    ++size_;
    return placed;
  }

  // Takes a sequence out of the map.
  std::unique_ptr<Sequence> take(int64_t id) {
    size_t hole = home(id);
    while (slots_[hole].id != id) hole = next(hole);
    std::unique_ptr<Sequence> taken = std::move(slots_[hole].sequence);
    slots_[hole] = Slot();
    --size_;
    for (size_t i = next(hole); slots_[i].sequence != nullptr && distance(i) > 0; i = next(i)) {
      slots_[hole] = std::exchange(slots_[i], Slot());
      hole = i;
    }
    return taken;
  }

  int64_t size() const { return static_cast<int64_t>(size_); }

  template <typename Visit>
  void for_each(Visit visit) const {
    for (const Slot &slot : slots_) {
      if (slot.sequence != nullptr) visit(*slot.sequence);
    }
  }

 private:
  static constexpr int64_t kNoId = -1;

  struct Slot {
    int64_t id = kNoId;
    std::unique_ptr<Sequence> sequence;
  };

  size_t home(int64_t id) const { return static_cast<size_t>(id) & (slots_.size() - 1); }
  size_t next(size_t i) const { return (i + 1) & (slots_.size() - 1); }

  // How far the sequence of a slot is from home.
  size_t distance(size_t i) const { return (i - home(slots_[i].id)) & (slots_.size() - 1); }

  void place(std::unique_ptr<Sequence> sequence) {
    Slot placed{sequence->id, std::move(sequence)};
    size_t i = home(placed.id);
    for (size_t far = 0; slots_[i].sequence != nullptr; i = next(i), ++far) {
      if (const size_t other = distance(i); other < far) {
        std::swap(placed, slots_[i]);
        far = other;
      }
    }
    slots_[i] = std::move(placed);
  }

  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    for (Slot &slot : old) {
      if (slot.sequence != nullptr) place(std::move(slot.sequence));
    }
  }

  std::vector<Slot> slots_;  // a power of two
  size_t size_ = 0;
};

// Sequences that are no longer in use, for the memory they have: memory that goes back to the system comes back page by
// page, which takes longer than all that is done with it.
class SpareSequences {
 public:
  SpareSequences() { spares_.reserve(kMostSpares); }  // now: a sequence is put here when it must not fail any more

  // A new sequence with room for so many tokens.
  std::unique_ptr<Sequence> take(size_t num_tokens, size_t num_blocks) {
    auto sequence = std::make_unique<Sequence>();
    if (!spares_.empty()) {
      sequence->tokens = std::move(spares_.back()->tokens);
      sequence->table = std::move(spares_.back()->table);
      spares_.pop_back();
      sequence->tokens.clear();
      sequence->table.clear();
    }
    sequence->tokens.reserve(num_tokens);
    sequence->table.reserve(num_blocks);
    return sequence;
  }

  void put(std::unique_ptr<Sequence> sequence) {
    if (spares_.size() == kMostSpares || sequence->tokens.capacity() > kMostTokens) return;
    spares_.push_back(std::move(sequence));
  }

 private:
  static constexpr size_t kMostSpares = 64;
  static constexpr size_t kMostTokens = size_t{1} << 16;  // of a spare, so 16 MiB in all

  std::vector<std::unique_ptr<Sequence>> spares_;
};

}  // namespace pagedattn::blocks
