// From the state of a work item to its result: out and lse, or a partial result, and the merge of such.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/softmax.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

// Maxima and sums by row: lanes that stand for the same row are joined.
static void gather_rows(State &state) {
  for (int64_t head = 0; head < state.num_heads; ++head) {
    for (int p = 0; p < state.num_panels; ++p) {
      const Panel &panel = state.panels[p];
      const Online &online = state.online[head * state.num_panels + p];
      for (int r = 0; r < panel.rows; ++r) {
        float sum = 0.0f;
        for (int lane = r; lane < (panel.lanes < kWidth ? kWidth : panel.lanes); lane += panel.lanes) {
          sum += online.sum[lane];
        }
        const int64_t i = head * state.rows + panel.first + r;
        state.row_max[i] = online.max[r];
        state.row_sum[i] = sum;
      }
    }
  }
}

static void save_row(const AttentionParams &params, const AttentionWork &work, int64_t i, const float *acc) {
  __builtin_memcpy(work.partial + i * params.head_dim, acc, static_cast<size_t>(params.head_dim) * sizeof(float));
}

// What a partial result of the item holds behind its rows.  The state's heads are the item's from `head` on.
static void save_sums(const AttentionParams &params, const AttentionWork &work, const State &state, int64_t head) {
  const int64_t all_rows = (work.head_end - work.head_begin) * state.rows;
  float *const extra = work.partial + all_rows * params.head_dim + head * state.rows;
  const auto size = static_cast<size_t>(state.num_heads * state.rows) * sizeof(float);
  __builtin_memcpy(extra, state.row_max, size);
  __builtin_memcpy(extra + all_rows, state.row_sum, size);
}

// Joins partial results, in order, to the state's rows.
static void merge_rows(const AttentionParams &params, const float *partials, int64_t num_partials, int64_t stride,
                       State &state) {
  const int64_t rows = state.num_heads * state.rows;
  for (int64_t i = 0; i < rows; ++i) {
    const float *maxima = partials + rows * params.head_dim + i;
    const float *sums = maxima + rows;
    float largest = -kInfinity;
    for (int64_t p = 0; p < num_partials; ++p) {
      largest = maxima[p * stride] > largest ? maxima[p * stride] : largest;
    }
    float *acc = state.acc + i * state.row_stride;
    __builtin_memset(acc, 0, static_cast<size_t>(state.row_stride) * sizeof(float));
    float sum = 0.0f;
    for (int64_t p = 0; p < num_partials; ++p) {
      if (maxima[p * stride] == -kInfinity) continue;
      const float weight = exp2_nonpositive(broadcast(maxima[p * stride] - largest))[0];
      sum += weight * sums[p * stride];
      const float *part = partials + p * stride + i * params.head_dim;
      int64_t d = 0;
      for (; d + kWidth <= params.head_dim; d += kWidth) {
        store(acc + d, fma(broadcast(weight), load(part + d), load(acc + d)));
      }
      for (; d < params.head_dim; ++d) acc[d] += weight * part[d];
    }
    state.row_max[i] = largest;
    state.row_sum[i] = sum;
  }
}

// Divides a row of a KV head, `acc`, by the denominator, sinks included, and writes out and lse.
static void finish_row(const AttentionParams &params, const AttentionWork &work, const State &state, int64_t head,
                       int64_t row, const float *acc) {
  // Copies, since the compiler thinks that a stored vector may change what lies in memory.
  const int head_dim = params.head_dim;
  const bool pair_order = state.pair_order;
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
  const float v_scale = scale_of(params.v_scale, work.head_begin + head);
  const float factor = denominator == 0.0f ? 0.0f : weight * v_scale / denominator;
  const int64_t offset = at.token * params.out.token_stride + at.head * params.out.head_stride;
  with_dtype(params.out_dtype, [&](auto tag) {
    using T = decltype(tag);
    auto *out = static_cast<typename T::Storage *>(params.out.data) + offset;
    int d = 0;
    for (; pair_order && d + 2 * kWidth <= head_dim; d += 2 * kWidth) {
      store_pair<T>(out + d, load(acc + d) * factor, load(acc + d + kWidth) * factor);
    }
    for (; d + kWidth <= head_dim; d += kWidth) T::store(out + d, load(acc + d) * factor);
    if (d < head_dim) store_partial<T>(out + d, load(acc + d) * factor, head_dim - d);
  });
  if (params.lse != nullptr) {
    const double log_sum = static_cast<double>(origin) * kLn2 + __builtin_log(static_cast<double>(denominator));
    params.lse[at.token * params.lse_token_stride + at.head * params.lse_head_stride] =
        denominator == 0.0f ? -kInfinity : static_cast<float>(log_sum + shift);
  }
}

// Whether no result of a head is NaN, in rows as below.
static bool head_holds(const AttentionParams &params, const State &state, int64_t head) {
  VecI odd = {};
  for (int64_t i = head * state.rows; i < (head + 1) * state.rows; ++i) {
    for (int64_t d = 0; d < params.head_dim; d += kWidth) {
      const Vec x = load(state.acc + i * state.row_stride + d);
      odd |= x != x;
    }
  }
  return !any(odd);
}

// All rows, from [num_heads * rows, row_stride].
static void finish_rows(const AttentionParams &params, const AttentionWork &work, const State &state) {
  for (int64_t head = 0; head < state.num_heads; ++head) {
    for (int64_t row = 0; row < state.rows; ++row) {
      finish_row(params, work, state, head, row, state.acc + (head * state.rows + row) * state.row_stride);
    }
  }
}
// The same as a part of the item's partial result: the state's heads are the item's from `head` on.
static void save_rows(const AttentionParams &params, const AttentionWork &work, const State &state, int64_t head) {
  for (int64_t i = 0; i < state.num_heads * state.rows; ++i) {
    save_row(params, work, head * state.rows + i, state.acc + i * state.row_stride);
  }
  save_sums(params, work, state, head);
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
