// AMX's tile registers on a processor without them: the operations of src/cpu/kernels/tile_registers.h, which the build
// finds here in its place.
//
// SPDX-License-Identifier: Apache-2.0
//
// For tests alone.  The product is what Intel's manual says: even and odd elements are summed apart by fused
// multiply-adds, then added; what is subnormal counts as zero.  What would fault on a processor, or read a register
// that nobody set, ends the program.
#pragma once

#include "kernels/simd.h"

#if defined(PAGEDATTN_TILES)

namespace pagedattn::cpu::PAGEDATTN_ISA {

struct TileShape {
  uint8_t rows;
  uint16_t row_bytes;
};

struct EmulatedTile {
  TileShape shape;
  bool set;
  alignas(64) uint8_t data[16][64];  // zeros outside of the shape
};
static thread_local EmulatedTile emulated_tiles[8];

PA_INLINE void demand(bool condition) {
  if (!condition) __builtin_trap();
}
PA_INLINE EmulatedTile &tile_with_shape(int tile) {
  demand(emulated_tiles[tile].shape.rows != 0);
  return emulated_tiles[tile];
}
PA_INLINE const EmulatedTile &tile_with_data(int tile) {
  demand(emulated_tiles[tile].set);
  return emulated_tiles[tile];
}

[[maybe_unused]] static void configure_tiles(const TileShape (&shapes)[8]) {
  for (int i = 0; i < 8; ++i) {
    demand(shapes[i].rows <= 16 && shapes[i].row_bytes <= 64 && shapes[i].row_bytes % 4 == 0);
    emulated_tiles[i] = {shapes[i], false, {}};
  }
}

[[maybe_unused]] static void release_tiles() {
  for (EmulatedTile &tile : emulated_tiles) tile = {};
}

template <int kTile>
PA_INLINE void tile_zero() {
  EmulatedTile &tile = tile_with_shape(kTile);
  tile = {tile.shape, true, {}};
}
template <int kTile>
PA_INLINE void tile_load(const void *p, int64_t stride) {
  tile_zero<kTile>();
  EmulatedTile &tile = emulated_tiles[kTile];
  for (int i = 0; i < tile.shape.rows; ++i) {
    __builtin_memcpy(tile.data[i], static_cast<const char *>(p) + i * stride, tile.shape.row_bytes);
  }
}
template <int kTile>
PA_INLINE void tile_store(void *p, int64_t stride) {
  const EmulatedTile &tile = tile_with_data(kTile);
  for (int i = 0; i < tile.shape.rows; ++i) {
    __builtin_memcpy(static_cast<char *>(p) + i * stride, tile.data[i], tile.shape.row_bytes);
  }
}

PA_INLINE Vec flush_subnormal(Vec v) {
  return as_float((as_bits(v) & 0x7f800000u) == 0u ? as_bits(v) & 0x80000000u : as_bits(v));
}

[[maybe_unused]] static void emulate_product(EmulatedTile &sum, const EmulatedTile &a, const EmulatedTile &b) {
  demand(a.shape.rows == sum.shape.rows && b.shape.row_bytes == sum.shape.row_bytes &&
         a.shape.row_bytes == 4 * b.shape.rows);
  const auto even_of = [](VecU pairs) { return flush_subnormal(as_float(pairs << 16)); };
  const auto odd_of = [](VecU pairs) { return flush_subnormal(as_float(pairs & 0xffff0000u)); };
  for (int m = 0; m < sum.shape.rows; ++m) {
    Vec even = zero(), odd = zero();
    for (int k = 0; k < b.shape.rows; ++k) {
      const VecU left = VecU{} + load_as<uint32_t>(a.data[m] + 4 * k);
      const VecU right = load_as<VecU>(b.data[k]);
      even = flush_subnormal(fma(even_of(left), even_of(right), even));
      odd = flush_subnormal(fma(odd_of(left), odd_of(right), odd));
    }
    const Vec both = flush_subnormal(even + odd);
    const Vec before = flush_subnormal(load_as<Vec>(sum.data[m]));
    const Vec after = flush_subnormal(before + both);
    __builtin_memcpy(sum.data[m], &after, sum.shape.row_bytes);
  }
}

template <int kSum, int kA, int kB>
PA_INLINE void tile_multiply() {
  demand(tile_with_data(kSum).set);
  emulate_product(emulated_tiles[kSum], tile_with_data(kA), tile_with_data(kB));
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA

#endif
