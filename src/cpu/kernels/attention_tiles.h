// A tile for many query rows over bfloat16 (prefill, large groups), on AMX's tile registers.
//
// SPDX-License-Identifier: Apache-2.0
//
// The same two products as in attention_packed.h, S^T = K Q^T and O^T += V^T P^T, with query rows as columns of tiles.
// Left operands are rows of 32 bfloat16: keys are that as they lie in the cache, values are transposed once a tile for
// all rows.  Right operands hold pairs: queries once for all tiles, weights after each softmax.  A micro-kernel keeps 2
// x 2 tiles of sums, so that each tile loaded is used twice.  Queries keep their 8 bits of precision: what multiplies a
// score is left to the softmax.
#pragma once

#include "kernels/attention_packed.h"
#include "kernels/tile_registers.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

#if defined(PAGEDATTN_TILES)

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;  // bfloat16 in a row of a tile
// Bytes from one key, or dimension, to the next in packed keys and values: a line more than they take, so that a tile's
// rows spread over the sets of L1.
constexpr int64_t key_stride(int head_dim) { return 2 * head_dim + 64; }
constexpr int64_t kValueStride = 2 * kTileKeys + 64;

static bool tiles_serve(const AttentionParams &params) {
  return params.q_dtype == DType::kBFloat16 && params.kv_dtype == DType::kBFloat16 && params.scale > 0.0f &&
         params.head_dim % kTileDepth == 0;
}

// Transposes a square of 16 x 16 pairs of bfloat16.
PA_INLINE void transpose_pairs(VecU (&square)[kWidth]) {
  Vec r[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) r[i] = as_float(square[i]);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) square[i] = as_bits(r[i]);
}

// Queries as pairs of dimensions, [pair][lane]; sums cleared.
static void start_tiles(const AttentionParams &params, const AttentionWork &work, State &state) {
  const int head_dim = params.head_dim;
  for (int64_t head = 0; head < state.num_heads; ++head) {
    float *const q = state.q + head * state.lanes * head_dim;
    for_row_vectors(state, [&](const Panel &panel, int lane, int rows) {
      float *const dst = q + panel.first_lane * head_dim + lane;
      for (int d = 0; d < head_dim; d += kTileDepth) {
        VecU square[kWidth] = {};
        for (int i = 0; i < rows; ++i) {
          const QueryRow at = query_row(state, work, head, panel.first + lane + i);
          square[i] = load_as<VecU>(static_cast<const uint16_t *>(params.q.data) + at.token * params.q.token_stride +
                                    at.head * params.q.head_stride + d);
        }
        transpose_pairs(square);
        for (int i = 0; i < kWidth; ++i) store_as(dst + (d / 2 + i) * panel.lanes, square[i]);
      }
    });
  }
  const int64_t size = state.num_heads * state.lanes * head_dim;
  __builtin_memset(state.acc, 0, static_cast<size_t>(size) * sizeof(float));
  constexpr TileShape kFull{16, 64};
  configure_tiles({kFull, kFull, kFull, kFull, kFull, kFull, kFull, kFull});
}

static void finish_tiles() { release_tiles(); }

// Keys, one after the other, up to a multiple of 32: zeros behind the last.
static void copy_keys(const uint16_t *k, const TileKeys &tile, int head_dim, char *keys, Fetch<BFloat16> &fetch) {
  const int lines = fetch.lines_of_row(head_dim);
  for (int j = 0; j < round_up(tile.count, 2 * kTileRows); ++j) {
    char *const dst = keys + j * key_stride(head_dim);
    fetch.lines(lines);
    for (int d = 0; d < head_dim; d += kTileDepth) {
      store_as(dst + 2 * d, j < tile.count ? load_as<VecU>(k + tile.k[j] + d) : VecU{});
    }
  }
}

// Values as [dimension][key], up to a multiple of 32 keys: zeros behind the last and for odd keys.
static void transpose_values(const uint16_t *v, const TileKeys &tile, int head_dim, const bool *odd, char *values,
                             Fetch<BFloat16> &fetch) {
  const int lines = fetch.lines_of_row(head_dim);
  for (int first = 0; first < tile.count; first += kTileDepth) {
    fetch.lines(kTileDepth * lines);
    for (int d = 0; d < head_dim; d += kWidth) {
      const auto value = [&](int j) __attribute__((always_inline)) {
        return j < tile.count && !odd[j] ? widen(load_as<VecU16>(v + tile.v[j] + d)) : VecU{};
      };
      VecU square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = value(first + 2 * i) | (value(first + 2 * i + 1) << 16);
      transpose_pairs(square);
      for (int i = 0; i < kWidth; ++i) store_as(values + (d + i) * kValueStride + 2 * first, square[i]);
    }
  }
}

// Scores of 32 keys with a panel of 1 or 2 vectors of queries.
template <int kVecs>
PA_KERNEL void tile_scores(const float *q, const char *keys, int head_dim, float *s) {
  constexpr int64_t kLaneStride = kVecs * kWidth * 4;
  const int64_t stride = key_stride(head_dim);
  tile_zero<0>();
  tile_zero<2>();
  if constexpr (kVecs == 2) {
    tile_zero<1>();
    tile_zero<3>();
  }
  for (int d = 0; d < head_dim; d += kTileDepth) {
    const float *pairs = q + d / 2 * kVecs * kWidth;
    tile_load<6>(pairs, kLaneStride);
    tile_load<4>(keys + 2 * d, stride);
    tile_multiply<0, 4, 6>();
    tile_load<5>(keys + kTileRows * stride + 2 * d, stride);
    tile_multiply<2, 5, 6>();
    if constexpr (kVecs == 2) {
      tile_load<7>(pairs + kWidth, kLaneStride);
      tile_multiply<1, 4, 7>();
      tile_multiply<3, 5, 7>();
    }
  }
  float *const below = s + kTileRows * kVecs * kWidth;
  tile_store<0>(s, kLaneStride);
  tile_store<2>(below, kLaneStride);
  if constexpr (kVecs == 2) {
    tile_store<1>(s + kWidth, kLaneStride);
    tile_store<3>(below + kWidth, kLaneStride);
  }
}

// 32 dimensions of the result [dimension][lane] of a panel, with weights in pairs of keys.
template <int kVecs>
PA_KERNEL void tile_values(float *acc, const float *pairs, const char *values, int num_keys) {
  constexpr int64_t kLaneStride = kVecs * kWidth * 4;
  float *const below = acc + kTileRows * kVecs * kWidth;
  tile_load<0>(acc, kLaneStride);
  tile_load<2>(below, kLaneStride);
  if constexpr (kVecs == 2) {
    tile_load<1>(acc + kWidth, kLaneStride);
    tile_load<3>(below + kWidth, kLaneStride);
  }
  for (int j = 0; j < num_keys; j += kTileDepth) {
    const float *right = pairs + j / 2 * kVecs * kWidth;
    tile_load<6>(right, kLaneStride);
    tile_load<4>(values + 2 * j, kValueStride);
    tile_multiply<0, 4, 6>();
    tile_load<5>(values + kTileRows * kValueStride + 2 * j, kValueStride);
    tile_multiply<2, 5, 6>();
    if constexpr (kVecs == 2) {
      tile_load<7>(right + kWidth, kLaneStride);
      tile_multiply<1, 4, 7>();
      tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(acc, kLaneStride);
  tile_store<2>(below, kLaneStride);
  if constexpr (kVecs == 2) {
    tile_store<1>(acc + kWidth, kLaneStride);
    tile_store<3>(below + kWidth, kLaneStride);
  }
}

// Weights [from, to) of [key][lane], in bfloat16 and in pairs of keys, to the front; zeros where no lane sees the key.
template <int kVecs>
PA_KERNEL void pair_weights(const Panel &panel, int from, int to, float *s) {
  for (int j = from; j < to; j += 2) {
    for (int c = 0; c < kVecs * kWidth; c += kWidth) {
      const auto weight = [&](int key) __attribute__((always_inline)) {
        const bool seen = key >= panel.any_begin && key < panel.any_end;
        return seen ? load(s + key * kVecs * kWidth + c) : zero();
      };
      const Vec even = weight(j), odd = weight(j + 1);
      store_pair<BFloat16>(reinterpret_cast<uint16_t *>(s + (j - from) / 2 * kVecs * kWidth + c), even, odd);
    }
  }
}

// Scores, softmax and values of all heads.
static void tiles_tile(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &tile,
                       const TileKeys &next) {
  constexpr int kStep = 2 * kTileRows;
  static_assert(kStep == kTileDepth && kWidth == kTileRows && kPackedVecs == 2);
  const int head_dim = params.head_dim;
  char *const keys = reinterpret_cast<char *>(state.key_rows);
  char *const values = reinterpret_cast<char *>(state.value_columns);
  Fetch<BFloat16> keys_ahead(params.k_cache, work, next.k, next.count, head_dim);
  Fetch<BFloat16> values_ahead(params.v_cache, work, next.v, next.count, head_dim);
  for (int64_t head = 0; head < state.num_heads; ++head) {
    const float scale = query_factor(params, work.head_begin + head);
    const auto *v = head_data<BFloat16>(params.v_cache, work, head);
    bool odd[kTileKeys];
    copy_keys(head_data<BFloat16>(params.k_cache, work, head), tile, head_dim, keys, keys_ahead);
    find_odd_keys<BFloat16>(v, state, tile, head_dim, odd);
    transpose_values(v, tile, head_dim, odd, values, values_ahead);
    for (int p = 0; p < state.num_panels; ++p) {
      const Panel &panel = state.panels[p];
      if (panel.any_begin >= panel.any_end) continue;
      const int64_t offset = (head * state.lanes + panel.first_lane) * head_dim;
      float *const acc = state.acc + offset;
      Online &online = state.online[head * state.num_panels + p];
      const int from = panel.any_begin / kStep * kStep;
      const int to = static_cast<int>(round_up(panel.any_end, kStep));
      with_count<kPackedVecs>(panel.lanes / kWidth, [&](auto count) {
        constexpr int kVecs = decltype(count)::value;
        for (int j = from; j < to; j += kStep) {
          tile_scores<kVecs>(state.q + offset, keys + j * key_stride(head_dim), head_dim,
                             state.scores + j * kVecs * kWidth);
        }
        if (softmax_panel(params, work, state, tile, panel, head, scale, state.scores, online)) {
          rescale_lanes<kVecs>(acc, head_dim, online.factor);
        }
        add_odd_keys<BFloat16>(panel, tile, head_dim, state.scores, v, odd, acc);
        pair_weights<kVecs>(panel, from, to, state.scores);
        for (int d = 0; d < head_dim; d += kStep) {
          tile_values<kVecs>(acc + d * kVecs * kWidth, state.scores, values + d * kValueStride + 2 * from, to - from);
        }
      });
    }
  }
}

#else

// No such registers.
static bool tiles_serve(const AttentionParams &) { return false; }
static void start_tiles(const AttentionParams &, const AttentionWork &, State &) {}
static void tiles_tile(const AttentionParams &, const AttentionWork &, State &, const TileKeys &, const TileKeys &) {}
static void finish_tiles() {}

#endif

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
