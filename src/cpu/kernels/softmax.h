// Online softmax over the scores of a tile, and the division at the end.
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

static void cap_scores(float *s, int begin, int end, float softcap) {
  const Vec factor = broadcast(softcap * kLog2e);
  for (int j = begin; j < end; j += kWidth) store(s + j, tanh(load(s + j)) * factor);
}

static void bias_scores(float *s, int begin, int end, float slope, int64_t first_distance) {
  const Vec slope2 = broadcast(slope * kLog2e);
  const Vec distance = broadcast(static_cast<float>(first_distance)) + load(kIota);
  for (int j = begin; j < end; j += kWidth) {
    store(s + j, fma(distance + broadcast(static_cast<float>(j)), slope2, load(s + j)));
  }
}

// Turns the scores [begin, end) of a row into weights relative to the row's new maximum, and rescales what the row has
// accumulated so far.
static void softmax_row(float *s, int begin, int end, float &row_max, float &row_sum, float *acc, int64_t acc_size) {
  const int from = begin / kWidth * kWidth;
  const int to = static_cast<int>(round_up(end, kWidth));
  for (int j = from; j < begin; ++j) s[j] = -kInfinity;
  for (int j = end; j < to; ++j) s[j] = -kInfinity;

  Vec largest = broadcast(-kInfinity);
  for (int j = from; j < to; j += kWidth) largest = max(largest, load(s + j));
  const float old_max = row_max;
  const float tile_max = reduce_max(largest);
  const float new_max = tile_max > old_max ? tile_max : old_max;
  // While every score is -inf the weights are to be 0, not NaN.
  const Vec origin = broadcast(new_max == -kInfinity ? 0.0f : new_max);

  Vec sum = zero();
  for (int j = from; j < to; j += kWidth) {
    const Vec weight = exp2_nonpositive(load(s + j) - origin);
    store(s + j, weight);
    sum += weight;
  }
  if (new_max > old_max) {
    const float rescale = exp2_nonpositive(broadcast(old_max - new_max))[0];
    row_sum *= rescale;
    for (int64_t d = 0; d < acc_size; d += kWidth) store(acc + d, load(acc + d) * rescale);
    row_max = new_max;
  }
  row_sum += reduce_add(sum);
}

// All rows of one KV head.
static void softmax_tile(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &tile,
                         int64_t head) {
  for (int64_t row = 0; row < state.rows; ++row) {
    const int begin = state.tile_begin[row];
    const int end = state.tile_end[row];
    if (begin >= end) continue;
    float *s = state.scores + row * kScoreStride;
    const int from = begin / kWidth * kWidth;
    if (params.softcap > 0.0f) cap_scores(s, from, end, params.softcap);
    if (params.alibi_slopes != nullptr) {
      const float slope = params.alibi_slopes[query_row(state, work, head, row).head];
      bias_scores(s, from, end, slope, tile.first - alibi_reference(state, row, slope));
    }
    const int64_t i = head * state.rows + row;
    softmax_row(s, begin, end, state.row_max[i], state.row_sum[i], state.acc + i * state.row_stride, params.head_dim);
  }
}

// Divides by the denominator, sinks included, and writes out and lse.
static void finish_rows(const AttentionParams &params, const AttentionWork &work, State &state) {
  for (int64_t head = 0; head < state.num_heads; ++head) {
    const float v_scale = scale_of(params.v_scale, work.head_begin + head);
    for (int64_t row = 0; row < state.rows; ++row) {
      const int64_t i = head * state.rows + row;
      const QueryRow at = query_row(state, work, head, row);
      double shift = 0.0;
      if (params.alibi_slopes != nullptr) {
        const float slope = params.alibi_slopes[at.head];
        const int64_t position = work.seq_len - work.query_len + (work.row_begin + row) / state.group;
        shift = static_cast<double>(slope) * static_cast<double>(alibi_reference(state, row, slope) - position);
      }
      float origin = state.row_max[i];
      float denominator = state.row_sum[i];
      float weight = 1.0f;
      if (params.sinks != nullptr) {
        const double sink = (static_cast<double>(params.sinks[at.head]) - shift) / kLn2;
        const float sink2 = static_cast<float>(sink);
        origin = sink2 > origin ? sink2 : origin;
        if (origin != -kInfinity) {
          weight = exp2_nonpositive(broadcast(state.row_max[i] - origin))[0];
          denominator = denominator * weight + exp2_nonpositive(broadcast(sink2 - origin))[0];
        }
      }
      const float factor = denominator == 0.0f ? 0.0f : weight * v_scale / denominator;
      const float *acc = state.acc + i * state.row_stride;
      const int64_t offset = at.token * params.out.token_stride + at.head * params.out.head_stride;
      with_dtype(params.q_dtype, [&](auto tag) {
        using T = decltype(tag);
        auto *out = static_cast<typename T::Storage *>(params.out.data) + offset;
        int64_t d = 0;
        for (; d + kWidth <= params.head_dim; d += kWidth) T::store(out + d, load(acc + d) * factor);
        if (d < params.head_dim) store_partial<T>(out + d, load(acc + d) * factor, params.head_dim - d);
      });
      if (params.lse != nullptr) {
        const double log_sum = static_cast<double>(origin) * kLn2 + __builtin_log(static_cast<double>(denominator));
        params.lse[at.token * params.lse_token_stride + at.head * params.lse_head_stride] =
            denominator == 0.0f ? -kInfinity : static_cast<float>(log_sum + shift);
      }
    }
  }
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
