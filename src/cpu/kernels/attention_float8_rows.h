// A tile for few query rows over float8 (decode), on AMX's tile registers.
//
// SPDX-License-Identifier: Apache-2.0
//
// S^T = K Q^T and O += P V for up to 16 rows of a KV head at once.  A float8 is a bfloat16 (tile_float8.h), so keys and
// values become operands in L1 piece by piece, and are in any order that products want: values in pairs of keys, where
// those of attention_tile_rows.h need a zero beside each weight.  While one piece is widened the one before is
// multiplied, so that nobody waits for what was just stored.  Queries and weights for results in float16 are two parts
// in bfloat16, and take two products.
#pragma once

#include "kernels/attention_tile_rows.h"
#include "kernels/tile_float8.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

#if defined(PAGEDATTN_TILES)

// Of keys, or of values, in a tile.
constexpr int64_t kFloat8RowsBytes = 128 * 1024;

// Keys of a tile; a function of the call's shape, as sums follow it.
static int64_t float8_rows_keys(const AttentionParams &params) {
  const int64_t keys = kFloat8RowsBytes / (params.num_kv_heads * params.head_dim) / kTileDepth * kTileDepth;
  return keys < kTileDepth ? kTileDepth : (keys > kTileKeys ? kTileKeys : keys);
}

static int whole_lines(int head_dim) { return static_cast<int>(round_up(head_dim, kLineDims)); }
static_assert(kMaxStateRows / 9 * kMaxTileRows * kLineDims <= kMaxTiledHeadRows * kTileDepth);  // with 32 dimensions

// Queries of one head, [32 dimensions][part][pair][lane], and sums, [16 dimensions][lane][16], in the orders of
// tile_float8.h.
template <int kParts>
static float *float8_queries_of(const State &state, int64_t head, int head_dim) {
  return state.q + head * state.lanes * whole_lines(head_dim) / 2 * kParts;
}
static float *float8_sums_of(const State &state, int64_t head, int head_dim) {
  return state.acc + head * state.lanes * whole_lines(head_dim);
}

// Even and odd ones of 32 elements.
template <class T>
PA_INLINE void load_even_odd(const typename T::Storage *p, Vec (&both)[2]) {
  load_pair<T>(p, both[0], both[1]);
  if constexpr (!kAsTheyLie<T>) rotate(both, 4);
}

// Queries with zeros in lanes behind the last row; sums cleared.
template <int kParts>
static void start_float8_rows(const AttentionParams &params, const AttentionWork &work, State &state) {
  const int head_dim = params.head_dim;
  const int rows = static_cast<int>(state.rows);
  __builtin_memset(
      state.q, 0,
      static_cast<size_t>(float8_queries_of<kParts>(state, state.num_heads, head_dim) - state.q) * sizeof(float));
  with_dtype(params.q_dtype, [&](auto tag) {
    using T = decltype(tag);
    with_lanes(static_cast<int>(state.lanes), [&](auto count) {
      constexpr int kLanes = decltype(count)::value;
      constexpr int kStages = kLanes == 16 ? 4 : (kLanes == 8 ? 3 : kLanes / 2);
      constexpr int kQuads = 4 * kLanes, kTile = kTileRows * kLanes;
      for (int64_t head = 0; head < state.num_heads; ++head) {
        for (int d = 0; d < head_dim; d += kTileDepth) {
          Vec pairs[kParts][kLanes] = {};
          for (int r = 0; r < rows; ++r) {
            const QueryRow at = query_row(state, work, head, r);
            Vec both[2];
            load_even_odd<T>(static_cast<const typename T::Storage *>(params.q.data) +
                                 at.token * params.q.token_stride + at.head * params.q.head_stride + d,
                             both);
            const Depth<kParts> depth = split<kParts>(both[0], both[1]);
            for (int p = 0; p < kParts; ++p) pairs[p][r] = as_float(depth.part[p]);
          }
          // Two quads of dimensions are four pairs, and go to the line's first and second half in turns.
          float *const line = float8_queries_of<kParts>(state, head, head_dim) + d / kLineDims * 2 * kParts * kTile;
          for (int p = 0; p < kParts; ++p) {
            rotate(pairs[p], kStages);
            alignas(64) float quads[kTile];
            for (int i = 0; i < kLanes; ++i) store(quads + i * kWidth, pairs[p][i]);
            for (int i = 0; i < 4; ++i) {
              float *const dst =
                  line + (i % 2 * kParts + p) * kTile + (d % kLineDims / kTileDepth * 2 + i / 2) * kQuads;
              __builtin_memcpy(dst, quads + i * kQuads, kQuads * sizeof(float));
            }
          }
        }
      }
    });
  });
  const int64_t size = state.num_heads * state.lanes * whole_lines(head_dim);
  __builtin_memset(state.acc, 0, static_cast<size_t>(size) * sizeof(float));
}

// Calls f with what tells where the codes of a tile's keys lie, from `first` on: zeros for those outside of [begin,
// end), if there are such among `count`.
template <class F>
PA_INLINE void with_rows(const uint8_t *data, const int64_t *offsets, int first, int count, int begin, int end, F f) {
  alignas(64) static constexpr uint8_t kZeros[kLineDims] = {};
  offsets += first;
  if (begin <= first && first + count <= end) {
    f([=](int i) __attribute__((always_inline)) { return data + offsets[i]; });
  } else {
    f([=](int i) { return first + i >= begin && first + i < end ? data + offsets[i] : kZeros; });
  }
}
template <class F>
PA_INLINE void with_line(int left, F f) {
  if (left >= kLineDims) {
    f(Count<kLineDims>{});
  } else {
    f(Count<kTileDepth>{});
  }
}

// 16 keys as rows of a left operand.
template <class T>
PA_KERNEL void widen_keys(const uint8_t *k, const TileKeys &tile, int first, int begin, int end, int head_dim,
                          uint16_t *dst, Fetch<T> &fetch) {
  const Widening<T> widening;
  for (int d = 0; d < head_dim; d += kLineDims) {
    with_rows(k + d, tile.k, first, kTileRows, begin, end, [&](auto row) __attribute__((always_inline)) {
      with_line(head_dim - d, [&](auto dims) __attribute__((always_inline)) {
        widen_rows<decltype(dims)::value>(widening, row, dst + d, whole_lines(head_dim), fetch);
      });
    });
  }
}

// A line of 32 values as four right operands.
template <class T>
PA_KERNEL void widen_values(const uint8_t *v, const TileKeys &tile, int first, int begin, int end, int left,
                            char *tiles, Fetch<T> &fetch) {
  const Widening<T> widening;
  // Of each four lines; a part is left to the weights.
  constexpr int kLines = kValuesShare * 4 / kFetchShares;
  with_rows(v, tile.v, first, kTileDepth, begin, end, [&](auto row) __attribute__((always_inline)) {
    with_line(left, [&](auto dims) __attribute__((always_inline)) {
      widen_pairs<decltype(dims)::value>(widening, row, tiles, kLines, fetch);
    });
  });
}

// Scores of 16 keys, [key][lane].
template <int kParts>
PA_KERNEL void float8_scores(const float *q, const uint16_t *keys, int dims, int lanes, float *s) {
  const int64_t lane_stride = 4 * lanes;
  tile_zero<0>();
  for (int d = 0; d < dims; d += kTileDepth, q += kParts * kTileRows * lanes) {
    tile_load<1>(keys + d, 2 * dims);
    tile_load<2>(q, lane_stride);
    tile_multiply<0, 1, 2>();
    if constexpr (kParts > 1) {
      tile_load<3>(q + kTileRows * lanes, lane_stride);
      tile_multiply<0, 1, 3>();
    }
  }
  tile_store<0>(s, lane_stride);
}

// The sums of a line.
PA_INLINE void load_float8_sums(const float *sums, int lanes) {
  tile_load<0>(sums, 64);
  tile_load<1>(sums + lanes * kWidth, 64);
  tile_load<2>(sums + 2 * lanes * kWidth, 64);
  tile_load<3>(sums + 3 * lanes * kWidth, 64);
}
PA_INLINE void store_float8_sums(float *sums, int lanes) {
  tile_store<0>(sums, 64);
  tile_store<1>(sums + lanes * kWidth, 64);
  tile_store<2>(sums + 2 * lanes * kWidth, 64);
  tile_store<3>(sums + 3 * lanes * kWidth, 64);
}
// Adds weights times a line of 32 values.
template <int kParts>
PA_INLINE void add_float8_values(const uint32_t *weights, int lanes, const char *values) {
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part, weights += lanes * kWidth) {
    tile_load<4>(weights, 64);
    tile_load<5>(values, 64);
    tile_multiply<0, 4, 5>();
    tile_load<6>(values + kTileBytes, 64);
    tile_multiply<1, 4, 6>();
    tile_load<7>(values + 2 * kTileBytes, 64);
    tile_multiply<2, 4, 7>();
    tile_load<5>(values + 3 * kTileBytes, 64);
    tile_multiply<3, 4, 5>();
  }
}

// Scores of all heads, group of keys after group.
template <class T, int kParts>
static void score_float8_rows(const AttentionParams &params, const AttentionWork &work, const State &state,
                              const TileKeys &tile, Fetch<T> &fetch) {
  const int head_dim = params.head_dim, dims = whole_lines(head_dim);
  const Panel &panel = state.panels[0];
  const TileShape lanes = lane_shape(panel, kTileRows);
  constexpr TileShape kKeys{kTileRows, 64};
  configure_tiles({lanes, kKeys, lanes, lanes, kKeys, kKeys, kKeys, kKeys});
  uint16_t *pieces[2];
  for (int i = 0; i < 2; ++i) pieces[i] = reinterpret_cast<uint16_t *>(state.key_tiles) + i * kTileRows * dims;
  const int begin = panel.any_begin / kTileRows * kTileRows;
  const auto widen = [&](int first, int64_t head, uint16_t *piece) {
    widen_keys<T>(head_data<T>(params.k_cache, work, head), tile, first, panel.any_begin, panel.any_end, head_dim,
                  piece, fetch);
  };
  widen(begin, 0, pieces[0]);
  int at = 0;
  for (int first = begin; first < panel.any_end; first += kTileRows) {
    for (int64_t head = 0; head < state.num_heads; ++head, at = 1 - at) {
      if (head + 1 < state.num_heads) {
        widen(first, head + 1, pieces[1 - at]);
      } else if (first + kTileRows < panel.any_end) {
        widen(first + kTileRows, 0, pieces[1 - at]);
      }
      float8_scores<kParts>(float8_queries_of<kParts>(state, head, head_dim), pieces[at], dims, panel.lanes,
                            scores_of(state, head) + first * panel.lanes);
    }
  }
}

// acc += weight * value over the keys [begin, end) of the tile, for one row.
template <class T>
static void add_float8_values_alone(const uint8_t *v, const TileKeys &tile, int begin, int end, int head_dim,
                                    const float *weights, int lanes, float *sums) {
  for (int j = begin; j < end; ++j) {
    const Vec weight = broadcast(weights[j * lanes]);
    float *sum = sums;
    for (int d = 0; d < head_dim; d += kLineDims) {
      alignas(64) float line[kLineDims] = {}, values[kLineDims];
      for (int i = 0; i < kLineDims && d + i < head_dim; i += kWidth) store(line + i, T::load(v + tile.v[j] + d + i));
      reorder_line(line, values);
      for (int i = 0; i < kLineDims; i += kWidth, sum += lanes * kWidth) {
        store(sum, fma(weight, load(values + i), load(sum)));
      }
    }
  }
}

// Scores of one head to left operands.  What only some rows see is added alone, and becomes zeros.
template <class T, int kParts, int kLanes>
static void weigh_float8_head(const AttentionParams &params, const AttentionWork &work, const State &state,
                              const TileKeys &tile, int from, int to, int64_t head, Fetch<T> &fetch) {
  using Operands = PairedWeights<kParts>;
  const Panel &panel = state.panels[0];
  const int head_dim = params.head_dim;
  float *const s = scores_of(state, head);
  float *const sums = float8_sums_of(state, head, head_dim);
  uint32_t *const weights = weights_of(state, head);
  const int keys = keys_of_vec(panel);
  const float scale = finish_scores(params, work, state, tile, panel, head, from / keys, to / keys,
                                    query_factor(params, work.head_begin + head), s);
  Online &online = state.online[head];
  const bool agree = rows_agree(panel);
  if (weigh_rows<Operands, kLanes>(s, from, to, scale, head_dim, online, weights, !agree, fetch)) {
    rescale_rows(sums, whole_lines(head_dim), kLanes, online.factor);
  }
  if (agree) return;
  const uint8_t *const v = head_data<T>(params.v_cache, work, head);
  for_visible_keys(
      panel, [](int, int) {},
      [&](int r, int begin, int end) {
        add_float8_values_alone<T>(v, tile, begin, end, head_dim, s + r, kLanes, sums + r * kWidth);
      });
  keep_weights<Operands, kLanes>(s, from, to, panel.all_begin, panel.all_end, weights);
}

// The products of weights and values that all rows see, line after line of all heads.
template <class T, int kParts>
static void multiply_float8_values(const AttentionParams &params, const AttentionWork &work, const State &state,
                                   const TileKeys &tile, int from, int to, Fetch<T> &fetch) {
  const Panel &panel = state.panels[0];
  const int head_dim = params.head_dim, lanes = panel.lanes;
  const TileShape rows{static_cast<uint8_t>(panel.rows), 64};
  constexpr TileShape kValues{kTileRows, 64};
  configure_tiles({rows, rows, rows, rows, rows, kValues, kValues, kValues});
  char *const pieces[2] = {state.value_tiles, state.value_tiles + kLineDims / kWidth * kTileBytes};
  const auto widen = [&](int first, int d, int64_t head, char *piece) {
    widen_values<T>(head_data<T>(params.v_cache, work, head) + d, tile, first, panel.all_begin, panel.all_end,
                    head_dim - d, piece, fetch);
  };
  widen(from, 0, 0, pieces[0]);
  int at = 0;
  for (int64_t head = 0; head < state.num_heads; ++head) {
    for (int d = 0; d < head_dim; d += kLineDims) {
      float *const sums = float8_sums_of(state, head, head_dim) + d * lanes;
      load_float8_sums(sums, lanes);
      for (int first = from; first < to; first += kTileDepth, at = 1 - at) {
        if (first + kTileDepth < to) {
          widen(first + kTileDepth, d, head, pieces[1 - at]);
        } else if (d + kLineDims < head_dim) {
          widen(from, d + kLineDims, head, pieces[1 - at]);
        } else if (head + 1 < state.num_heads) {
          widen(from, 0, head + 1, pieces[1 - at]);
        }
        add_float8_values<kParts>(weights_of(state, head) + PairedWeights<kParts>::offset(first, lanes), lanes,
                                  pieces[at]);
      }
      store_float8_sums(sums, lanes);
    }
  }
}

// Scores of all heads, then their weights, then values, as over bfloat16.
template <class T, int kParts>
static void float8_rows_tile(const AttentionParams &params, const AttentionWork &work, State &state,
                             const TileKeys &tile, const TileKeys &next) {
  const Panel &panel = state.panels[0];
  if (panel.any_begin >= panel.any_end) return;
  Fetch<T> values_ahead(params.v_cache, work, tile.v, tile.count, params.head_dim);
  Fetch<T> keys_ahead(params.k_cache, work, next.k, next.count, params.head_dim);
  score_float8_rows<T, kParts>(params, work, state, tile, values_ahead);
  const int from = panel.any_begin / kTileDepth * kTileDepth;
  const int to = static_cast<int>(round_up(panel.any_end, kTileDepth));
  with_lanes(panel.lanes, [&](auto count) {
    for (int64_t head = 0; head < state.num_heads; ++head) {
      weigh_float8_head<T, kParts, decltype(count)::value>(params, work, state, tile, from, to, head, keys_ahead);
    }
  });
  if (panel.all_begin >= panel.all_end) return;
  multiply_float8_values<T, kParts>(params, work, state, tile, from, to, keys_ahead);
}

// Sums to rows, which take the queries' place.  Returns whether none is NaN, as of an infinite factor and one whose
// second part is zero.
static bool finish_float8_rows(const AttentionParams &params, State &state) {
  const int head_dim = params.head_dim;
  VecI odd = {};
  for (int64_t head = 0; head < state.num_heads; ++head) {
    for (int64_t row = 0; row < state.rows; ++row) {
      const float *src = float8_sums_of(state, head, head_dim) + row * kWidth;
      float *const dst = state.q + (head * state.rows + row) * state.row_stride;
      for (int d = 0; d < head_dim; d += kLineDims) {
        alignas(64) float values[kLineDims], line[kLineDims];
        for (int i = 0; i < kLineDims; i += kWidth, src += state.lanes * kWidth) {
          const Vec x = load(src);
          odd |= x != x;
          store(values + i, x);
        }
        reorder_line(values, line);
        for (int i = 0; i < kLineDims && d + i < head_dim; i += kWidth) store(dst + d + i, load(line + i));
      }
    }
  }
  state.acc = state.q;
  return !any(odd);
}

#else

// No such registers.
static int64_t float8_rows_keys(const AttentionParams &) { return kTileKeys; }
template <int kParts>
static void start_float8_rows(const AttentionParams &, const AttentionWork &, State &) {}
template <class T, int kParts>
static void float8_rows_tile(const AttentionParams &, const AttentionWork &, State &, const TileKeys &,
                             const TileKeys &) {}
static bool finish_float8_rows(const AttentionParams &, State &) { return true; }

#endif

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
