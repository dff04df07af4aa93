// Softmax for few rows on tile registers: from scores [key][lane] to the left operands of products with values.
//
// SPDX-License-Identifier: Apache-2.0
//
// Weights are relative to a score near the largest, as in tile_weights.h, and become operands while they are in
// registers.  Their sum is as exact as float32, for the log-sum-exp.
#pragma once

#include "kernels/fetch.h"
#include "kernels/tile_weights.h"

#if defined(PAGEDATTN_TILES)

namespace pagedattn::cpu::PAGEDATTN_ISA {

// Of the lines that are fetched during weights and values, the latter's share, in parts of four: they take longer.
constexpr int kFetchShares = 4;
constexpr int kValuesShare = 3;

// Left operands for values as they lie, in which dimensions are pairs: weights of 16 keys, first [lane][key] in
// bfloat16 with a zero behind each, then the same with a zero before each.
struct SpreadWeights {
  static constexpr int kKeys = kTileRows;
  // Of 32 bits, up to those of a key that is a multiple of so many.
  static constexpr int offset(int key, int lanes) { return key * 2 * lanes; }

  // From weights [key][lane].
  template <int kLanes>
  PA_INLINE void put(Vec (&weights)[kLanes], uint32_t *dst) {
    rotate(weights, 4);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      // Rounded to nearest, ties up; weights are no infinities, and NaN keeps a bit of its mantissa.
      const VecU rounded = as_bits(weights[i]) + 0x8000u;
      store_as(dst + i * kWidth, rounded >> 16);
      store_as(dst + (kLanes + i) * kWidth, rounded & 0xffff0000u);
    }
  }
};

// Left operands for values in pairs of keys that are 16 apart: weights of 32 keys, [part][lane][pair].
template <int kParts>
struct PairedWeights {
  static constexpr int kKeys = 2 * kTileRows;
  static constexpr int offset(int key, int lanes) { return key / kKeys * kParts * lanes * kWidth; }

  template <int kVecs>
  PA_INLINE void put(Vec (&weights)[kVecs], uint32_t *dst) {
    constexpr int kLanes = kVecs / 2;
    Vec halves[2][kLanes];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) halves[h][i] = weights[h * kLanes + i];
      rotate(halves[h], 4);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const Depth<kParts> pairs = split<kParts>(halves[0][i], halves[1][i]);
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) store_as(dst + (p * kLanes + i) * kWidth, pairs.part[p]);
    }
  }
};

// A product rounded down, or almost: what it lacks is then no negative exponent of 2, of which the smallest would
// become a weight 1e-7 below 1.
PA_INLINE Vec product_below(Vec a, Vec b) {
  const Vec nearest = a * b;
  const Vec magnitude = as_float(as_bits(nearest) & 0x7fffffffu);
  return fma(a, b, -nearest) < 0.0f ? nearest - magnitude * 0x1p-23f : nearest;
}

// Raises the origin of the rows that ask for it; what was accumulated is then to be multiplied by online.factor.
// Returns whether there are such.
PA_INLINE bool raise_row_origin(Vec largest, Online &online) {
  const Vec before = load(online.max);
  const VecI higher = largest > before + kSlack;
  if (!any(higher)) return false;
  const Vec after = higher ? largest : before;
  const Vec factor = exp2_nonpositive(before - (after == broadcast(-kInfinity) ? zero() : after));
  store(online.max, after);
  store(online.sum, load(online.sum) * factor);
  store(online.factor, factor);
  return true;
}

// Scores of the keys [from, to), multiples of Operands::kKeys, once multiplied by `scale`: to weights as operands, and
// in place if `keep`.  Returns whether the origin rose.
template <class Operands, int kLanes, class T>
PA_KERNEL bool weigh_rows(float *s, int from, int to, float scale, int head_dim, Online &online, uint32_t *operands,
                          bool keep, Fetch<T> &fetch) {
  constexpr int kVecs = kLanes * Operands::kKeys / kWidth;
  Vec scales = broadcast(scale);
  // Of every fourth vector by itself: a maximum waits for the one before it longer than for its vector.
  constexpr int kChains = kVecs < 4 ? kVecs : 4;
  Vec largest[kChains];
  for (Vec &v : largest) v = broadcast(-kInfinity);
  for (int i = from * kLanes; i < to * kLanes; i += kChains * kWidth) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) largest[c] = max(largest[c], load(s + i + c * kWidth));
  }
  for (int c = 1; c < kChains; ++c) largest[0] = max(largest[0], largest[c]);
  Vec score = max_over_keys(largest[0], kLanes);
  if (is_far(score * scales)) {
    scale_scores(s + from * kLanes, (to - from) * kLanes, scale);
    score *= scales;
    scales = broadcast(1.0f);
  }
  const bool rose = raise_row_origin(product_below(score, scales), online);
  // While every score is -inf the weights are to be 0, not NaN.
  const Vec origin = load(online.max);
  const Vec minus_origin = origin == broadcast(-kInfinity) ? zero() : -origin;
  Vec sum = zero();  // of these keys alone, as small as what is added to it
  for (int j = from; j < to; j += Operands::kKeys) {
    fetch.lines(Operands::kKeys * fetch.lines_of_row(head_dim) * (kFetchShares - kValuesShare) / kFetchShares);
    Vec weights[kVecs];
#pragma GCC unroll 32
    for (int i = 0; i < kVecs; ++i) {
      float *const x = s + j * kLanes + i * kWidth;
      weights[i] = exp2_for_float32(fma(load(x), scales, minus_origin));
      if (keep) store(x, weights[i]);
      sum += weights[i];
    }
    Operands::put(weights, operands + Operands::offset(j, kLanes));
  }
  store(online.sum, load(online.sum) + sum);
  return rose;
}

// Operands of the keys [begin, end) alone, with zeros for others in [from, to).
template <class Operands, int kLanes>
static void keep_weights(float *s, int from, int to, int begin, int end, uint32_t *operands) {
  constexpr int kVecs = kLanes * Operands::kKeys / kWidth;
  if (begin > end) begin = end;
  __builtin_memset(s + from * kLanes, 0, static_cast<size_t>((begin - from) * kLanes) * sizeof(float));
  __builtin_memset(s + end * kLanes, 0, static_cast<size_t>((to - end) * kLanes) * sizeof(float));
  for (int j = from; j < to; j += Operands::kKeys) {
    Vec weights[kVecs];
    for (int i = 0; i < kVecs; ++i) weights[i] = load(s + j * kLanes + i * kWidth);
    Operands::put(weights, operands + Operands::offset(j, kLanes));
  }
}

// Sums of one head, [head_dim / 16][lane][16].
static void rescale_rows(float *sums, int head_dim, int lanes, const float *factor) {
  for (int d = 0; d < head_dim; d += kWidth) {
    for (int lane = 0; lane < lanes; ++lane, sums += kWidth) store(sums, load(sums) * broadcast(factor[lane]));
  }
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
