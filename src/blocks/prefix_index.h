// The prefix cache's look-up table: from a hash to the published blocks that may have it.
//
// Open addressing in buckets of one cache line, 16 entries of 32 bits. The hash's upper bits choose the bucket; an
// entry is a block's number and, in the bits that numbers of this pool do not need, some of the lower bits of its hash:
// 13 bits in a pool of 200 000 blocks, so that a look-up of what is not there almost never has to look at a block. A
// full bucket overflows into the next one, and what was carried on is marked; an entry that leaves a full bucket lets
// those back in, so no tombstones pile up. At most 60 % of the entries are taken, 6.7 bytes a block.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "blocks/lazy_array.h"

namespace pagedattn::blocks {

constexpr int32_t kNone = -1;

class PrefixIndex {
 public:
  explicit PrefixIndex(int32_t num_blocks)
      : num_buckets_(num_blocks * int64_t{5} / (3 * kWidth) + 1),
        number_mask_((uint32_t{1} << std::bit_width(static_cast<uint32_t>(num_blocks))) - 1),
        entries_(num_buckets_ * kWidth) {}

  // The first block under this hash for which `is_it(block)` holds, or kNone.
  template <typename IsIt>
  int32_t find(uint64_t hash, IsIt is_it) const {
    for (int64_t bucket = home(hash);; bucket = next(bucket)) {
      for (uint32_t hits = matches(bucket, tag(hash)); hits != 0; hits &= hits - 1) {
        const int32_t block = block_of(entries_[bucket * kWidth + std::countr_zero(hits)]);
        if (is_it(block)) return block;
      }
      if (!full(bucket)) return kNone;
    }
  }

  // A block that probably has this hash, without looking at it, or kNone: what a caller prefetches.
  int32_t guess(uint64_t hash) const {
    const int64_t bucket = home(hash);
    const uint32_t hits = matches(bucket, tag(hash));
    return hits == 0 ? kNone : block_of(entries_[bucket * kWidth + std::countr_zero(hits)]);
  }

  void prefetch(uint64_t hash) const { entries_.prefetch(home(hash) * kWidth); }

  void insert(int32_t block, uint64_t hash) {
    int64_t bucket = home(hash);
    uint32_t entry = tag(hash) | (static_cast<uint32_t>(block) + 1);
    for (; full(bucket); bucket = next(bucket)) entry |= kCarried;
    entries_[bucket * kWidth + num_taken(bucket)] = entry;
  }

  // `hash_of(block)` is the hash of any block of the index.
  template <typename HashOf>
  void erase(int32_t block, uint64_t hash, HashOf hash_of) {
    const uint32_t entry = tag(hash) | (static_cast<uint32_t>(block) + 1);
    int64_t bucket = home(hash);
    uint32_t position;
    while ((position = equal(bucket, ~kCarried, entry)) == 0) bucket = next(bucket);
    bool was_full = full(bucket);
    close(bucket, std::countr_zero(position));
    // Past a full bucket there may be entries that found no place in it.
    for (int64_t other = next(bucket); was_full; other = next(other)) {
      const bool other_full = full(other);
      const int carried = carried_past(bucket, other, hash_of);
      if (carried != kWidth) {
        const uint32_t moved = entries_[other * kWidth + carried] & ~kCarried;
        const bool at_home = home(hash_of(block_of(moved))) == bucket;
        entries_[bucket * kWidth + kWidth - 1] = at_home ? moved : moved | kCarried;
        close(other, carried);
        bucket = other;
      }
      was_full = other_full;
    }
  }

  // Calls `visit(block, can_be_found)` for every entry.
  template <typename HashOf, typename Visit>
  void for_each(HashOf hash_of, Visit visit) const {
    for (int64_t i = 0; i < num_buckets_ * kWidth; ++i) {
      if (entries_[i] == 0) continue;
      const int32_t block = block_of(entries_[i]);
      const uint64_t hash = hash_of(block);
      int64_t bucket = home(hash);
      while (bucket != i / kWidth && full(bucket)) bucket = next(bucket);
      const bool packed = i % kWidth == 0 || entries_[i - 1] != 0;
      const uint32_t carried = home(hash) == bucket ? 0 : kCarried;
      visit(block, bucket == i / kWidth && packed && (entries_[i] & ~number_mask_) == (tag(hash) | carried));
    }
  }

 private:
  static constexpr int kWidth = static_cast<int>(kCacheLine / sizeof(uint32_t));
  static constexpr uint32_t kCarried = uint32_t{1} << 31;  // the entry is not in the bucket of its hash

  int64_t home(uint64_t hash) const {
    // The high half of hash x buckets spreads any number of buckets evenly, without a division.
    __extension__ using uint128 = unsigned __int128;
    return static_cast<int64_t>((static_cast<uint128>(hash) * static_cast<uint64_t>(num_buckets_)) >> 64);
  }
  int64_t next(int64_t bucket) const { return bucket + 1 == num_buckets_ ? 0 : bucket + 1; }
  uint32_t tag(uint64_t hash) const { return static_cast<uint32_t>(hash) & tag_mask(); }
  uint32_t tag_mask() const { return ~number_mask_ & ~kCarried; }
  int32_t block_of(uint32_t entry) const { return static_cast<int32_t>(entry & number_mask_) - 1; }
  bool full(int64_t bucket) const { return entries_[bucket * kWidth + kWidth - 1] != 0; }

  // A bit for each entry of the bucket that carries this tag.
  uint32_t matches(int64_t bucket, uint32_t tag) const {
    const uint32_t hits = equal(bucket, tag_mask(), tag);
    return tag != 0 ? hits : hits & ~equal(bucket, ~uint32_t{0}, 0);  // an entry that is free is no hit
  }

  // A bit for each entry of the bucket that is `wanted` under the mask.
  uint32_t equal(int64_t bucket, uint32_t mask, uint32_t wanted) const {
    const uint32_t *entries = &entries_[bucket * kWidth];
#ifdef __SSE2__
    const auto equal_four = [&](int i) {
      const __m128i four = _mm_load_si128(reinterpret_cast<const __m128i *>(entries) + i);
      return _mm_cmpeq_epi32(_mm_and_si128(four, _mm_set1_epi32(static_cast<int>(mask))),
                             _mm_set1_epi32(static_cast<int>(wanted)));
    };
    const __m128i low = _mm_packs_epi32(equal_four(0), equal_four(1));
    const __m128i high = _mm_packs_epi32(equal_four(2), equal_four(3));
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>((entries[i] & mask) == wanted) << i;
    return bits;
#endif
  }

  // Entries of a bucket are packed at its front.
  int num_taken(int64_t bucket) const { return std::countr_zero(equal(bucket, ~uint32_t{0}, 0) | 1u << kWidth); }

  void close(int64_t bucket, int position) {
    uint32_t *entries = &entries_[bucket * kWidth];
    const int last = num_taken(bucket) - 1;
    entries[position] = entries[last];
    entries[last] = 0;
  }

  // An entry of `other` whose home lies at `bucket` or before it, or kWidth.
  template <typename HashOf>
  int carried_past(int64_t bucket, int64_t other, HashOf hash_of) const {
    const int64_t distance = (other - bucket + num_buckets_) % num_buckets_;
    for (uint32_t marked = equal(other, kCarried, kCarried); marked != 0; marked &= marked - 1) {
      const int i = std::countr_zero(marked);
      const int64_t from = home(hash_of(block_of(entries_[other * kWidth + i])));
      if ((other - from + num_buckets_) % num_buckets_ >= distance) return i;
    }
    return kWidth;
  }

  int64_t num_buckets_;
  uint32_t number_mask_;
  LazyArray<uint32_t> entries_;  // 0 is no entry
};

}  // namespace pagedattn::blocks
