// Operands of tile registers: queries, keys and values as tiles of 16 rows of 32 bfloat16.
//
// SPDX-License-Identifier: Apache-2.0
//
// Dimensions are padded to a multiple of 32, keys too, with zeros.  Which dimension stands where among 32 does not
// matter as long as it is the same for queries and keys: those of bfloat16 stay as they lie, others pair with those 16
// further on.
#pragma once

#include "kernels/fetch.h"
#include "kernels/tile_parts.h"
#include "kernels/tile_products.h"

#if defined(PAGEDATTN_BFLOAT16_PRODUCTS)

namespace pagedattn::cpu::PAGEDATTN_ISA {

// Keys packed at once, at most: fewer where they take more memory, which is to be a part of L2.
template <int kParts>
constexpr int kChunkKeys = kParts == 1 ? kMaxChunkKeys : kMaxChunkKeys / 2;

// Up to 32 elements of a row, times `factor` if that is not 1 for all, with zeros behind its end; as they lie where
// queries and keys are bfloat16.
template <class T, int kParts, bool kAsTheyLie>
PA_INLINE Depth<kParts> load_depth(const typename T::Storage *row, int left, float factor, Range &range) {
  if constexpr (kAsTheyLie) {
    if (left >= kTileDepth) return {{load_as<VecU>(row)}};
    Depth<1> padded = {};
    __builtin_memcpy(&padded, row, static_cast<size_t>(left) * sizeof(*row));
    return padded;
  } else {
    Vec first = load_tail<T>(row, left);
    Vec second = left > kWidth ? load_tail<T>(row + kWidth, left - kWidth) : zero();
    if constexpr (kParts > 2) {
      first *= factor;
      second *= factor;
    }
    if constexpr (kParts > 1) {
      range.take(first);
      range.take(second);
    }
    return split<kParts>(first, second);
  }
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

// A panel's queries as [32 dimensions][part][pair of dimensions][lane].
template <int kParts>
PA_INLINE char *queries_of(const State &state, int64_t head, const Panel &panel) {
  const int64_t lane = head * state.lanes + panel.first_lane;
  return reinterpret_cast<char *>(state.q) + lane * state.lane_dims * 2 * kParts;
}
template <class T, int kParts, bool kAsTheyLie>
static void pack_queries(const AttentionParams &params, const AttentionWork &work, const State &state, int64_t head,
                         const Panel &panel, float factor, Range &range) {
  char *const dst = queries_of<kParts>(state, head, panel);
  for (int lane = 0; lane < kMaxLanes; lane += kWidth) {
    const typename T::Storage *rows[kWidth];
    const int count = panel.rows - lane < kWidth ? panel.rows - lane : kWidth;
    for (int i = 0; i < count; ++i) {
      const QueryRow at = query_row(state, work, head, panel.first + lane + i);
      rows[i] = static_cast<const typename T::Storage *>(params.q.data) + at.token * params.q.token_stride +
                at.head * params.q.head_stride;
      // All rows at once: one after the other their lines would be waited for.
      for (int d = 0; d < params.head_dim; d += 64 / static_cast<int>(sizeof(typename T::Storage))) {
        prefetch<Cache::kL1>(rows[i] + d);
      }
    }
    for (int d = 0; d < params.head_dim; d += kTileDepth) {
      VecU square[kParts][kWidth] = {};
      for (int i = 0; i < count; ++i) {
        const Depth<kParts> depth = load_depth<T, kParts, kAsTheyLie>(rows[i] + d, params.head_dim - d, factor, range);
        for (int p = 0; p < kParts; ++p) square[p][i] = depth.part[p];
      }
      for (int p = 0; p < kParts; ++p) {
        transpose_pairs(square[p]);
        char *const pairs = dst + (d / kTileDepth * kParts + p) * kRightBytes + lane * 4;
        for (int i = 0; i < kWidth; ++i) store_as(pairs + i * kPanelStride, square[p][i]);
      }
    }
  }
}

#if defined(PAGEDATTN_TILES)

// Keys as tiles [32 keys][32 dimensions][part][2] of 16 keys.
template <class T, int kParts, bool kAsTheyLie>
static void pack_keys(const typename T::Storage *k, const TileKeys &chunk, int head_dim, char *tiles, Range &range) {
  const int64_t tiles_of_keys = round_up(head_dim, kTileDepth) / kTileDepth * kParts * kLeftBytes;
  for (int j = 0; j < round_up(chunk.count, kTileDepth); ++j) {
    char *dst = tiles + j / kTileDepth * tiles_of_keys + j % kTileDepth * 64;
    for (int d = 0; d < head_dim; d += kTileDepth) {
      Depth<kParts> depth = {};
      if (j < chunk.count) depth = load_depth<T, kParts, kAsTheyLie>(k + chunk.k[j] + d, head_dim - d, 1.0f, range);
      for (int p = 0; p < kParts; ++p, dst += kLeftBytes) store_as(dst, depth.part[p]);
    }
  }
}

// Values as tiles [32 dimensions][32 keys of the most in a chunk][part][2] of 16 dimensions; zeros for odd keys.
template <int kParts>
constexpr int64_t kValueStride = kChunkKeys<kParts> / kTileDepth * kParts * kLeftBytes;

template <class T, int kParts>
static void pack_values(const typename T::Storage *v, const TileKeys &chunk, int head_dim, const bool *odd, char *tiles,
                        Range &range) {
  const int64_t dims = round_up(head_dim, kTileDepth);
  for (int first = 0; first < chunk.count; first += kTileDepth) {
    char *const dst = tiles + first / kTileDepth * kParts * kLeftBytes;
    for (int d = 0; d < dims; d += kWidth) {
      const auto value = [&](int j) __attribute__((always_inline)) {
        if (j >= chunk.count || odd[j] || d >= head_dim) return zero();
        return load_tail<T>(v + chunk.v[j] + d, head_dim - d);
      };
      VecU square[kParts][kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const Vec left = value(first + 2 * i), right = value(first + 2 * i + 1);
        if constexpr (kParts > 1) {
          range.take(left);
          range.take(right);
        }
        const Depth<kParts> depth = split<kParts>(left, right);
        for (int p = 0; p < kParts; ++p) square[p][i] = depth.part[p];
      }
      for (int p = 0; p < kParts; ++p) {
        transpose_pairs(square[p]);
        char *const tile =
            dst + d / kTileDepth * kValueStride<kParts> + p * kLeftBytes + d % kTileDepth / kWidth * kTileBytes;
        for (int i = 0; i < kWidth; ++i) store_as(tile + 64 * i, square[p][i]);
      }
    }
  }
}

// Where the values of a multiple of 32 keys lie.
template <int kParts>
PA_INLINE const char *values_from(const char *tiles, int key) {
  return tiles + key / kTileDepth * kParts * kLeftBytes;
}

#endif

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
