// The two products of attention on tile registers, for a panel of 32 query rows.
//
// SPDX-License-Identifier: Apache-2.0
//
// S^T = K Q^T and O^T += V^T P^T, with query rows as columns.  All operands are tiles of 16 rows of 32 bfloat16: left
// ones lie one behind the other in the order of their use, right ones hold pairs, [pair][lane].  2 x 2 tiles of sums
// stay in registers, so that each tile loaded is used twice: a product takes 16 cycles, loading a tile 8 from L1 and 19
// from L2, storing one 15 to L1 and 58 to L2.
//
// Operands may be sums of parts in bfloat16, each the upper 8 bits of what the one before left.  Of three parts, which
// are float32, those products count that are not far below its rounding, six of nine.  Of two, which are float16, all
// four count for scores, which are exact then and whose errors would grow with them, and three for results.
#pragma once

#include "kernels/tile_parts.h"
#include "kernels/tile_registers.h"

#if defined(PAGEDATTN_TILES)

namespace pagedattn::cpu::PAGEDATTN_ISA {

constexpr int kTileBytes = 1024;
static_assert(kMaxLanes == 2 * kTileRows && kWidth == kTileRows);

constexpr int kLeftBytes = 2 * kTileBytes;  // of a part, 32 rows
constexpr int kUnitKeys = kTileDepth;       // keys are taken in multiples of so many

PA_INLINE void load_left(const char *left) {
  tile_load<4>(left, 64);
  tile_load<5>(left + kTileBytes, 64);
}
PA_INLINE void load_right(const char *right) {
  tile_load<6>(right, kPanelStride);
  tile_load<7>(right + 64, kPanelStride);
}
PA_INLINE void multiply_loaded() {
  tile_multiply<0, 4, 6>();
  tile_multiply<2, 5, 6>();
  tile_multiply<1, 4, 7>();
  tile_multiply<3, 5, 7>();
}

// Adds to sums the products of 2 left and 2 right tiles, [part] each.  Left ones, which come from L2, are loaded once.
// Other work is done `beside` some.
template <int kParts, bool kWhole, class Beside>
PA_INLINE void multiply_tiles(const char *left, const char *right, Beside beside) {
  static_assert(kParts >= 1 && kParts <= 3);
  const auto with_left = [left](int part) __attribute__((always_inline)) {
    load_left(left + part * kLeftBytes);
    multiply_loaded();
  };
  const auto with_right = [right](int part) __attribute__((always_inline)) {
    load_right(right + part * kRightBytes);
    multiply_loaded();
  };
  load_left(left);
  if constexpr (kParts == 3) {
    with_right(2);
    beside();
    with_right(0);
    beside();
    with_right(1);
    with_left(1);
    beside();
    with_right(0);
    beside();
    with_left(2);
  } else if constexpr (kParts == 2) {
    with_right(1);
    beside();
    with_right(0);
    beside();
    with_left(1);
    beside();
    if constexpr (kWhole) with_right(1);
  } else {
    with_right(0);
    beside();
  }
}
PA_INLINE void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
PA_INLINE void load_sums(const char *p) {
  tile_load<0>(p, kPanelStride);
  tile_load<1>(p + 64, kPanelStride);
  tile_load<2>(p + kTileRows * kPanelStride, kPanelStride);
  tile_load<3>(p + kTileRows * kPanelStride + 64, kPanelStride);
}
PA_INLINE void store_sums(char *p) {
  tile_store<0>(p, kPanelStride);
  tile_store<1>(p + 64, kPanelStride);
  tile_store<2>(p + kTileRows * kPanelStride, kPanelStride);
  tile_store<3>(p + kTileRows * kPanelStride + 64, kPanelStride);
}

// Scores [key][lane] of a multiple of 32 keys, whose tiles lie as [32 keys][32 dimensions][part][2], with queries [32
// dimensions][part][pair][lane].
template <int kParts, class Beside>
PA_INLINE void multiply_keys(const char *q, const char *keys, int dims, int num_keys, char *scores, Beside beside) {
  for (int j = 0; j < num_keys; j += kTileDepth) {
    zero_sums();
    for (int d = 0; d < dims; d += kTileDepth) {
      multiply_tiles<kParts, true>(keys, q + d / kTileDepth * kParts * kRightBytes, beside);
      keys += kParts * kLeftBytes;
    }
    store_sums(scores + j * kPanelStride);
  }
}

// Adds to acc [dimension][lane] the products of a multiple of 32 keys, whose tiles lie as [32 dimensions][32
// keys][part][2] with `stride` bytes from one 32 dimensions to the next, and weights [32 keys][part][pair][lane].
template <int kParts>
static void multiply_values(char *acc, bool first, const char *weights, const char *values, int64_t stride, int dims,
                            int num_keys) {
  for (int d = 0; d < dims; d += kTileDepth, values += stride) {
    if (first) {
      zero_sums();
    } else {
      load_sums(acc + d * kPanelStride);
    }
    for (int j = 0; j < num_keys; j += kTileDepth) {
      const int step = j / kTileDepth * kParts;
      multiply_tiles<kParts, false>(values + step * kLeftBytes, weights + step * kRightBytes, [] {});
    }
    store_sums(acc + d * kPanelStride);
  }
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
