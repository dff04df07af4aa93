// The two products of attention in vectors of pairs of bfloat16, for a panel of 48 query rows.
//
// SPDX-License-Identifier: Apache-2.0
//
// S^T = K Q^T and O^T += V^T P^T, with query rows in the lanes.  One instruction (VDPBF16PS) adds the products of two
// bfloat16 to each lane's sum, at the rate of a multiply-add of float32 on AMD's processors: twice the arithmetic.  So
// one operand stands in pairs, [pair][lane]: of dimensions for queries, of keys for weights.  The other one is
// broadcast pair by pair: keys as they lie, values joined in pairs of keys.
//
// kRowsAtOnce x 3 vectors of sums stay in registers: 24 products for 3 loads and 8 broadcasts, 12 cycles on Zen 5,
// where both products together reach 0.9 of what the multiplier gives.
//
// Of bfloat16 subnormal ones count as zero, as in tile registers.
#pragma once

#include "kernels/fetch.h"
#include "kernels/tile_parts.h"

#if defined(PAGEDATTN_BFLOAT16_PRODUCTS) && !defined(PAGEDATTN_TILES)

namespace pagedattn::cpu::PAGEDATTN_ISA {

constexpr int kRowsAtOnce = 8;  // keys, or dimensions of values
constexpr int kUnitKeys = kRowsAtOnce;
static_assert(kMaxLanes == 3 * kWidth);

// Bytes from the values of kRowsAtOnce dimensions to the next, [pair of keys][kRowsAtOnce]: a line more than they take,
// since what one pair writes would otherwise fall on a few sets of L1.
template <int kParts>
constexpr int64_t kValueStride = kMaxChunkKeys / 2 * kRowsAtOnce * 4 + 64;

PA_INLINE Vec add_products(Vec sum, VecU a, VecU b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// sum[i] += pair(i, n) * lanes[n], over n.
template <class Pair>
PA_INLINE void multiply_pairs(Vec (&sum)[kRowsAtOnce][3], const char *lanes, int count, Pair pair) {
  for (int n = 0; n < count; ++n, lanes += kPanelStride) {
    VecU row[3];
#pragma GCC unroll 3
    for (int c = 0; c < 3; ++c) row[c] = load_as<VecU>(lanes + 64 * c);
#pragma GCC unroll 8
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const VecU x = VecU{} + load_as<uint32_t>(pair(i, n));
#pragma GCC unroll 3
      for (int c = 0; c < 3; ++c) sum[i][c] = add_products(sum[i][c], x, row[c]);
    }
  }
}

PA_INLINE void store_sums(char *p, const Vec (&sum)[kRowsAtOnce][3]) {
#pragma GCC unroll 8
  for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma GCC unroll 3
    for (int c = 0; c < 3; ++c) store_as(p + i * kPanelStride + 64 * c, sum[i][c]);
  }
}

// Scores of kRowsAtOnce keys, `row_bytes` apart.
PA_KERNEL void pair_scores(const char *q, const char *keys, int64_t row_bytes, int pairs, char *scores) {
  const char *key[kRowsAtOnce];
  for (int i = 0; i < kRowsAtOnce; ++i) key[i] = keys + i * row_bytes;
  Vec sum[kRowsAtOnce][3] = {};
  multiply_pairs(sum, q, pairs, [&](int i, int n) __attribute__((always_inline)) { return key[i] + 4 * n; });
  store_sums(scores, sum);
}

// Adds to kRowsAtOnce dimensions of acc the products of pairs of keys.
PA_KERNEL void pair_values(char *acc, bool first, const char *weights, const char *values, int pairs) {
  Vec sum[kRowsAtOnce][3] = {};
  if (!first) {
#pragma GCC unroll 8
    for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma GCC unroll 3
      for (int c = 0; c < 3; ++c) sum[i][c] = load_as<Vec>(acc + i * kPanelStride + 64 * c);
    }
  }
  multiply_pairs(sum, weights, pairs,
                 [&](int i, int n) __attribute__((always_inline)) { return values + (n * kRowsAtOnce + i) * 4; });
  store_sums(acc, sum);
}

// Scores [key][lane] of a multiple of kRowsAtOnce keys [key][dimension], with queries [pair of dimensions][lane].
template <int kParts, class Beside>
PA_INLINE void multiply_keys(const char *q, const char *keys, int dims, int num_keys, char *scores, Beside) {
  for (int j = 0; j < num_keys; j += kRowsAtOnce) {
    pair_scores(q, keys + int64_t{2} * j * dims, int64_t{2} * dims, dims / 2, scores + j * kPanelStride);
  }
}

// Adds to acc [dimension][lane] the products of a multiple of kRowsAtOnce keys, with weights [pair of keys][lane].
template <int kParts>
static void multiply_values(char *acc, bool first, const char *weights, const char *values, int64_t stride, int dims,
                            int num_keys) {
  for (int d = 0; d < dims; d += kRowsAtOnce, values += stride) {
    pair_values(acc + d * kPanelStride, first, weights, values, num_keys / 2);
  }
}

// Keys as they lie, with zeros behind their ends and behind the last one.
template <class T, int kParts, bool kAsTheyLie>
static void pack_keys(const typename T::Storage *k, const TileKeys &chunk, int head_dim, char *keys, Range &) {
  static_assert(kParts == 1 && kAsTheyLie);
  const int64_t row_bytes = 2 * round_up(head_dim, kTileDepth);
  for (int j = 0; j < round_up(chunk.count, kRowsAtOnce); ++j, keys += row_bytes) {
    for (int d = 0; d < head_dim; d += kTileDepth) {
      VecU part = {};
      if (j < chunk.count) {
        const auto *src = k + chunk.k[j] + d;
        if (head_dim - d >= kTileDepth) {
          part = load_as<VecU>(src);
        } else {
          __builtin_memcpy(&part, src, static_cast<size_t>(head_dim - d) * 2);
        }
      }
      store_as(keys + 2 * d, part);
    }
  }
}

// Up to kWidth bfloat16 as integers, zeros behind them.
PA_INLINE VecU load_codes(const uint16_t *p, int left) {
  if (left >= kWidth) return widen(load_as<VecU16>(p));
  VecU16 padded = {};
  __builtin_memcpy(&padded, p, static_cast<size_t>(left) * sizeof(*p));
  return widen(padded);
}

// Values as [kRowsAtOnce dimensions][pair of keys][kRowsAtOnce]; zeros for odd keys and behind the last one.
template <class T, int kParts>
static void pack_values(const typename T::Storage *v, const TileKeys &chunk, int head_dim, const bool *odd,
                        char *values, Range &) {
  static_assert(kParts == 1 && kWidth == 2 * kRowsAtOnce);
  const auto dims = static_cast<int>(round_up(head_dim, kTileDepth));
  for (int j = 0; j < round_up(chunk.count, kRowsAtOnce); j += 2) {
    const auto value = [&](int key, int d) __attribute__((always_inline)) {
      if (key >= chunk.count || odd[key] || d >= head_dim) return VecU{};
      return load_codes(v + chunk.v[key] + d, head_dim - d);
    };
    char *to = values + j / 2 * kRowsAtOnce * 4;
    for (int d = 0; d < dims; d += kWidth, to += 2 * kValueStride<kParts>) {
      const VecU pairs = value(j, d) | (value(j + 1, d) << 16);
      const char *const halves = reinterpret_cast<const char *>(&pairs);
      __builtin_memcpy(to, halves, 32);
      __builtin_memcpy(to + kValueStride<kParts>, halves + 32, 32);
    }
  }
}

// Where the values of an even number of keys lie.
template <int kParts>
PA_INLINE const char *values_from(const char *values, int key) {
  return values + key / 2 * kRowsAtOnce * 4;
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
