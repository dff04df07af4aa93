// A tile for few query rows (decode): keys and values straight from the cache.
//
// SPDX-License-Identifier: Apache-2.0
//
// Each element of K and V is loaded and converted once for a panel of rows, the query heads of a group; nothing is
// packed.  The bound is memory: scores of all heads come first, and meanwhile the values of the same tile are fetched;
// then the values, and meanwhile the keys of the next tile.
#pragma once

#include "kernels/fetch.h"
#include "kernels/softmax.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

// Keys whose values are gone over together, all dimensions, so that lines which hold several vectors stay in L1.
constexpr int kValueKeys = 16;
// Of keys, or of values, in a tile: what is fetched ahead stays in an L2 of 1 MiB beside what is in use.
constexpr int64_t kDirectTileBytes = 128 * 1024;

#if defined(__AVX512F__)
// What comes fast by itself is not fetched, which would take a seventh of the time.  How long the scores of a tile that
// nobody fetched take tells it, in ticks of the processor's clock (about 0.4 ns) for 1024 bytes of keys: with 4 rows
// over bfloat16 and float32 about 56 and 30 from L2 of a Zen 5, 63 and 41 from its L3, 290 and 200 from memory.
constexpr uint64_t kDirectNearTicks = 38;
constexpr uint64_t kDirectNearTicksOfRow = 19;  // for 16 bits
// What the thread's last item found: the next one's first tile is likely to find the same.
static thread_local bool direct_near_at_last = false;
#endif
// Keys whose scores are taken through all heads, in the order of addresses, where memory is read.
constexpr int kFarKeys = 4;

// Keys of a tile; a function of the call's shape, as sums follow it.
static int64_t direct_tile_keys(const AttentionParams &params, int64_t element_size) {
  const int64_t keys =
      kDirectTileBytes / (params.num_kv_heads * params.head_dim * element_size) / kValueKeys * kValueKeys;
  return keys < kValueKeys ? kValueKeys : (keys > kTileKeys ? kTileKeys : keys);
}

// Queries and results of a panel stand as [vector of dimensions][row][kWidth]: one base for all rows.

// Dot products of kRows query rows with a few keys at a time, over the keys [begin, end) of the tile: s[key][lane].
template <class T, int kRows>
PA_KERNEL void direct_scores(const float *q, const typename T::Storage *k, const TileKeys &tile, int head_dim,
                             int begin, int end, float *s, Fetch<T> &fetch) {
  // Accumulators, and beside them the parts of each key: what fits into the registers.
  constexpr int kKeys = kRows <= 2 || kRegisters == 32 ? 4 : 2;
  const int lines = kKeys * fetch.lines_of_row(head_dim);
  constexpr int kBytes = kKeys * kWidth * static_cast<int>(sizeof(typename T::Storage));
  for (int j = begin; j < end; j += kKeys) {
    const typename T::Storage *key[kKeys];
    const float *query[kKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) {
      // The last group repeats the last key rather than touch one that nobody sees; softmax masks the surplus scores.
      key[i] = k + tile.k[j + i < end ? j + i : end - 1];
      query[i] = q;
      // With few registers each key multiplies with queries in memory, which costs no instruction of its own.
      if constexpr (kRegisters < 32) hide(query[i]);
    }
    fetch.before_steps(lines);
    Vec sum[kKeys][kRows] = {};
    const auto add = [&](const Vec(&part)[kKeys]) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) sum[i][r] = fma(part[i], load(query[i] + r * kWidth), sum[i][r]);
        query[i] += kRows * kWidth;
      }
    };
    int d = 0;
    for (; d + 2 * kWidth <= head_dim; d += 2 * kWidth) {
      Vec part[2][kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) load_pair<T>(key[i] + d, part[0][i], part[1][i]);
      fetch.template in_step<2 * kBytes>();
      add(part[0]);
      add(part[1]);
    }
    for (; d < head_dim; d += kWidth) {
      Vec part[kKeys];
      for (int i = 0; i < kKeys; ++i) part[i] = load_tail<T>(key[i] + d, head_dim - d);
      fetch.template in_step<kBytes>();
      add(part);
    }
    float *out = s + j * direct_lanes(kRows);
    if constexpr (kRows == 1) {
      store_as(out, sum_each(sum[0][0], sum[1][0], sum[2][0], sum[3][0]));
    } else if constexpr (kRows == 2) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; i += 2) {
        store_as(out + 2 * i, sum_each(sum[i][0], sum[i][1], sum[i + 1][0], sum[i + 1][1]));
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; ++i) {
        float *const lanes = out + direct_lanes(kRows) * i;
        store_as(lanes, sum_each(sum[i][0], sum[i][1], sum[i][2], sum[i][kRows == 3 ? 2 : 3]));
        if constexpr (kRows > 4) {
          store_as(lanes + 4, sum_each(sum[i][4], sum[i][kRows - 1], sum[i][kRows - 1], sum[i][kRows - 1]));
        }
      }
    }
  }
}

// acc[r] += sum over keys [begin, end) of weights[key][r] * values(key), for kVecs vectors of columns and kRows of the
// `rows` rows that acc has.
template <int kRows, int kVecs, class Values>
PA_INLINE void accumulate_values(float *acc, int rows, const float *weights, int lanes, int begin, int end,
                                 Values values) {
  Vec sum[kVecs][kRows];
#pragma GCC unroll 8
  for (int c = 0; c < kVecs; ++c) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) sum[c][r] = load(acc + (c * rows + r) * kWidth);
  }
  weights += begin * lanes;
#pragma GCC unroll 2
  for (int j = begin; j < end; ++j, weights += lanes) {
    Vec value[kVecs];
    values(j, value);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = broadcast(weights[r]);
#pragma GCC unroll 8
      for (int c = 0; c < kVecs; ++c) sum[c][r] = fma(weight, value[c], sum[c][r]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kVecs; ++c) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) store(acc + (c * rows + r) * kWidth, sum[c][r]);
  }
}

template <class T, int kRows>
PA_KERNEL void direct_values(float *acc, int rows, const float *weights, int lanes, const typename T::Storage *v,
                             const TileKeys &tile, int head_dim, int begin, int end, Fetch<T> &fetch) {
  // Enough sums to hide how long one takes.
  constexpr int kPairs = kRows == 1 ? 4 : (kRows == 2 || kRegisters == 32 ? 2 : 1);
  const int lines_of_row = fetch.lines_of_row(head_dim);
  constexpr int kBytes = kWidth * static_cast<int>(sizeof(typename T::Storage));
  for (int from = begin; from < end; from += kValueKeys) {
    const int to = end < from + kValueKeys ? end : from + kValueKeys;
    int d = 0;
    const auto pairs = [&](auto count) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      fetch.before_steps((kValueKeys * lines_of_row * kCount * 2 * kWidth + head_dim - 1) / head_dim);
      const auto *column = v + d;
      accumulate_values<kRows, 2 * kCount>(acc + d * rows, rows, weights, lanes, from, to,
                                           [&](int j, Vec(&value)[2 *kCount]) __attribute__((always_inline)) {
                                             const auto *at = column + tile.v[j];
                                             fetch.template in_step<2 * kCount * kBytes>();
#pragma GCC unroll 4
                                             for (int c = 0; c < kCount; ++c) {
                                               load_pair<T>(at + c * 2 * kWidth, value[2 * c], value[2 * c + 1]);
                                             }
                                           });
      d += kCount * 2 * kWidth;
    };
    while (d + kPairs * 2 * kWidth <= head_dim) pairs(Count<kPairs>{});
    while (d + 2 * kWidth <= head_dim) pairs(Count<1>{});
    for (; d < head_dim; d += kWidth) {
      accumulate_values<kRows, 1>(acc + d * rows, rows, weights, lanes, from, to, [&](int j, Vec(&value)[1]) {
        fetch.template in_step<kBytes>();
        value[0] = load_tail<T>(v + tile.v[j] + d, head_dim - d);
      });
    }
  }
}

// The keys that all rows of the panel see go through `all(begin, end)`; what a single row sees beside them through
// `one(row, begin, end)`.  A weight is so never multiplied with a value that its row does not see: 0 * NaN.
template <class All, class One>
PA_INLINE void for_visible_keys(const Panel &panel, All all, One one) {
  const bool common = panel.all_begin < panel.all_end;
  if (common) all(panel.all_begin, panel.all_end);
  for (int r = 0; r < panel.rows; ++r) {
    const int first = panel.begin[r], last = panel.end[r];
    if (!common) {
      if (first < last) one(r, first, last);
      continue;
    }
    if (first < panel.all_begin) one(r, first, panel.all_begin);
    if (panel.all_end < last) one(r, panel.all_end, last);
  }
}

// What a panel accumulated, after a maximum rose.
static void rescale_panel(float *acc, int64_t row_stride, int rows, const float *factor) {
  Vec by[kDirectRows];
  for (int r = 0; r < rows; ++r) by[r] = broadcast(factor[r]);
  for (int64_t d = 0; d < row_stride; d += kWidth) {
    for (int r = 0; r < rows; ++r) {
      float *at = acc + d * rows + r * kWidth;
      store(at, load(at) * by[r]);
    }
  }
}

// Queries in fp32, in the cache's pair order, with everything that multiplies a score folded in; sums cleared.
static void start_direct(const AttentionParams &params, const AttentionWork &work, State &state) {
  // Copies of what the loops use: the compiler thinks that a stored vector may change what lies in memory.
  const int head_dim = params.head_dim;
  const bool pair_order = state.pair_order;
  for (int64_t head = 0; head < state.num_heads; ++head) {
    const float factor = query_factor(params, work.head_begin + head);
    for (int p = 0; p < state.num_panels; ++p) {
      const Panel &panel = state.panels[p];
      const int rows = panel.rows;
      for (int r = 0; r < rows; ++r) {
        const QueryRow at = query_row(state, work, head, panel.first + r);
        const int64_t offset = at.token * params.q.token_stride + at.head * params.q.head_stride;
        float *q = state.q + (head * state.rows + panel.first) * state.row_stride + r * kWidth;
        const auto put = [=](int d, Vec v) { store(q + d * rows, v * factor); };
        with_dtype(params.q_dtype, [&](auto tag) {
          using T = decltype(tag);
          const auto *src = static_cast<const typename T::Storage *>(params.q.data) + offset;
          int d = 0;
          for (; pair_order && d + 2 * kWidth <= head_dim; d += 2 * kWidth) {
            Vec first, second;
            load_pair<T>(src + d, first, second);
            put(d, first);
            put(d + kWidth, second);
          }
          for (; d < head_dim; d += kWidth) put(d, load_tail<T>(src + d, head_dim - d));
        });
      }
    }
  }
#if defined(__AVX512F__)
  state.near = direct_near_at_last;
#endif
  const int64_t size = state.num_heads * state.rows * state.row_stride;
  __builtin_memset(state.acc, 0, static_cast<size_t>(size) * sizeof(float));
}

// The result back to rows, which take the queries' place.
static void finish_direct(State &state) {
  const int64_t row_stride = state.row_stride;
  for (int64_t head = 0; head < state.num_heads; ++head) {
    for (int p = 0; p < state.num_panels; ++p) {
      const int64_t rows = state.panels[p].rows;
      const int64_t first = (head * state.rows + state.panels[p].first) * row_stride;
      const float *src = state.acc + first;
      float *const dst = state.q + first;
      for (int64_t d = 0; d < row_stride; d += kWidth) {
        for (int64_t r = 0; r < rows; ++r, src += kWidth) store(dst + r * row_stride + d, load(src));
      }
    }
  }
  state.acc = state.q;
}

// Scores, softmax and values of all heads.
template <class T>
static void direct_tile(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &tile,
                        const TileKeys &next) {
  Fetch<T> nothing, values_ahead, keys_ahead;
  if (!state.near) values_ahead = {params.v_cache, work, tile.v, tile.count, params.head_dim};
  const auto for_panels = [&](auto f) {
    for (int64_t head = 0; head < state.num_heads; ++head) {
      for (int p = 0; p < state.num_panels; ++p) {
        const Panel &panel = state.panels[p];
        if (panel.any_begin >= panel.any_end) continue;
        const int64_t row = (head * state.rows + panel.first) * state.row_stride;
        f(head, panel, row, state.scores + (head * state.lanes + panel.first_lane) * kTileKeys,
          state.online[head * state.num_panels + p]);
      }
    }
  };
#if defined(__AVX512F__)
  const uint64_t start = __builtin_ia32_rdtsc();
  const int step = state.near || state.rows < 3 ? tile.count : kFarKeys;
#else
  const int step = tile.count;
#endif
  for (int from = 0; from < tile.count; from += step) {
    for_panels([&](int64_t head, const Panel &panel, int64_t row, float *s, Online &) {
      const int begin = panel.any_begin < from ? from : panel.any_begin;
      const int end = panel.any_end > from + step ? from + step : panel.any_end;
      with_count<kDirectRows>(panel.rows, [&](auto count) {
        direct_scores<T, decltype(count)::value>(state.q + row, head_data<T>(params.k_cache, work, head), tile,
                                                 params.head_dim, begin, end, s,
                                                 panel.first == 0 ? values_ahead : nothing);
      });
    });
  }
#if defined(__AVX512F__)
  const uint64_t ticks = __builtin_ia32_rdtsc() - start;
  if (tile.first == work.kv_begin || state.near) {
    constexpr auto kSize = static_cast<uint64_t>(sizeof(typename T::Storage));
    const auto bytes = static_cast<uint64_t>(tile.count * state.num_heads * params.head_dim) * kSize;
    const auto rows = static_cast<uint64_t>(state.rows);
    state.near = ticks * 1024 < (kDirectNearTicks + kDirectNearTicksOfRow * rows * 2 / kSize) * bytes;
    direct_near_at_last = state.near;
  }
#endif
  if (!state.near) keys_ahead = {params.k_cache, work, next.k, next.count, params.head_dim};
  for_panels([&](int64_t head, const Panel &panel, int64_t row, float *s, Online &online) {
    if (softmax_panel(params, work, state, tile, panel, head, s, online)) {
      rescale_panel(state.acc + row, state.row_stride, panel.rows, online.factor);
    }
  });
  for_panels([&](int64_t head, const Panel &panel, int64_t row, float *s, Online &) {
    const auto values = [&](auto count, int r, int begin, int end) {
      direct_values<T, decltype(count)::value>(state.acc + row + r * kWidth, panel.rows, s + r, panel.lanes,
                                               head_data<T>(params.v_cache, work, head), tile, params.head_dim, begin,
                                               end, panel.first == 0 ? keys_ahead : nothing);
    };
    for_visible_keys(
        panel,
        [&](int begin, int end) {
          with_count<kDirectRows>(panel.rows, [&](auto count) { values(count, 0, begin, end); });
        },
        [&](int r, int begin, int end) { values(Count<1>{}, r, begin, end); });
  });
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
