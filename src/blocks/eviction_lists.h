// The evictable blocks, in a list for each priority, in the order in which they will be evicted.
//
// A list is a chain of chunks of one cache line, with up to 13 blocks each. So whoever evicts knows which blocks follow
// without having to wait for memory at each, as in a list of single blocks, and what it will need of them is on its
// way. A block that is wanted again leaves a gap; neighbours that have no more blocks together than one can hold
// become one, so that chunks are half full at least. There are few more chunks than full ones would be: where all of
// them are in use, blocks move up into the gaps before them, list after list, until that has emptied one. So a block
// takes 5.05 bytes here whatever the gaps, and a priority in use 64.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>

#include "blocks/prefix_index.h"

namespace pagedattn::blocks {

class EvictionLists {
 public:
  static constexpr int kNumPriorities = 256;  // int8

  explicit EvictionLists(int32_t num_blocks)
      : most_chunks_(num_blocks / kWidth + num_blocks / 500 + 1), chunks_(most_chunks_ + kNumPriorities) {}

  // Makes a block the last one to be evicted of its priority. Its chunk, by which it is found again, is noted in
  // `chunk_of`, that of others too where they move.
  void push(int32_t block, int8_t priority, LazyArray<int32_t> &chunk_of) {
    List &list = lists_[index(priority)];
    if (list.tail_used == kWidth && no_chunk_left(list)) empty_a_chunk(chunk_of);
    if (list.tail_used == kWidth) append_chunk(list, index(priority));
    chunks_[list.tail].entries[list.tail_used++] = block + 1;
    chunk_of[block] = list.tail;
  }

  // Takes a block out of its chunk.
  void take(int32_t block, int8_t priority, LazyArray<int32_t> &chunk_of) {
    List &list = lists_[index(priority)];
    const int32_t at = chunk_of[block];
    Chunk &chunk = chunks_[at];
    *std::find(chunk.entries, chunk.entries + kWidth, block + 1) = 0;
    ++chunk.num_gaps;
    if (num_blocks(list, at) == 0) {
      remove_chunk(list, at);
    } else if (fit_together(list, at, chunk.after)) {
      fill_up(list, at, chunk_of);
    } else if (fit_together(list, chunk.before, at)) {
      fill_up(list, chunk.before, chunk_of);
    }
  }

  // Takes out the `n` blocks that are to be evicted first; there must be as many.
  void pop(int64_t n, int32_t *out) {
    for (int64_t taken = 0; taken < n;) {
      List &list = lists_[lowest()];
      const int32_t at = list.head;
      Chunk &chunk = chunks_[at];
      if (chunk.after != kNone) chunks_.prefetch_for_writing(chunk.after);
      int i = list.head_passed;
      for (; taken < n && i < kWidth; ++i) {
        if (chunk.entries[i] == 0) continue;
        out[taken++] = std::exchange(chunk.entries[i], 0) - 1;
        ++chunk.num_gaps;
      }
      list.head_passed = i;
      if (num_blocks(list, at) == 0) remove_chunk(list, at);
    }
  }

  // Calls `visit(block)` for blocks that are to be evicted next, as far as they are at hand.
  template <typename Visit>
  void peek(Visit visit) const {
    if ((occupied_[0] | occupied_[1] | occupied_[2] | occupied_[3]) == 0) return;
    const List &list = lists_[lowest()];
    for (int i = list.head_passed; i < kWidth; ++i) {
      if (const int32_t entry = chunks_[list.head].entries[i]; entry != 0) visit(entry - 1);
    }
  }

  // Calls `visit(block, priority, chunk)` for every block in the order of eviction; what is wrong, or nullptr.
  template <typename Visit>
  const char *for_each(Visit visit) const {
    int32_t num_chunks = 0;
    for (int p = 0; p < kNumPriorities; ++p) {
      const List &list = lists_[p];
      int32_t before = kNone;
      for (int32_t at = list.head; at != kNone; before = at, at = chunks_[at].after) {
        if (at < 0 || at >= next_unused_ || ++num_chunks > next_unused_) return "an eviction list is torn";
        const Chunk &chunk = chunks_[at];
        if (chunk.before != before || chunk.list != p) return "an eviction list is torn";
        int counted = 0;
        for (int i = 0; i < kWidth; ++i) {
          if (chunk.entries[i] == 0) continue;
          if (at == list.head && i < list.head_passed) return "an eviction list begins before its beginning";
          if (at == list.tail && i >= list.tail_used) return "an eviction list goes on behind its end";
          ++counted;
          visit(chunk.entries[i] - 1, static_cast<int8_t>(p - 128), at);
        }
        if (counted == 0 || counted != num_blocks(list, at)) return "a part of an eviction list is miscounted";
      }
      if (list.tail != before) return "an eviction list has lost its tail";
      if (((occupied_[p / 64] >> (p % 64) & 1) != 0) != (list.head != kNone)) return "an eviction list is misfiled";
    }
    for (int32_t at = free_top_; at != kNone; at = chunks_[at].after) {
      if (++num_chunks > next_unused_) return "a part of an eviction list is free twice";
    }
    return num_chunks == next_unused_ ? nullptr : "a part of an eviction list has leaked";
  }

 private:
  static constexpr int kWidth = 13;

  struct Chunk {
    int32_t before;
    int32_t after;
    int16_t num_gaps;  // where a block was
    int16_t list;
    int32_t entries[kWidth];  // blocks plus one; 0: none
  };
  static_assert(sizeof(Chunk) == kCacheLine);

  struct List {
    int32_t head = kNone;
    int32_t tail = kNone;
    int32_t head_passed = 0;     // entries of the head that are known to be gaps
    int32_t tail_used = kWidth;  // entries of the tail; others have been filled once, as is one that there is not
  };

  // The lowest priority that a block has.
  int lowest() const {
    int word = 0;
    while (occupied_[word] == 0) ++word;
    return word * 64 + std::countr_zero(occupied_[word]);
  }

  static int index(int8_t priority) { return priority + 128; }

  int num_blocks(const List &list, int32_t at) const {
    return (at == list.tail ? list.tail_used : kWidth) - chunks_[at].num_gaps;
  }

  // Every list that is in use may have a chunk of its own, however few blocks there are.
  bool no_chunk_left(const List &list) const {
    int num_lists = list.head == kNone ? 1 : 0;
    for (const uint64_t word : occupied_) num_lists += std::popcount(word);
    return free_top_ == kNone && next_unused_ >= most_chunks_ + num_lists;
  }

  void mark(int list, bool occupied) {
    const uint64_t bit = uint64_t{1} << (list % 64);
    occupied_[list / 64] = occupied ? occupied_[list / 64] | bit : occupied_[list / 64] & ~bit;
  }

  void append_chunk(List &list, int number) {
    int32_t at = free_top_;
    if (at != kNone) {
      free_top_ = chunks_[at].after;
    } else {
      at = next_unused_++;
    }
    chunks_[at] = {list.tail, kNone, 0, static_cast<int16_t>(number), {}};
    (list.tail == kNone ? list.head : chunks_[list.tail].after) = at;
    list.tail = at;
    list.tail_used = 0;
    mark(number, true);
  }

  void remove_chunk(List &list, int32_t at) {
    Chunk &chunk = chunks_[at];
    if (at == list.head) list.head_passed = 0;
    if (at == filling_) filling_ = chunk.after;
    (chunk.before == kNone ? list.head : chunks_[chunk.before].after) = chunk.after;
    if (chunk.after == kNone) {
      list.tail = chunk.before;
      list.tail_used = kWidth;
    } else {
      chunks_[chunk.after].before = chunk.before;
    }
    chunk.after = free_top_;
    free_top_ = at;
    if (list.head == kNone) mark(chunk.list, false);
  }

  bool fit_together(const List &list, int32_t at, int32_t after) const {
    return at != kNone && after != kNone && num_blocks(list, at) + num_blocks(list, after) <= kWidth;
  }

  // A chunk closes its gaps and takes over blocks of the next one, which goes where it has no more.
  void fill_up(List &list, int32_t at, LazyArray<int32_t> &chunk_of) {
    Chunk &chunk = chunks_[at];
    const int32_t other = chunk.after;
    Chunk &next = chunks_[other];
    int32_t *end = std::remove(chunk.entries, chunk.entries + kWidth, 0);
    for (int i = 0; i < kWidth && end < chunk.entries + kWidth; ++i) {
      if (next.entries[i] == 0) continue;
      chunk_of[next.entries[i] - 1] = at;
      *end++ = std::exchange(next.entries[i], 0);
      ++next.num_gaps;
    }
    std::fill(end, chunk.entries + kWidth, 0);
    const auto used = static_cast<int32_t>(end - chunk.entries);
    if (num_blocks(list, other) == 0) remove_chunk(list, other);
    if (at == list.tail) list.tail_used = used;
    if (at == list.head) list.head_passed = 0;
    chunk.num_gaps = static_cast<int16_t>(at == list.tail ? 0 : kWidth - used);
  }

  // Goes on where it has stopped: each gap is closed once, and a call takes as long as the gaps lie apart. It ends, as
  // a list whose chunks have all been filled has no more of them than its blocks need, and some list has more.
  void empty_a_chunk(LazyArray<int32_t> &chunk_of) {
    for (int list = 0; free_top_ == kNone;) {
      if (filling_ == kNone) {
        filling_ = lists_[list].head;
        list = (list + 1) % kNumPriorities;
      } else if (const int32_t after = chunks_[filling_].after; after == kNone) {
        list = (chunks_[filling_].list + 1) % kNumPriorities;
        filling_ = kNone;
      } else {
        fill_up(lists_[chunks_[filling_].list], filling_, chunk_of);
        if (free_top_ == kNone) filling_ = after;
      }
    }
  }

  int64_t most_chunks_;
  LazyArray<Chunk> chunks_;
  List lists_[kNumPriorities];
  uint64_t occupied_[4] = {};  // a bit for each list that is not empty
  int32_t filling_ = kNone;    // the chunk at which `empty_a_chunk` goes on
  int32_t next_unused_ = 0;
  int32_t free_top_ = kNone;  // the chunks that are in no list, by `after`
};

}  // namespace pagedattn::blocks
