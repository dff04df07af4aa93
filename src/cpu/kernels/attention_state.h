// The state of one work item: converted queries, online-softmax rows, and where the keys of a tile lie.
//
// SPDX-License-Identifier: Apache-2.0
//
// A state row is a (KV head, packed row) pair, numbered head-major: (head - head_begin) * num_rows + row.
// Scores are kept in base 2, so that exponentials are 2**x: log2(e) is folded into the queries, or into the factor
// behind tanh where a softcap is on.
#pragma once

#include "kernels/convert.h"
#include "kernels/kernels.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

constexpr int kTileKeys = 64;       // keys whose scores are in flight; K and V of a head's tile stay in L1 and L2
constexpr int kPanel = 2 * kWidth;  // columns of a micro-kernel
constexpr int kScoreStride = kTileKeys + 8;  // groups of keys at the end of a tile may store a little past it

constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = __builtin_inff();

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Offsets (elements) of the keys and values of one tile, for KV head 0.
struct TileKeys {
  int64_t first = 0;  // number of the first key
  int count = 0;
  int64_t k[kTileKeys];
  int64_t v[kTileKeys];
};

struct State {
  int64_t rows;       // packed rows
  int64_t num_heads;  // KV heads
  int64_t group;
  int64_t row_stride;      // of q and acc
  float *q;                // [num_heads * rows, row_stride], scaled
  float *acc;              // [num_heads * rows, row_stride]
  float *row_max;          // [num_heads * rows]
  float *row_sum;          // [num_heads * rows]
  float *scores;           // [rows, kScoreStride]
  float *k_panels;         // [kTileKeys / kPanel, head_dim, kPanel]
  float *v_panels;         // [row_stride / kPanel, kTileKeys, kPanel]
  int64_t *visible_begin;  // [rows] keys that a row sees
  int64_t *visible_end;
  int *tile_begin;  // [rows] the same, within the tile at hand
  int *tile_end;
  TileKeys *keys;  // two tiles: the one at hand and the next
};

// Lays the arrays out from `base` on; with a null base only the size counts.
static size_t lay_out(State &state, const AttentionParams &params, void *base) {
  size_t used = 0;
  const auto take = [&](auto *&array, int64_t count) {
    array = reinterpret_cast<decltype(+array)>(reinterpret_cast<uintptr_t>(base) + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(*array)), 64));
  };
  state.row_stride = round_up(params.head_dim, kPanel);
  take(state.q, kMaxStateRows * state.row_stride);
  take(state.acc, kMaxStateRows * state.row_stride);
  take(state.row_max, kMaxStateRows);
  take(state.row_sum, kMaxStateRows);
  take(state.scores, kMaxStateRows * kScoreStride);
  take(state.k_panels, kTileKeys * params.head_dim);
  take(state.v_panels, kTileKeys * state.row_stride);
  take(state.visible_begin, kMaxStateRows);
  take(state.visible_end, kMaxStateRows);
  take(state.tile_begin, kMaxStateRows);
  take(state.tile_end, kMaxStateRows);
  take(state.keys, 2);
  return used;
}

struct QueryRow {
  int64_t token;  // in the whole batch
  int64_t head;   // query head
};

static QueryRow query_row(const State &state, const AttentionWork &work, int64_t head, int64_t row) {
  const int64_t packed = work.row_begin + row;
  return {work.query_start + packed / state.group, (work.head_begin + head) * state.group + packed % state.group};
}

static float scale_of(const Scale &scale, int64_t kv_head) {
  return scale.ptr == nullptr ? scale.value : scale.ptr[scale.per_head ? kv_head : 0];
}

static State make_state(const AttentionParams &params, const AttentionWork &work, void *scratch) {
  State state;
  lay_out(state, params, scratch);
  state.rows = work.row_end - work.row_begin;
  state.num_heads = work.head_end - work.head_begin;
  state.group = params.num_q_heads / params.num_kv_heads;
  for (int64_t row = 0; row < state.rows; ++row) {
    const int64_t position = work.seq_len - work.query_len + (work.row_begin + row) / state.group;
    int64_t end = params.causal ? position + 1 : work.seq_len;
    if (end < 0) end = 0;
    const int64_t begin = params.window > 0 && end > params.window ? end - params.window : 0;
    state.visible_begin[row] = begin;
    state.visible_end[row] = end;
  }
  return state;
}

// Converts the queries to fp32 with everything that multiplies a score folded in, and clears the accumulators.
static void start_rows(const AttentionParams &params, const AttentionWork &work, State &state) {
  for (int64_t head = 0; head < state.num_heads; ++head) {
    float factor = params.scale * scale_of(params.k_scale, work.head_begin + head);
    factor = params.softcap > 0.0f ? factor / params.softcap : factor * kLog2e;
    for (int64_t row = 0; row < state.rows; ++row) {
      const QueryRow at = query_row(state, work, head, row);
      const int64_t offset = at.token * params.q.token_stride + at.head * params.q.head_stride;
      float *q = state.q + (head * state.rows + row) * state.row_stride;
      with_dtype(params.q_dtype, [&](auto tag) {
        using T = decltype(tag);
        const auto *src = static_cast<const typename T::Storage *>(params.q.data) + offset;
        int64_t d = 0;
        for (; d + kWidth <= params.head_dim; d += kWidth) store(q + d, T::load(src + d) * factor);
        if (d < params.head_dim) store(q + d, load_partial<T>(src + d, params.head_dim - d) * factor);
      });
    }
  }
  const int64_t rows = state.num_heads * state.rows;
  __builtin_memset(state.acc, 0, static_cast<size_t>(rows * state.row_stride) * sizeof(float));
  for (int64_t i = 0; i < rows; ++i) {
    state.row_max[i] = -kInfinity;
    state.row_sum[i] = 0.0f;
  }
}

// A cache's data from one KV head on.
template <class T>
static const typename T::Storage *head_data(const CacheView &cache, const AttentionWork &work, int64_t head) {
  return static_cast<const typename T::Storage *>(cache.data) + (work.head_begin + head) * cache.head_stride;
}

// Finds the keys [first, first + count) through the block table, of which it reads only their entries.
static void locate_keys(const AttentionParams &params, const AttentionWork &work, int64_t first, TileKeys &tile) {
  const int64_t left = work.kv_end - first;
  tile.first = first;
  tile.count = static_cast<int>(left < kTileKeys ? left : kTileKeys);
  const int32_t *table = params.block_tables + work.seq * params.block_table_stride;
  int64_t block = first / params.block_size;
  int64_t slot = first % params.block_size;
  for (int i = 0; i < tile.count;) {
    const int64_t physical = table[block];
    const int64_t k = physical * params.k_cache.block_stride;
    const int64_t v = physical * params.v_cache.block_stride;
    for (; slot < params.block_size && i < tile.count; ++slot, ++i) {
      tile.k[i] = k + slot * params.k_cache.token_stride;
      tile.v[i] = v + slot * params.v_cache.token_stride;
    }
    ++block;
    slot = 0;
  }
}

// The visible keys of each row within the tile.  Both bounds grow with the row.
static void clip_rows(State &state, const TileKeys &tile) {
  const auto clip = [&](int64_t key) {
    const int64_t i = key - tile.first;
    return static_cast<int>(i < 0 ? 0 : (i > tile.count ? tile.count : i));
  };
  for (int64_t row = 0; row < state.rows; ++row) {
    state.tile_begin[row] = clip(state.visible_begin[row]);
    state.tile_end[row] = clip(state.visible_end[row]);
  }
}

// A count known at compile time, as an argument.
template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f with Count<n>, 1 <= n <= kMax.
template <int kMax, class F>
PA_INLINE void with_count(int64_t n, F f) {
  if constexpr (kMax > 1) {
    if (n < kMax) {
      with_count<kMax - 1>(n, f);
      return;
    }
  }
  f(Count<kMax>{});
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
