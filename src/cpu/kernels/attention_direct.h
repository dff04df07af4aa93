// A tile for few query rows (decode): keys and values straight from the cache.
//
// SPDX-License-Identifier: Apache-2.0
//
// Each element of K and V is loaded and converted once for up to four rows, the query heads of a group; nothing is
// packed.  The bound is memory, so each loop fetches ahead what a later one reads: while it goes over a head's keys,
// the same head's values (to L1) and the values of the tile after (to L2); while it goes over the values, the keys of
// the head that comes next (to L1) and the keys of the tile after (to L2).  Needs head_dim to be a multiple of the
// vector width.
#pragma once

#include "kernels/softmax.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

constexpr int kDirectRows = 4;  // rows that share a load

// What to fetch ahead of its use.
template <class T>
struct Ahead {
  const typename T::Storage *near_k;  // of the KV head that comes next
  const TileKeys *near;
  const TileKeys *far;  // the tile after this one
  int far_count;        // how much of it: 0 where both tiles together overflow L2
};

// Dot products of kRows query rows with a few keys at a time, over the keys [begin, end) of the tile.
template <class T, int kRows, bool kPrefetch>
static void direct_scores(const float *q, int64_t q_stride, const typename T::Storage *k, const TileKeys &tile,
                          int head_dim, int begin, int end, float *s, const typename T::Storage *v,
                          const Ahead<T> &ahead) {
  // Accumulators, and beside them one vector of each key: what fits into the registers.
  constexpr int kKeys = kRows <= 2 || kRegisters == 32 ? 4 : 2;
  for (int j = begin; j < end; j += kKeys) {
    const typename T::Storage *key[kKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) {
      // The last group repeats the last key rather than touch one that nobody sees; softmax masks the surplus scores.
      const int at = j + i < end ? j + i : end - 1;
      key[i] = k + tile.k[at];
      if constexpr (kPrefetch) {
        prefetch_row<Cache::kL1, T>(v + tile.v[at], head_dim);
        if (at < ahead.far_count) prefetch_row<Cache::kL2, T>(v + ahead.far->v[at], head_dim);
      }
    }
    Vec sum[kKeys][kRows] = {};
    for (int d = 0; d < head_dim; d += kWidth) {
      Vec key_part[kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) key_part[i] = T::load(key[i] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Vec q_part = load(q + r * q_stride + d);
        keep_in_register(q_part);
#pragma GCC unroll 4
        for (int i = 0; i < kKeys; ++i) sum[i][r] = fma(key_part[i], q_part, sum[i][r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kKeys == 4) {
        store_as(s + r * kScoreStride + j, sum_each(sum[0][r], sum[1][r], sum[2][r], sum[3][r]));
      } else if (r % 2 == 0) {
        const int next = r + 1 < kRows ? r + 1 : r;
        const Vec4 four = sum_each(sum[0][r], sum[1][r], sum[0][next], sum[1][next]);
        s[r * kScoreStride + j] = four[0];
        s[r * kScoreStride + j + 1] = four[1];
        s[next * kScoreStride + j] = four[2];
        s[next * kScoreStride + j + 1] = four[3];
      }
    }
  }
}

// acc[r] += sum over keys [begin, end) of weights[r][j] * values(j), for kVecs vectors of columns.
template <int kRows, int kVecs, class Values>
PA_INLINE void accumulate_values(float *acc, int64_t acc_stride, const float *weights, int begin, int end,
                                 Values values) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) sum[r][c] = load(acc + r * acc_stride + c * kWidth);
  }
  for (int j = begin; j < end; ++j) {
    Vec value[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) value[c] = values(j, c);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = broadcast(weights[r * kScoreStride + j]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) sum[r][c] = fma(weight, value[c], sum[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) store(acc + r * acc_stride + c * kWidth, sum[r][c]);
  }
}

// The keys that all rows [row, row + n) of the tile see go through `all(begin, end)`; what a single row sees beside
// them through `one(row, begin, end)`.  A weight is so never multiplied with a value that its row does not see: 0 *
// NaN.
template <class All, class One>
PA_INLINE void for_visible_keys(const State &state, int64_t row, int64_t n, All all, One one) {
  const int begin = state.tile_begin[row + n - 1];
  const int end = state.tile_end[row];
  if (begin < end) all(begin, end);
  for (int64_t r = row; r < row + n; ++r) {
    const int first = state.tile_begin[r];
    const int last = state.tile_end[r];
    if (begin >= end) {
      if (first < last) one(r, first, last);
      continue;
    }
    if (first < begin) one(r, first, begin);
    if (end < last) one(r, end, last);
  }
}

template <class T, int kRows, bool kPrefetch>
static void direct_values(float *acc, int64_t acc_stride, const float *weights, const typename T::Storage *v,
                          const TileKeys &tile, int head_dim, int begin, int end, const typename T::Storage *k,
                          const Ahead<T> &ahead) {
  int d = 0;
  for (; d + kPanel <= head_dim; d += kPanel) {
    const bool new_line = kPrefetch && d % kLine<T> == 0;
    accumulate_values<kRows, 2>(acc + d, acc_stride, weights, begin, end, [&](int j, int c) {
      if (c == 0 && new_line) {
        if (j < ahead.near->count) prefetch<Cache::kL1>(ahead.near_k + ahead.near->k[j] + d);
        if (j < ahead.far_count) prefetch<Cache::kL2>(k + ahead.far->k[j] + d);
      }
      return T::load(v + tile.v[j] + d + c * kWidth);
    });
  }
  if (d < head_dim) {
    accumulate_values<kRows, 1>(acc + d, acc_stride, weights, begin, end,
                                [&](int j, int) { return T::load(v + tile.v[j] + d); });
  }
}

// Scores, softmax and values of one KV head.
template <class T>
static void direct_tile(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &tile,
                        int64_t head, const Ahead<T> &ahead) {
  const auto *k = head_data<T>(params.k_cache, work, head);
  const auto *v = head_data<T>(params.v_cache, work, head);
  const float *q = state.q + head * state.rows * state.row_stride;
  float *acc = state.acc + head * state.rows * state.row_stride;

  for (int64_t row = 0; row < state.rows; row += kDirectRows) {
    const int64_t n = state.rows - row < kDirectRows ? state.rows - row : kDirectRows;
    with_count<kDirectRows>(n, [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      const auto scores = row == 0 ? direct_scores<T, kRows, true> : direct_scores<T, kRows, false>;
      scores(q + row * state.row_stride, state.row_stride, k, tile, params.head_dim, state.tile_begin[row],
             state.tile_end[row + n - 1], state.scores + row * kScoreStride, v, ahead);
    });
  }
  softmax_tile(params, work, state, tile, head);
  for (int64_t row = 0; row < state.rows; row += kDirectRows) {
    const int64_t n = state.rows - row < kDirectRows ? state.rows - row : kDirectRows;
    const auto values = [&](auto values_of_rows, int64_t r, int begin, int end) {
      values_of_rows(acc + r * state.row_stride, state.row_stride, state.scores + r * kScoreStride, v, tile,
                     params.head_dim, begin, end, k, ahead);
    };
    for_visible_keys(
        state, row, n,
        [&](int begin, int end) {
          with_count<kDirectRows>(n, [&](auto count) {
            constexpr int kRows = decltype(count)::value;
            values(row == 0 ? direct_values<T, kRows, true> : direct_values<T, kRows, false>, row, begin, end);
          });
        },
        [&](int64_t r, int begin, int end) { values(direct_values<T, 1, false>, r, begin, end); });
  }
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
