// Operands of tile registers: queries, keys and values as tiles of 16 rows of 32 bfloat16.
//
// SPDX-License-Identifier: Apache-2.0
//
// Dimensions are padded to a multiple of 32, keys too, with zeros.
#pragma once

#include "kernels/fetch.h"
#include "kernels/tile_products.h"

#if defined(PAGEDATTN_TILES)

namespace pagedattn::cpu::PAGEDATTN_ISA {

// Up to 32 bfloat16 of a row, zeros behind its end.
PA_INLINE VecU load_depth(const uint16_t *row, int left) {
  if (left >= kTileDepth) return load_as<VecU>(row);
  VecU padded = {};
  __builtin_memcpy(&padded, row, static_cast<size_t>(left) * sizeof(*row));
  return padded;
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

// A panel's queries as [pair of dimensions][lane].
PA_INLINE float *queries_of(const State &state, int64_t head, const Panel &panel) {
  return state.q + (head * state.lanes + panel.first_lane) * state.lane_dims / 2;
}
static void pack_queries(const AttentionParams &params, const AttentionWork &work, const State &state, int64_t head,
                         const Panel &panel) {
  float *const dst = queries_of(state, head, panel);
  for (int lane = 0; lane < kMaxLanes; lane += kWidth) {
    const uint16_t *rows[kWidth];
    const int count = panel.rows - lane < kWidth ? panel.rows - lane : kWidth;
    for (int i = 0; i < count; ++i) {
      const QueryRow at = query_row(state, work, head, panel.first + lane + i);
      rows[i] = static_cast<const uint16_t *>(params.q.data) + at.token * params.q.token_stride +
                at.head * params.q.head_stride;
      // All rows at once: one after the other their lines would be waited for.
      for (int d = 0; d < params.head_dim; d += kTileDepth) prefetch<Cache::kL1>(rows[i] + d);
    }
    for (int d = 0; d < params.head_dim; d += kTileDepth) {
      VecU square[kWidth] = {};
      for (int i = 0; i < count; ++i) square[i] = load_depth(rows[i] + d, params.head_dim - d);
      transpose_pairs(square);
      for (int i = 0; i < kWidth; ++i) store_as(dst + (d / 2 + i) * kMaxLanes + lane, square[i]);
    }
  }
}

// Keys as tiles [32 keys][32 dimensions][2] of 16 keys.
static void pack_keys(const uint16_t *k, const TileKeys &chunk, int head_dim, char *tiles) {
  const int64_t tiles_of_keys = round_up(head_dim, kTileDepth) / kTileDepth * 2 * kTileBytes;
  for (int j = 0; j < round_up(chunk.count, kTileDepth); ++j) {
    char *dst = tiles + j / kTileDepth * tiles_of_keys + j % kTileDepth * 64;
    for (int d = 0; d < head_dim; d += kTileDepth, dst += 2 * kTileBytes) {
      store_as(dst, j < chunk.count ? load_depth(k + chunk.k[j] + d, head_dim - d) : VecU{});
    }
  }
}

constexpr int64_t kValueStride = kMaxChunkKeys / kTileDepth * 2 * kTileBytes;

// Values as tiles [32 dimensions][32 keys of the most in a chunk][2] of 16 dimensions; zeros for odd keys.
static void pack_values(const uint16_t *v, const TileKeys &chunk, int head_dim, const bool *odd, char *tiles) {
  const int64_t dims = round_up(head_dim, kTileDepth);
  for (int first = 0; first < chunk.count; first += kTileDepth) {
    char *const dst = tiles + first / kTileDepth * 2 * kTileBytes;
    for (int d = 0; d < dims; d += kWidth) {
      const auto value = [&](int j) __attribute__((always_inline)) {
        if (j >= chunk.count || odd[j] || d >= head_dim) return VecU{};
        VecU16 row = {};
        if (head_dim - d >= kWidth) {
          row = load_as<VecU16>(v + chunk.v[j] + d);
        } else {
          __builtin_memcpy(&row, v + chunk.v[j] + d, static_cast<size_t>(head_dim - d) * sizeof(*v));
        }
        return widen(row);
      };
      VecU square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = value(first + 2 * i) | (value(first + 2 * i + 1) << 16);
      transpose_pairs(square);
      char *const tile = dst + d / kTileDepth * kValueStride + d % kTileDepth / kWidth * kTileBytes;
      for (int i = 0; i < kWidth; ++i) store_as(tile + 64 * i, square[i]);
    }
  }
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
