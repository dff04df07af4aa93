// Pairs of block numbers, verified and packed for who moves the blocks.
//
// SPDX-License-Identifier: Apache-2.0
//
// In chunks, so that what one step has written the next one finds in the nearest cache: vectors verify and pack, then
// seconds are marked one by one.  The memory of packed pairs has been out of use for long, and a line must come near
// before it is written to: so lines are asked for some chunks ahead.
#pragma once

#include "kernels/simd.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

constexpr int64_t kPairChunk = 128;
constexpr int64_t kPairsAhead = 4 * kPairChunk;

typedef uint64_t VecU64 __attribute__((vector_size(kWidth * 4)));

// Numbers that share 64 bits: firsts of pairs, or the seconds of the same pairs in the 64 bits behind.
template <class Number>
constexpr int64_t kPacked = 8 / sizeof(Number);

// Packs pairs in groups, each as many vectors of numbers as one vector has room for when they are packed.  A number
// outside of 0 ... last has its highest bit set, or last less it has: so one loop without an exit finds any.
template <class Number>
PA_KERNEL bool pack_chunk(const int64_t *pairs, int64_t num_pairs, int64_t num_first, int64_t num_second,
                          Number *packed) {
  constexpr int64_t kLanes = kWidth / 2, kGroup = kPacked<Number> * kLanes / 2;  // of pairs
  const uint64_t last[2] = {static_cast<uint64_t>(num_first - 1), static_cast<uint64_t>(num_second - 1)};
  VecU64 lasts = {}, signs = {};
  for (int64_t lane = 0; lane < kLanes; ++lane) lasts[lane] = last[lane % 2];
  int64_t i = 0;
  for (; i + kGroup <= num_pairs; i += kGroup) {
    VecU64 group = {};
    for (int64_t k = 0; k < kPacked<Number>; ++k) {
      const VecU64 numbers = load_as<VecU64>(pairs + 2 * i + k * kLanes);
      signs |= numbers | (lasts - numbers);
      group |= numbers << (8 * sizeof(Number) * k);
    }
    store_as(packed + 2 * i, group);
  }
  uint64_t all = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) all |= signs[lane];
  for (; i < num_pairs; ++i) {
    Number *const group = packed + 2 * (i - i % kPacked<Number>)+i % kPacked<Number>;
    for (int64_t side = 0; side < 2; ++side) {
      const uint64_t number = static_cast<uint64_t>(pairs[2 * i + side]);
      all |= number | (last[side] - number);
      group[side * kPacked<Number>] = static_cast<Number>(number);
    }
  }
  return all >> 63 == 0;
}

// Whether one of the seconds had been marked before, or stands twice.
template <class Number>
PA_KERNEL bool mark_seconds(const Number *packed, int64_t num_pairs, uint8_t *marks) {
  uint8_t marked = 0;
  const auto mark = [&](Number second) {
    marked |= marks[second];
    marks[second] = 1;
  };
  int64_t i = 0;
  for (; i + kPacked<Number> <= num_pairs; i += kPacked<Number>) {
    for (int64_t k = 0; k < kPacked<Number>; ++k) mark(packed[2 * i + kPacked<Number> + k]);
  }
  for (int64_t k = 0; i + k < num_pairs; ++k) mark(packed[2 * i + kPacked<Number> + k]);
  return marked != 0;
}

template <class Number>
static bool take_pairs_as(const int64_t *pairs, int64_t num_pairs, int64_t num_first, int64_t num_second,
                          Number *packed, uint8_t *marks) {
  Number nobodys[2 * kPairChunk];
  const auto ask_for = [&](int64_t from, int64_t to) {
    constexpr int64_t kLine = 64 / (2 * sizeof(Number));  // pairs
    for (int64_t i = from; packed != nullptr && i < to && i < num_pairs; i += kLine) {
      __builtin_prefetch(packed + 2 * i, 1, 3);
    }
  };
  ask_for(0, kPairsAhead);
  for (int64_t begin = 0; begin < num_pairs; begin += kPairChunk) {
    ask_for(begin + kPairsAhead, begin + kPairsAhead + kPairChunk);
    const int64_t count = num_pairs - begin < kPairChunk ? num_pairs - begin : kPairChunk;
    Number *const chunk = packed == nullptr ? nobodys : packed + 2 * begin;
    if (!pack_chunk(pairs + 2 * begin, count, num_first, num_second, chunk)) return false;
    if (marks != nullptr && mark_seconds(chunk, count, marks)) return false;
  }
  return true;
}

static bool take_pairs(const int64_t *pairs, int64_t num_pairs, int64_t num_first, int64_t num_second, void *packed,
                       int number_bytes, uint8_t *marks) {
  if (number_bytes == 2) {
    return take_pairs_as(pairs, num_pairs, num_first, num_second, static_cast<uint16_t *>(packed), marks);
  }
  return take_pairs_as(pairs, num_pairs, num_first, num_second, static_cast<uint32_t *>(packed), marks);
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
