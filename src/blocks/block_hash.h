// The keyed 128-bit hash that chains blocks of tokens into prefixes.
//
// A block's hash is a function of its parent block's hash and of its own tokens, so it names the whole prefix that ends
// in the block. It consists of two 64-bit lanes that know nothing of each other: each absorbs four tokens a round, with
// its own words of the secret key, by one 64x64 -> 128-bit multiplication folded to 64 bits. Nobody outside the process
// can aim prompts at one bucket. Both lanes together are a block's name; look-ups need the first one alone. It only
// finds candidates: the pool compares tokens and parents before it serves a block, so a collision costs time and never
// correctness.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pagedattn::blocks {

struct Hash128 {
  uint64_t lo = 0;
  uint64_t hi = 0;
  bool operator==(const Hash128 &) const = default;
};

struct HashKey {
  static constexpr int kNumWords = 6;
  uint64_t words[kNumWords] = {};
};

// SplitMix64: turns a small state into words without visible structure.
inline uint64_t next_word(uint64_t &state) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline HashKey key_from_seed(uint64_t seed) {
  HashKey key;
  for (uint64_t &word : key.words) word = next_word(seed);
  return key;
}

inline uint64_t fold_multiply(uint64_t a, uint64_t b) {
  __extension__ using uint128 = unsigned __int128;
  const uint128 product = static_cast<uint128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Which words of the key a lane takes. The lanes also take each pair of input words in opposite roles.
enum class Lane { kLow, kHigh };

template <Lane lane>
uint64_t hash_lane(const HashKey &key, uint64_t parent, const void *data, size_t num_bytes) {
  constexpr int kFirst = lane == Lane::kLow ? 0 : 3;
  const auto absorb = [&](uint64_t state, uint64_t x, uint64_t y) {
    return lane == Lane::kLow ? fold_multiply(state ^ x, y ^ key.words[kFirst + 1])
                              : fold_multiply(state ^ y, x ^ key.words[kFirst + 1]);
  };
  uint64_t state = parent ^ key.words[kFirst];
  const auto *bytes = static_cast<const unsigned char *>(data);
  uint64_t pair[2];
  size_t left = num_bytes;
  for (; left >= sizeof(pair); left -= sizeof(pair), bytes += sizeof(pair)) {
    std::memcpy(pair, bytes, sizeof(pair));
    state = absorb(state, pair[0], pair[1]);
  }
  if (left > 0) {
    pair[0] = pair[1] = 0;
    std::memcpy(pair, bytes, left);
    state = absorb(state, pair[0], pair[1]);
  }
  // The length tells a padded tail from real zero bytes.
  return fold_multiply(state, key.words[kFirst + 2] ^ num_bytes);
}

inline Hash128 hash_bytes(const HashKey &key, Hash128 parent, const void *data, size_t num_bytes) {
  return {hash_lane<Lane::kLow>(key, parent.lo, data, num_bytes),
          hash_lane<Lane::kHigh>(key, parent.hi, data, num_bytes)};
}

}  // namespace pagedattn::blocks
