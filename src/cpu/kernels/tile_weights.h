// Softmax for products of bfloat16: from scores [key][lane] to weights in pairs of keys, in parts of bfloat16.
//
// SPDX-License-Identifier: Apache-2.0
//
// What weights are relative to need not be the largest score, only near it: it rises when a score is kSlack above, so
// that sums are seldom rescaled.  Each row decides for itself, whatever rows lie beside it.
//
// The factor of scores is multiplied in and the origin subtracted at once, so that scores keep what float32 would
// round. But the origin is rounded: far from 0 a score's distance from itself would then be anything.  So far scores
// are multiplied first.
#pragma once

#include "kernels/softmax.h"
#include "kernels/tile_parts.h"

#if defined(PAGEDATTN_BFLOAT16_PRODUCTS)

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

// 2**x to 9e-8, which is the rounding of float32.
PA_INLINE Vec exp2_for_float32(Vec x) {
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  // Minimax in relative error on [0, 1]; the constant term is 1 so that 2**0 is exact.
  Vec p = fma(broadcast(1.8671302133e-3f), f, broadcast(9.0170300187e-3f));
  p = fma(p, f, broadcast(5.5799913321e-2f));
  p = fma(p, f, broadcast(2.4016445010e-1f));
  p = fma(p, f, broadcast(6.9315131181e-1f));
  p = fma(p, f, broadcast(1.0f));
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}
template <int kParts>
PA_INLINE Vec exp2_for_parts(Vec x) {
  return kParts == 1 ? exp2_for_bfloat16(x) : exp2_for_float32(x);
}

constexpr float kFarScore = 0x1p20f;  // whose last place is an eighth

PA_INLINE bool is_far(Vec score) {
  return any((VecI)(score > kFarScore) | ((VecI)(score < -kFarScore) & (VecI)(score > -kInfinity)));
}

// One score of each lane.
struct Scores {
  Vec lanes[kVecsOfPanel];
};

PA_KERNEL Scores largest_scores(const float *scores, int keys) {
  Scores largest;
  for (Vec &v : largest.lanes) v = broadcast(-kInfinity);
  for (int j = 0; j < keys; ++j) {
#pragma GCC unroll 3
    for (int v = 0; v < kVecsOfPanel; ++v) {
      largest.lanes[v] = max(largest.lanes[v], load(scores + j * kMaxLanes + v * kWidth));
    }
  }
  return largest;
}

PA_INLINE bool are_far(const Scores &largest, float factor) {
  bool far = false;
  for (int v = 0; v < kVecsOfPanel; ++v) far |= is_far(largest.lanes[v] * factor);
  return far;
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

// Makes scores [key][lane], once multiplied by `factor`, weights in pairs of keys, [32 keys][part][pair][lane], and
// sums them up.
template <int kParts>
class Weighing {
 public:
  __attribute__((always_inline)) Weighing(const float *scores, int keys, float factor, const Online &online,
                                          char *pairs)
      : scores_(scores), pairs_(pairs), pairs_left_(keys / 2), factors_(broadcast(factor)) {
#pragma GCC unroll 3
    for (int v = 0; v < kVecsOfPanel; ++v) {
      // While every score is -inf the weights are to be 0, not NaN.
      const Vec origin = load(online.max + v * kWidth);
      minus_origin_[v] = origin == broadcast(-kInfinity) ? zero() : -origin;
      sum_[v] = zero();  // of these keys alone, as small as what is added to it
    }
  }

  // The next two keys, if any are left.
  __attribute__((always_inline)) void next_pair() {
    if (pairs_left_ == 0) return;
#pragma GCC unroll 3
    for (int v = 0; v < kVecsOfPanel; ++v) {
      const Vec even = exp2_for_parts<kParts>(fma(load(scores_ + v * kWidth), factors_, minus_origin_[v]));
      const Vec odd = exp2_for_parts<kParts>(fma(load(scores_ + kMaxLanes + v * kWidth), factors_, minus_origin_[v]));
      sum_[v] += even;
      sum_[v] += odd;
      // Weights are no infinities, and NaN keeps a bit of its mantissa.
      const Depth<kParts> weights = split<kParts>(even, odd);
#pragma GCC unroll 3
      for (int p = 0; p < kParts; ++p) store_as(pairs_ + p * kRightBytes + v * 64, weights.part[p]);
    }
    scores_ += 2 * kMaxLanes;
    pairs_ += kPanelStride;
    --pairs_left_;
    if (pairs_left_ % kTileRows == 0) pairs_ += (kParts - 1) * kRightBytes;
  }

  // All that are left.
  __attribute__((always_inline)) void finish(Online &online) {
    while (pairs_left_ > 0) next_pair();
#pragma GCC unroll 3
    for (int v = 0; v < kVecsOfPanel; ++v) store(online.sum + v * kWidth, load(online.sum + v * kWidth) + sum_[v]);
  }

 private:
  const float *scores_;
  char *pairs_;
  int pairs_left_;
  Vec factors_, minus_origin_[kVecsOfPanel], sum_[kVecsOfPanel];
};

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
