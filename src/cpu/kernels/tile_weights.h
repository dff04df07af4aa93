// Softmax for tile registers: from scores [key][lane] to weights in pairs of keys, in bfloat16.
//
// SPDX-License-Identifier: Apache-2.0
//
// What weights are relative to need not be the largest score, only near it: it rises when a score is kSlack above, so
// that sums are seldom rescaled.  Each row decides for itself, whatever rows lie beside it.
#pragma once

#include "kernels/softmax.h"

#if defined(PAGEDATTN_TILES)

namespace pagedattn::cpu::PAGEDATTN_ISA {

constexpr float kSlack = 8.0f;  // of exponents of 2: sums and weights have range to spare
constexpr int kVecsOfPanel = kMaxLanes / kWidth;

// 2**x to 7.5e-5, far below what bfloat16 rounds; exactly 0 of -infinity.
PA_INLINE Vec exp2_for_bfloat16(Vec x) {
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  // Minimax in relative error on [0, 1].
  Vec p = fma(broadcast(7.8024521e-2f), f, broadcast(2.2606716e-1f));
  p = fma(p, f, broadcast(6.9583356e-1f));
  p = fma(p, f, broadcast(9.9992520e-1f));
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// One score of each lane.
struct Scores {
  Vec lanes[kVecsOfPanel];
};

PA_KERNEL Scores largest_scores(const float *scores, int keys) {
  Scores largest;
  for (Vec &v : largest.lanes) v = broadcast(-kInfinity);
  for (int j = 0; j < keys; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecsOfPanel; ++v) {
      largest.lanes[v] = max(largest.lanes[v], load(scores + j * kMaxLanes + v * kWidth));
    }
  }
  return largest;
}

// Whether scores, once multiplied by `factor`, ask for a higher origin.
PA_INLINE bool asks_for_origin(const Scores &largest, float factor, const Online &online) {
  VecI above = {};
  for (int v = 0; v < kVecsOfPanel; ++v) above |= largest.lanes[v] * factor > load(online.max + v * kWidth) + kSlack;
  return any(above);
}

// Raises the origin of the rows that ask for it; what was accumulated is then to be multiplied by online.factor.
static void raise_origin(const Scores &largest, float factor, Online &online) {
  for (int v = 0; v < kVecsOfPanel; ++v) {
    const Vec before = load(online.max + v * kWidth);
    const Vec score = largest.lanes[v] * factor;
    const Vec after = score > before + kSlack ? score : before;
    const Vec factor_of_sums = exp2_nonpositive(before - (after == broadcast(-kInfinity) ? zero() : after));
    store(online.max + v * kWidth, after);
    store(online.sum + v * kWidth, load(online.sum + v * kWidth) * factor_of_sums);
    store(online.factor + v * kWidth, factor_of_sums);
  }
}

// Weights of scores [key][lane], once multiplied by `factor`, as pairs of keys [pair][lane]; and their sums.
PA_KERNEL void weigh_pairs(const float *scores, int keys, float factor, Online &online, float *pairs) {
  const Vec factors = broadcast(factor);
  Vec minus_origin[kVecsOfPanel], sum[kVecsOfPanel];
  for (int v = 0; v < kVecsOfPanel; ++v) {
    // While every score is -inf the weights are to be 0, not NaN.
    const Vec origin = load(online.max + v * kWidth);
    minus_origin[v] = origin == broadcast(-kInfinity) ? zero() : -origin;
    sum[v] = zero();  // of these keys alone, as small as what is added to it
  }
  for (int j = 0; j < keys; j += 2, scores += 2 * kMaxLanes, pairs += kMaxLanes) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecsOfPanel; ++v) {
      const Vec even = exp2_for_bfloat16(fma(load(scores + v * kWidth), factors, minus_origin[v]));
      const Vec odd = exp2_for_bfloat16(fma(load(scores + kMaxLanes + v * kWidth), factors, minus_origin[v]));
      sum[v] += even;
      sum[v] += odd;
      // Rounded to nearest, ties up; weights are no infinities, and NaN keeps a bit of its mantissa.
      const VecU low = (as_bits(even) + 0x8000u) >> 16, high = as_bits(odd) + 0x8000u;
      store_as(pairs + v * kWidth, low | (high & 0xffff0000u));
    }
  }
  for (int v = 0; v < kVecsOfPanel; ++v) store(online.sum + v * kWidth, load(online.sum + v * kWidth) + sum[v]);
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
