// The keyed 128-bit hash that chains blocks of tokens into prefixes.
//
// A block's hash is a function of its parent block's hash and of its own tokens, so it names the whole prefix that ends
// in the block. Two 64-bit lanes absorb four tokens a round; a round is one 64x64 -> 128-bit multiplication a lane,
// folded to 64 bits. All of the secret key enters, so that nobody outside the process can aim prompts at one bucket.
// The hash only finds candidates: the pool compares tokens and parents before it serves a block, so a collision costs
// time and never correctness. A chain of blocks is bound by the latency of its multiplications; who walks it does other
// work beside it (see HashesAhead).
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

inline void absorb(Hash128 &state, const HashKey &key, uint64_t x, uint64_t y) {
  // The lanes take the words in opposite roles: an input that cancels in one lane does not cancel in the other.
  state.lo = fold_multiply(state.lo ^ x, y ^ key.words[2]);
  state.hi = fold_multiply(state.hi ^ y, x ^ key.words[3]);
}

inline Hash128 hash_bytes(const HashKey &key, Hash128 parent, const void *data, size_t num_bytes) {
  Hash128 state{parent.lo ^ key.words[0], parent.hi ^ key.words[1]};
  const auto *bytes = static_cast<const unsigned char *>(data);
  uint64_t pair[2];
  size_t left = num_bytes;
  for (; left >= sizeof(pair); left -= sizeof(pair), bytes += sizeof(pair)) {
    std::memcpy(pair, bytes, sizeof(pair));
    absorb(state, key, pair[0], pair[1]);
  }
  if (left > 0) {
    pair[0] = pair[1] = 0;
    std::memcpy(pair, bytes, left);
    absorb(state, key, pair[0], pair[1]);
  }
  // The length tells a padded tail from real zero bytes; each lane takes from the other.
  return {fold_multiply(state.lo ^ key.words[4], state.hi ^ num_bytes),
          fold_multiply(state.hi ^ key.words[5], ~state.lo)};
}

inline Hash128 hash_tokens(const HashKey &key, Hash128 parent, const int32_t *tokens, int64_t num_tokens) {
  return hash_bytes(key, parent, tokens, static_cast<size_t>(num_tokens) * sizeof(int32_t));
}

}  // namespace pagedattn::blocks
