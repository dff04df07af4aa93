// A tile for many query rows (prefill, large groups): two small matrix products with query rows in the lanes.
//
// SPDX-License-Identifier: Apache-2.0
//
// S^T = K Q^T and O^T += V^T P^T.  Queries are transposed once for all tiles and the result once at the end; a tile's
// keys and values are converted to fp32 once, untransposed, for all rows (fp32 keys not even that), and their elements
// are broadcast.  A micro-kernel keeps kMicro x up to kPackedVecs vectors of sums in registers, so its bound is the
// multiplier: 12 (24) fused multiply-adds for every 3 vector loads and 4 (8) broadcasts with 16 (32) registers.  Panels
// of rows are the outer loop: a panel's queries and scores stay in L1 while keys and values stream from L2.
#pragma once

#include "kernels/attention_finish.h"
#include "kernels/fetch.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

// Keys, or dimensions of values, of a micro-kernel.  Head dimensions are a multiple of 8, the number of keys need not
// be.
constexpr int kMicro = kRegisters == 32 ? 8 : 4;
// Floats from kMicro dimensions of a tile's values to the next: a line more than they take, since what one key writes
// would otherwise fall on a few sets of L1.
constexpr int kColumnStride = kTileKeys * kMicro + 16;

// sum[i] += scalar(i, n) * lanes[n], over n.
template <int kVecs, class Scalar>
PA_INLINE void multiply(Vec (&sum)[kMicro][kVecs], const float *lanes, int begin, int end, Scalar scalar) {
  for (int n = begin; n < end; ++n) {
    Vec row[kVecs];
#pragma GCC unroll 3
    for (int c = 0; c < kVecs; ++c) row[c] = load(lanes + (n * kVecs + c) * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kMicro; ++i) {
      const Vec x = broadcast(scalar(i, n));
#pragma GCC unroll 3
      for (int c = 0; c < kVecs; ++c) sum[i][c] = fma(x, row[c], sum[i][c]);
    }
  }
}

// Scores of kMicro keys with a panel of queries [dimension][lane].
template <int kVecs>
PA_KERNEL void packed_scores(const float *q, const float *const *keys, int head_dim, float *s) {
  const float *key[kMicro];
  for (int i = 0; i < kMicro; ++i) key[i] = keys[i];
  Vec sum[kMicro][kVecs] = {};
  multiply<kVecs>(sum, q, 0, head_dim, [&](int i, int d) __attribute__((always_inline)) { return key[i][d]; });
#pragma GCC unroll 8
  for (int i = 0; i < kMicro; ++i) {
#pragma GCC unroll 3
    for (int c = 0; c < kVecs; ++c) store(s + (i * kVecs + c) * kWidth, sum[i][c]);
  }
}

// kMicro dimensions of the result [dimension][lane] of a panel, with weights [key][lane] and values [key][kMicro].
template <int kVecs>
PA_KERNEL void packed_values(float *acc, const float *weights, const float *values, int begin, int end) {
  Vec sum[kMicro][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kMicro; ++i) {
#pragma GCC unroll 3
    for (int c = 0; c < kVecs; ++c) sum[i][c] = load(acc + (i * kVecs + c) * kWidth);
  }
  multiply<kVecs>(sum, weights, begin, end,
                  [&](int i, int j) __attribute__((always_inline)) { return values[j * kMicro + i]; });
#pragma GCC unroll 8
  for (int i = 0; i < kMicro; ++i) {
#pragma GCC unroll 3
    for (int c = 0; c < kVecs; ++c) store(acc + (i * kVecs + c) * kWidth, sum[i][c]);
  }
}

// Where each key lies in fp32, kMicro behind the last one included, which repeat it.
template <class T>
static void unpack_keys(const typename T::Storage *k, const TileKeys &tile, int head_dim, const State &state,
                        const float **keys, Fetch<T> &fetch) {
  const int padded = static_cast<int>(round_up(tile.count, kMicro));
  const int lines = fetch.lines_of_row(head_dim);
  for (int j = 0; j < tile.count; ++j) {
    const auto *src = k + tile.k[j];
    fetch.lines(lines);
    if constexpr (sizeof(typename T::Storage) == sizeof(float)) {
      keys[j] = src;
    } else {
      float *dst = state.key_rows + j * state.row_stride;
      keys[j] = dst;
      for (int d = 0; d < head_dim; d += kWidth) store(dst + d, load_tail<T>(src + d, head_dim - d));
    }
  }
  for (int j = tile.count; j < padded; ++j) keys[j] = keys[tile.count - 1];
}

// Marks keys that only some rows see and whose values are not all finite: a weight of 0 does not cancel those.
template <class T>
static void find_odd_keys(const typename T::Storage *v, const State &state, const TileKeys &tile, int head_dim,
                          bool *odd) {
  // Both bounds grow with the row.
  const int all_begin = state.panels[state.num_panels - 1].all_begin;
  const int all_end = state.panels[0].all_end;
  for (int j = 0; j < tile.count; ++j) {
    odd[j] = false;
    if (j >= all_begin && j < all_end) continue;
    for (int d = 0; d < head_dim; d += kWidth) {
      const Vec value = load_tail<T>(v + tile.v[j] + d, head_dim - d);
      odd[j] |= any(!(value - value == zero()));
    }
  }
}

// Values as [kMicro dimensions][key][kMicro]; zeros for odd keys.
template <class T>
static void unpack_values(const typename T::Storage *v, const TileKeys &tile, int head_dim, const State &state,
                          const bool *odd, Fetch<T> &fetch) {
  constexpr int kPart = kMicro < kWidth ? kMicro : kWidth;
  const int lines = fetch.lines_of_row(head_dim);
  for (int j = 0; j < tile.count; ++j) {
    const auto *src = v + tile.v[j];
    fetch.lines(lines);
    float *dst = state.value_columns + j * kMicro;
    for (int d = 0; d < head_dim; d += kWidth) {
      const Vec value = odd[j] ? zero() : load_tail<T>(src + d, head_dim - d);
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; i += kPart) {
        float *to = dst + (d + i) / kMicro * kColumnStride + (d + i) % kMicro;
        __builtin_memcpy(to, reinterpret_cast<const float *>(&value) + i, kPart * sizeof(float));
      }
    }
  }
}

// The products of weights and values of odd keys, for the rows that see them.
template <class T>
static void add_odd_keys(const Panel &panel, const TileKeys &tile, int head_dim, const float *weights,
                         const typename T::Storage *v, const bool *odd, float *acc) {
  for (int j = panel.any_begin; j < panel.any_end; ++j) {
    if (!odd[j]) continue;
    for (int lane = 0; lane < panel.rows; ++lane) {
      if (j < panel.begin[lane] || j >= panel.end[lane]) continue;
      for (int d = 0; d < head_dim; ++d) {
        acc[d * panel.lanes + lane] += weights[j * panel.lanes + lane] * load_partial<T>(v + tile.v[j] + d, 1)[0];
      }
    }
  }
}

// What a panel accumulated, [dimension][lane], after a maximum rose.
template <int kVecs>
PA_KERNEL void rescale_lanes(float *acc, int head_dim, const float *factor) {
  for (int d = 0; d < head_dim; ++d, acc += kVecs * kWidth) {
#pragma GCC unroll 3
    for (int c = 0; c < kVecs * kWidth; c += kWidth) store(acc + c, load(acc + c) * load(factor + c));
  }
}

// Calls f(panel, lane, rows of it from there, at most kWidth) for all vectors of rows.
template <class F>
PA_INLINE void for_row_vectors(const State &state, F f) {
  for (int p = 0; p < state.num_panels; ++p) {
    const Panel &panel = state.panels[p];
    for (int lane = 0; lane < panel.lanes; lane += kWidth) {
      f(panel, lane, panel.rows - lane < kWidth ? panel.rows - lane : kWidth);
    }
  }
}

// Queries in fp32, transposed, with everything that multiplies a score folded in; sums cleared.
static void start_packed(const AttentionParams &params, const AttentionWork &work, State &state) {
  const int head_dim = params.head_dim;
  for (int64_t head = 0; head < state.num_heads; ++head) {
    const float factor = query_factor(params, work.head_begin + head);
    float *const q = state.q + head * state.lanes * head_dim;
    with_dtype(params.q_dtype, [&](auto tag) {
      using T = decltype(tag);
      for_row_vectors(state, [&](const Panel &panel, int lane, int rows) {
        const typename T::Storage *src[kWidth];
        for (int i = 0; i < rows; ++i) {
          const QueryRow at = query_row(state, work, head, panel.first + lane + i);
          src[i] = static_cast<const typename T::Storage *>(params.q.data) + at.token * params.q.token_stride +
                   at.head * params.q.head_stride;
          // All rows at once: one after the other their lines would be waited for.
          for (int d = 0; d < head_dim; d += 64 / static_cast<int>(sizeof(typename T::Storage))) {
            prefetch<Cache::kL1>(src[i] + d);
          }
        }
        float *const dst = q + panel.first_lane * head_dim + lane;
        for (int d = 0; d < head_dim; d += kWidth) {
          const int dims = head_dim - d < kWidth ? head_dim - d : kWidth;
          Vec square[kWidth] = {};
          for (int i = 0; i < rows; ++i) square[i] = load_tail<T>(src[i] + d, dims) * factor;
          transpose(square);
          for (int i = 0; i < dims; ++i) store(dst + (d + i) * panel.lanes, square[i]);
        }
      });
    });
  }
  const int64_t size = state.num_heads * state.lanes * head_dim;
  __builtin_memset(state.acc, 0, static_cast<size_t>(size) * sizeof(float));
}

// The result back to rows, a vector of them at a time, which go where they belong while they are in L1.
static void finish_packed(const AttentionParams &params, const AttentionWork &work, const State &state) {
  const int head_dim = params.head_dim;
  float *const row_of_lane = state.scores;
  for (int64_t head = 0; head < state.num_heads; ++head) {
    const float *const acc = state.acc + head * state.lanes * state.lane_dims;
    for_row_vectors(state, [&](const Panel &panel, int lane, int rows) {
      const float *const src = acc + panel.first_lane * state.lane_dims + lane;
      for (int d = 0; d < head_dim; d += kWidth) {
        const int dims = head_dim - d < kWidth ? head_dim - d : kWidth;
        Vec square[kWidth] = {};
        for (int i = 0; i < dims; ++i) square[i] = load(src + (d + i) * panel.lanes);
        transpose(square);
        for (int i = 0; i < rows; ++i) store(row_of_lane + i * state.row_stride + d, square[i]);
      }
      for (int i = 0; i < rows; ++i) {
        const int64_t row = panel.first + lane + i;
        const float *const result = row_of_lane + i * state.row_stride;
        if (work.partial != nullptr) {
          save_row(params, work, head * state.rows + row, result);
        } else {
          finish_row(params, work, state, head, row, result);
        }
      }
    });
  }
  if (work.partial != nullptr) save_sums(params, work, state, 0);
}

// Scores, softmax and values of one head.
template <class T>
static void packed_head(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &tile,
                        int64_t head, Fetch<T> &keys_ahead, Fetch<T> &values_ahead) {
  const int head_dim = params.head_dim;
  const auto *v = head_data<T>(params.v_cache, work, head);
  const float *keys[kTileKeys];
  bool odd[kTileKeys];
  unpack_keys<T>(head_data<T>(params.k_cache, work, head), tile, head_dim, state, keys, keys_ahead);
  find_odd_keys<T>(v, state, tile, head_dim, odd);
  unpack_values<T>(v, tile, head_dim, state, odd, values_ahead);
  for (int p = 0; p < state.num_panels; ++p) {
    const Panel &panel = state.panels[p];
    if (panel.any_begin >= panel.any_end) continue;
    const int64_t offset = (head * state.lanes + panel.first_lane) * head_dim;
    float *acc = state.acc + offset;
    Online &online = state.online[head * state.num_panels + p];
    with_count<kPackedVecs>(panel.lanes / kWidth, [&](auto count) {
      constexpr int kVecs = decltype(count)::value;
      constexpr int kLanes = kVecs * kWidth;
      for (int j = panel.any_begin / kMicro * kMicro; j < panel.any_end; j += kMicro) {
        packed_scores<kVecs>(state.q + offset, keys + j, head_dim, state.scores + j * kLanes);
      }
      if (softmax_panel(params, work, state, tile, panel, head, state.scores, online)) {
        rescale_lanes<kVecs>(acc, head_dim, online.factor);
      }
      for (int d = 0; d < head_dim; d += kMicro) {
        packed_values<kVecs>(acc + d * kLanes, state.scores, state.value_columns + d / kMicro * kColumnStride,
                             panel.any_begin, panel.any_end);
      }
      add_odd_keys<T>(panel, tile, head_dim, state.scores, v, odd, acc);
    });
  }
}

template <class T>
static void packed_tile(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &tile,
                        const TileKeys &next) {
  Fetch<T> keys_ahead(params.k_cache, work, next.k, next.count, params.head_dim);
  Fetch<T> values_ahead(params.v_cache, work, next.v, next.count, params.head_dim);
  for (int64_t head = 0; head < state.num_heads; ++head) {
    packed_head<T>(params, work, state, tile, head, keys_ahead, values_ahead);
  }
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
