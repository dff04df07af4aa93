// Online softmax over the scores of a tile, [key][lane].
//
// SPDX-License-Identifier: Apache-2.0
//
// ALiBi's slope * (j - i) is applied relative to the visible key where it is largest, since softmax does not see a
// shift of a whole row: no precision is lost to large distances.  The shift comes back in the log-sum-exp.
#pragma once

#include "kernels/attention_state.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

alignas(64) static constexpr float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The key relative to which a row's ALiBi bias is taken.
PA_INLINE int64_t alibi_reference(const State &state, int64_t row, float slope) {
  return slope >= 0.0f ? state.visible_end[row] - 1 : state.visible_begin[row];
}

// Vectors of a panel's scores, and keys that one of them holds.
PA_INLINE int vecs_of(const Panel &panel) { return panel.lanes < kWidth ? 1 : panel.lanes / kWidth; }
PA_INLINE int keys_of_vec(const Panel &panel) { return panel.lanes < kWidth ? kWidth / panel.lanes : 1; }

static void cap_scores(float *s, int num, float softcap) {
  const Vec factor = broadcast(softcap * kLog2e);
  for (int i = 0; i < num; i += kWidth) store(s + i, tanh(load(s + i)) * factor);
}

static void bias_scores(const AttentionParams &params, const AttentionWork &work, const State &state,
                        const TileKeys &tile, const Panel &panel, int64_t head, int from, int to, float *s) {
  const int vecs = vecs_of(panel), keys = keys_of_vec(panel);
  alignas(64) float slope2[kMaxLanes], distance[kMaxLanes];  // of the tile's first key to the reference
  for (int lane = 0; lane < vecs * kWidth; ++lane) {
    const int row = lane % panel.lanes;
    const int64_t at = panel.first + (row < panel.rows ? row : panel.rows - 1);
    const float slope = params.alibi_slopes[query_row(state, work, head, at).head];
    slope2[lane] = slope * kLog2e;
    distance[lane] = static_cast<float>(tile.first - alibi_reference(state, at, slope) + lane / panel.lanes);
  }
  for (int step = from; step < to; ++step) {
    for (int v = 0; v < vecs; ++v) {
      float *x = s + (step * vecs + v) * kWidth;
      const Vec key = broadcast(static_cast<float>(step * keys));
      store(x, fma(load(distance + v * kWidth) + key, load(slope2 + v * kWidth), load(x)));
    }
  }
}

static void mask_scores(const Panel &panel, int from, int to, float *s) {
  const int vecs = vecs_of(panel), keys = keys_of_vec(panel);
  alignas(64) int32_t key_of_lane[kMaxLanes];
  for (int lane = 0; lane < vecs * kWidth; ++lane) key_of_lane[lane] = lane / panel.lanes;
  for (int step = from; step < to; ++step) {
    for (int v = 0; v < vecs; ++v) {
      float *x = s + (step * vecs + v) * kWidth;
      VecI key = VecI{} + step * keys;
      if (keys > 1) key += load_as<VecI>(key_of_lane);
      const VecI seen =
          (key >= load_as<VecI>(panel.begin + v * kWidth)) & (key < load_as<VecI>(panel.end + v * kWidth));
      store(x, seen ? load(x) : broadcast(-kInfinity));
    }
  }
}

// Joins lanes that are `lanes` apart, so that each holds what all of its row do.
PA_INLINE Vec max_over_keys(Vec v, int lanes) {
#if defined(__AVX512F__)
  // Not through memory, which would wait for two stores to be one load.
  if (lanes <= 8) v = max(v, (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, _MM_SHUFFLE(1, 0, 3, 2)));
  if (lanes <= 4) v = max(v, (Vec)_mm512_shuffle_f32x4((__m512)v, (__m512)v, _MM_SHUFFLE(2, 3, 0, 1)));
  if (lanes <= 2) v = max(v, (Vec)_mm512_permute_ps((__m512)v, _MM_SHUFFLE(1, 0, 3, 2)));
  if (lanes <= 1) v = max(v, (Vec)_mm512_permute_ps((__m512)v, _MM_SHUFFLE(2, 3, 0, 1)));
#else
  for (int step = lanes; step < kWidth; step *= 2) {
    float twice[2 * kWidth];
    store(twice, v);
    store(twice + kWidth, v);
    v = max(v, load(twice + step));
  }
#endif
  return v;
}

// Turns scores into weights relative to the rows' new maxima.  Returns whether a maximum rose, so that what was
// accumulated is to be multiplied by online.factor.
template <int kVecs>
static bool weigh_scores(int lanes, int from, int to, float *s, Online &online) {
  Vec largest[kVecs];
  for (int v = 0; v < kVecs; ++v) largest[v] = broadcast(-kInfinity);
  for (int step = from; step < to; ++step) {
    for (int v = 0; v < kVecs; ++v) largest[v] = max(largest[v], load(s + (step * kVecs + v) * kWidth));
  }
  if (lanes < kWidth) largest[0] = max_over_keys(largest[0], lanes);
  bool rose = false;
  Vec origin[kVecs], earlier[kVecs], sum[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const Vec before = load(online.max + v * kWidth);
    const Vec after = max(before, largest[v]);
    // While every score is -inf the weights are to be 0, not NaN.
    origin[v] = after == broadcast(-kInfinity) ? zero() : after;
    const Vec factor = exp2_nonpositive(before - origin[v]);
    rose |= any(after > before);
    earlier[v] = load(online.sum + v * kWidth) * factor;
    sum[v] = zero();  // of this tile alone, as small as what is added to it
    store(online.max + v * kWidth, after);
    store(online.factor + v * kWidth, factor);
  }
  for (int step = from; step < to; ++step) {
    for (int v = 0; v < kVecs; ++v) {
      float *x = s + (step * kVecs + v) * kWidth;
      const Vec weight = exp2_nonpositive(load(x) - origin[v]);
      store(x, weight);
      sum[v] += weight;
    }
  }
  for (int v = 0; v < kVecs; ++v) store(online.sum + v * kWidth, earlier[v] + sum[v]);
  return rose;
}

static void scale_scores(float *s, int num, float scale) {
  for (int i = 0; i < num; i += kWidth) store(s + i, load(s + i) * scale);
}

// What stands between products and softmax, for the keys of the vectors [from, to) of one panel and head: scale,
// softcap, ALiBi and mask.  Returns the factor that is left to be applied: `scale` > 0, where nothing came behind it.
static float finish_scores(const AttentionParams &params, const AttentionWork &work, const State &state,
                           const TileKeys &tile, const Panel &panel, int64_t head, int from, int to, float scale,
                           float *s) {
  const int keys = keys_of_vec(panel), vecs = vecs_of(panel);
  if (scale != 1.0f && (params.softcap > 0.0f || params.alibi_slopes != nullptr)) {
    scale_scores(s + from * vecs * kWidth, (to - from) * vecs * kWidth, scale);
    scale = 1.0f;
  }
  if (params.softcap > 0.0f) cap_scores(s + from * vecs * kWidth, (to - from) * vecs * kWidth, params.softcap);
  if (params.alibi_slopes != nullptr) bias_scores(params, work, state, tile, panel, head, from, to, s);
  if (panel.all_begin > from * keys || panel.all_end < to * keys) mask_scores(panel, from, to, s);
  return scale;
}

// The scores [any_begin, any_end) of one panel and head.  Returns what weigh_scores does.
static bool softmax_panel(const AttentionParams &params, const AttentionWork &work, const State &state,
                          const TileKeys &tile, const Panel &panel, int64_t head, float *s, Online &online) {
  const int keys = keys_of_vec(panel), vecs = vecs_of(panel);
  const int from = panel.any_begin / keys;
  const int to = (panel.any_end + keys - 1) / keys;
  finish_scores(params, work, state, tile, panel, head, from, to, 1.0f, s);
  bool rose = false;
  with_count<kPackedVecs>(
      vecs, [&](auto count) { rose = weigh_scores<decltype(count)::value>(panel.lanes, from, to, s, online); });
  return rose;
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
