// The eight tile registers of AMX: up to 16 rows of 64 bytes each, and the product of two in bfloat16.
//
// SPDX-License-Identifier: Apache-2.0
//
// Written as assembly, since the compilers' intrinsics take register numbers as literals, not as template arguments.
#pragma once

#include "kernels/simd.h"

#if defined(PAGEDATTN_TILES)

namespace pagedattn::cpu::PAGEDATTN_ISA {

struct TileShape {
  uint8_t rows;
  uint16_t row_bytes;
};

// Takes the tile registers into use, with nothing in them.
static void configure_tiles(const TileShape (&shapes)[8]) {
  struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } configuration;
  for (int i = 0; i < 8; ++i) {
    configuration.row_bytes[i] = shapes[i].row_bytes;
    configuration.rows[i] = shapes[i].rows;
  }
  asm volatile("ldtilecfg %0" : : "m"(configuration));
}

// Gives them back, so that the system need not save them.
static void release_tiles() { asm volatile("tilerelease"); }

template <int kTile>
PA_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Rows `stride` bytes apart.
template <int kTile>
PA_INLINE void tile_load(const void *p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
PA_INLINE void tile_store(void *p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += a[m][2 k] * b[k][2 n] + a[m][2 k + 1] * b[k][2 n + 1], over k, of bfloat16 in fp32.
template <int kSum, int kA, int kB>
PA_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
