// The keyed 128-bit hash that chains blocks of tokens into prefixes.
//
// A block's hash is a function of its parent block's hash and of its own tokens, so it names the whole prefix that ends
// in the block. It consists of two 64-bit lanes that know nothing of each other, each with its own words of the secret
// key: nobody outside the process can aim prompts at one bucket. A lane multiplies the tokens pair by pair, all pairs
// at once, and only the last of its 64x64 -> 128-bit multiplications waits for the parent's hash: the blocks of a
// prompt are hashed side by side, not one after the other. Both lanes together are a block's name; look-ups need the
// first one alone. It only finds candidates: the pool compares tokens and parents before it serves a block, so a
// collision costs time and never correctness.
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
  static constexpr int kLaneWords = 11;
  static constexpr int kNumWords = 2 * kLaneWords;
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

enum class Lane { kLow, kHigh };

constexpr size_t kChunk = 64;  // bytes that a lane takes at once: a block of 16 tokens

inline uint64_t hash_chunk(const uint64_t *k, const void *chunk) {
  const auto pair = [&](int i) {
    uint64_t words[2];
    std::memcpy(words, static_cast<const unsigned char *>(chunk) + i * sizeof(uint64_t), sizeof(words));
    return fold_multiply(words[0] ^ k[i], words[1] ^ k[i + 1]);
  };
  return pair(0) ^ pair(2) ^ pair(4) ^ pair(6);
}

inline uint64_t hash_chunks(const uint64_t *k, const void *data, size_t num_bytes) {
  uint64_t state = num_bytes;  // which tells a padded tail from real zero bytes
  const auto *bytes = static_cast<const unsigned char *>(data);
  size_t left = num_bytes;
  for (; left >= kChunk; left -= kChunk, bytes += kChunk) state = fold_multiply(state, k[8]) ^ hash_chunk(k, bytes);
  if (left > 0) {
    unsigned char padded[kChunk] = {};
    std::memcpy(padded, bytes, left);
    state = fold_multiply(state, k[8]) ^ hash_chunk(k, padded);
  }
  return state;
}

template <Lane lane>
uint64_t hash_lane(const HashKey &key, uint64_t parent, const void *data, size_t num_bytes) {
  const uint64_t *k = key.words + (lane == Lane::kLow ? 0 : HashKey::kLaneWords);
  const uint64_t own = num_bytes == kChunk ? hash_chunk(k, data) : hash_chunks(k, data, num_bytes);
  return fold_multiply(parent ^ k[9], own ^ k[10]);
}

inline Hash128 hash_bytes(const HashKey &key, Hash128 parent, const void *data, size_t num_bytes) {
  return {hash_lane<Lane::kLow>(key, parent.lo, data, num_bytes),
          hash_lane<Lane::kHigh>(key, parent.hi, data, num_bytes)};
}

}  // namespace pagedattn::blocks
