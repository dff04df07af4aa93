// A tile for many query rows (prefill, large groups): two small matrix products on packed fp32 panels.
//
// SPDX-License-Identifier: Apache-2.0
//
// A tile's keys and values are converted once, K transposed, into panels of kPanel columns that the micro-kernels read
// in order: S = Q K^T with keys as columns, O += P V with head dimensions as columns.  A micro-kernel keeps kMicroRows
// x kPanel sums in registers, so its bound is the multiplier: 12 (24) fused multiply-adds for every 2 vector loads and
// 6 (12) broadcasts with 16 (32) registers.  Panels are the outer loops: one stays in L1 while the rows stream from L2.
#pragma once

#include "kernels/attention_direct.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

constexpr int kMicroRows = kRegisters == 32 ? 12 : 6;

// K^T: [panel of keys][dimension][kPanel keys].  Places behind the last key are zeros.
template <class T>
static void pack_keys(const typename T::Storage *k, const TileKeys &tile, int head_dim, float *panels) {
  for (int j = 0; j < tile.count; j += kWidth) {
    float *panel = panels + j / kPanel * kPanel * head_dim + j % kPanel;
    for (int d = 0; d < head_dim; d += kWidth) {
      Vec square[kWidth];
      const int dims = head_dim - d < kWidth ? head_dim - d : kWidth;
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (j + i >= tile.count) {
          square[i] = zero();
        } else {
          const auto *src = k + tile.k[j + i] + d;
          square[i] = dims == kWidth ? T::load(src) : load_partial<T>(src, dims);
        }
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (i < dims) store(panel + (d + i) * kPanel, square[i]);
      }
    }
  }
  // An odd number of vectors of keys leaves half a panel.
  const int packed = static_cast<int>(round_up(tile.count, kWidth));
  if (packed % kPanel != 0) {
    float *panel = panels + packed / kPanel * kPanel * head_dim + packed % kPanel;
    for (int d = 0; d < head_dim; ++d) store(panel + d * kPanel, zero());
  }
}

// V: [panel of dimensions][key][kPanel dimensions], zeros behind the last dimension.
template <class T>
static void pack_values(const typename T::Storage *v, const TileKeys &tile, int head_dim, float *panels) {
  const int padded = static_cast<int>(round_up(head_dim, kPanel));
  for (int j = 0; j < tile.count; ++j) {
    const auto *src = v + tile.v[j];
    for (int d = 0; d < padded; d += kWidth) {
      const int dims = head_dim - d;
      const Vec part = dims >= kWidth ? T::load(src + d) : (dims > 0 ? load_partial<T>(src + d, dims) : zero());
      store(panels + (d / kPanel * kTileKeys + j) * kPanel + d % kPanel, part);
    }
  }
}

// Scores of kRows query rows with one panel of keys.
template <int kRows>
static void panel_scores(const float *q, int64_t q_stride, const float *panel, int head_dim, float *s) {
  Vec sum[kRows][2] = {};
  for (int d = 0; d < head_dim; ++d) {
    const Vec k0 = load(panel + d * kPanel);
    const Vec k1 = load(panel + d * kPanel + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec q_part = broadcast(q[r * q_stride + d]);
      sum[r][0] = fma(q_part, k0, sum[r][0]);
      sum[r][1] = fma(q_part, k1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(s + r * kScoreStride, sum[r][0]);
    store(s + r * kScoreStride + kWidth, sum[r][1]);
  }
}

template <int kRows>
static void panel_values(float *acc, int64_t acc_stride, const float *weights, const float *panel, int begin, int end) {
  accumulate_values<kRows, 2>(acc, acc_stride, weights, begin, end,
                              [panel](int j, int c) { return load(panel + j * kPanel + c * kWidth); });
}

// Scores, softmax and values of one KV head.
template <class T>
static void packed_tile(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &tile,
                        int64_t head, const Ahead<T> &ahead) {
  const auto *k = head_data<T>(params.k_cache, work, head);
  const auto *v = head_data<T>(params.v_cache, work, head);
  const float *q = state.q + head * state.rows * state.row_stride;
  float *acc = state.acc + head * state.rows * state.row_stride;

  // Blocks lie anywhere, so what is packed next is fetched while this is computed.
  for (int j = 0; j < tile.count; ++j) prefetch_row<Cache::kL2, T>(v + tile.v[j], params.head_dim);
  pack_keys<T>(k, tile, params.head_dim, state.k_panels);
  for (int j = 0; j < tile.count; j += kPanel) {
    for (int64_t row = 0; row < state.rows; row += kMicroRows) {
      const int64_t n = state.rows - row < kMicroRows ? state.rows - row : kMicroRows;
      if (state.tile_end[row + n - 1] <= j || state.tile_begin[row] >= j + kPanel) continue;
      with_count<kMicroRows>(n, [&](auto count) {
        panel_scores<decltype(count)::value>(q + row * state.row_stride, state.row_stride,
                                             state.k_panels + j * params.head_dim, params.head_dim,
                                             state.scores + row * kScoreStride + j);
      });
    }
  }
  softmax_tile(params, work, state, tile, head);
  for (int j = 0; j < ahead.near->count; ++j) {
    prefetch_row<Cache::kL2, T>(ahead.near_k + ahead.near->k[j], params.head_dim);
  }
  pack_values<T>(v, tile, params.head_dim, state.v_panels);
  for (int64_t d = 0; d < params.head_dim; d += kPanel) {
    const float *panel = state.v_panels + d * kTileKeys;
    for (int64_t row = 0; row < state.rows; row += kMicroRows) {
      const int64_t n = state.rows - row < kMicroRows ? state.rows - row : kMicroRows;
      const auto values = [&](auto count, int64_t r, int begin, int end) {
        panel_values<decltype(count)::value>(acc + r * state.row_stride + d, state.row_stride,
                                             state.scores + r * kScoreStride, panel, begin, end);
      };
      for_visible_keys(
          state, row, n,
          [&](int begin, int end) { with_count<kMicroRows>(n, [&](auto count) { values(count, row, begin, end); }); },
          [&](int64_t r, int begin, int end) { values(Count<1>{}, r, begin, end); });
    }
  }
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
