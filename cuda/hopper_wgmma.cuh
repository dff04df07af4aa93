// The asynchronous matrix products of a warpgroup (wgmma) on sm_90a, named after what they do.
//
// SPDX-License-Identifier: Apache-2.0
//
// A warpgroup multiplies 64 rows: warp w has rows 16 w ... 16 w + 15, and of their products a thread holds what it
// would of a row of 16 x 8 tiles (see multiply_add in ptx.cuh): d[j] belongs to columns 8 j ... 8 j + 7.  Operands in
// shared memory lie in columns of 128, 64 or 32 bytes, whose 16-byte chunks are permuted as the copy engine does it.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "float8_fragments.cuh"
#include "ptx.cuh"

namespace pagedattn::cuda {

// ---- order -------------------------------------------------------------------------------------------------------

// Before the first product that uses registers which other instructions have written.
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the latest groups are unfinished.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of these registers across this place.
template <class T, int kRows, int kColumns>
__device__ inline void pin(T (&x)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if constexpr (std::is_same_v<T, float>) {
        asm volatile("" : "+f"(x[i][j])::"memory");
      } else {
        asm volatile("" : "+r"(x[i][j])::"memory");
      }
    }
  }
}

// Makes a thread's ordinary writes to shared memory known to the tensor cores and the copy engine.
__device__ inline void publish_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- where an operand lies ---------------------------------------------------------------------------------------

// Of a tile (see ColumnTile) that begins at a multiple of 1024 bytes, or of what eight of its rows take in a column.
// Rows are of Q or K, whose products run along rows, or of V, whose products run across them.
struct Operand {
  uint32_t place;
  uint32_t layout;
};
template <class Tile>
__device__ inline Operand operand(SharedAddress address) {
  constexpr uint32_t kPermuted = (Tile::kWidth == 128 ? 1u : Tile::kWidth == 64 ? 2u : 3u) << 30;
  return {static_cast<uint32_t>(Tile::kColumnBytes >> 4) << 16 | (address & 0x3ffff) >> 4,
          kPermuted | static_cast<uint32_t>(Tile::kEightRows >> 4)};
}
// The operand that begins so many bytes further on.
__device__ inline Operand further(Operand operand, int bytes) {
  return {operand.place + static_cast<uint32_t>(bytes >> 4), operand.layout};
}

// ---- products ----------------------------------------------------------------------------------------------------

// Of 16 dimensions.  `add`: to what d holds, rather than in its place.
//   q_k: d = Q K^T for K's kColumns rows, both in shared memory.
//   p_v: d = P V for V's kColumns columns, P as left operands in registers.
template <class T, int kColumns>
struct Products;

#define PA_REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PA_REGISTERS_64                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define PA_REGISTERS_72 PA_REGISTERS_64 ", %32, %33, %34, %35"
#define PA_REGISTERS_80 PA_REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PA_REGISTERS_96 PA_REGISTERS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PA_REGISTERS_104 PA_REGISTERS_96 ", %48, %49, %50, %51"
#define PA_REGISTERS_112 PA_REGISTERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define PA_REGISTERS_128 PA_REGISTERS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PA_REGISTERS_136 PA_REGISTERS_128 ", %64, %65, %66, %67"
#define PA_REGISTERS_192                                                                                        \
  PA_REGISTERS_128                                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PA_REGISTERS_256                                                                                       \
  PA_REGISTERS_192                                                                                             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PA_TILE(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define PA_TILES_16(i) PA_TILE(i), PA_TILE(i + 1)
#define PA_TILES_32 PA_TILES_16(0), PA_TILES_16(2)
#define PA_TILES_64 PA_TILES_16(0), PA_TILES_16(2), PA_TILES_16(4), PA_TILES_16(6)
#define PA_TILES_72 PA_TILES_64, PA_TILE(8)
#define PA_TILES_80 PA_TILES_64, PA_TILES_16(8)
#define PA_TILES_96 PA_TILES_80, PA_TILES_16(10)
#define PA_TILES_104 PA_TILES_96, PA_TILE(12)
#define PA_TILES_112 PA_TILES_96, PA_TILES_16(12)
#define PA_TILES_128 PA_TILES_112, PA_TILES_16(14)
#define PA_TILES_136 PA_TILES_128, PA_TILE(16)
#define PA_TILES_192 PA_TILES_128, PA_TILES_16(16), PA_TILES_16(18), PA_TILES_16(20), PA_TILES_16(22)
#define PA_TILES_256 PA_TILES_192, PA_TILES_16(24), PA_TILES_16(26), PA_TILES_16(28), PA_TILES_16(30)

// An instruction names each of its registers, so that every width is one of its own.  A ... G are the numbers of the
// operands behind d.
#define PA_PRODUCTS(T, Q_K, P_V, ALONG, ACROSS, N, A, B, C, D, E, F, G)                                           \
  template <>                                                                                                     \
  struct Products<T, N> {                                                                                         \
    __device__ static void q_k(float (&d)[N / 8][4], Operand q, Operand k, bool add) {                            \
      asm volatile("{\n.reg .pred sum;\n.reg .b64 q, k;\nsetp.ne.b32 sum, %" #E ", 0;\nmov.b64 q, {%" #A ", %" #B \
                   "};\nmov.b64 k, {%" #C ", %" #D "};\nwgmma.mma_async.sync.aligned.m64n" #N Q_K                 \
                   " {" PA_REGISTERS_##N "}, q, k, sum, 1, 1" ALONG ";\n}"                                        \
                   : PA_TILES_##N                                                                                 \
                   : "r"(q.place), "r"(q.layout), "r"(k.place), "r"(k.layout), "r"(static_cast<int>(add)));       \
    }                                                                                                             \
    __device__ static void p_v(float (&d)[N / 8][4], const uint32_t (&p)[4], Operand v, bool add) {               \
      asm volatile("{\n.reg .pred sum;\n.reg .b64 v;\nsetp.ne.b32 sum, %" #G ", 0;\nmov.b64 v, {%" #E ", %" #F    \
                   "};\nwgmma.mma_async.sync.aligned.m64n" #N P_V " {" PA_REGISTERS_##N                           \
                   "}, {%" #A ", %" #B ", %" #C ", %" #D "}, v, sum, 1, 1" ACROSS ";\n}"                          \
                   : PA_TILES_##N                                                                                 \
                   : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(v.place), "r"(v.layout),                     \
                     "r"(static_cast<int>(add)));                                                                 \
    }                                                                                                             \
  };
#define PA_ALL_TYPES(N, ...)                                                                            \
  PA_PRODUCTS(__half, "k16.f32.f16.f16", "k16.f32.f16.f16", ", 0, 0", ", 1", N, __VA_ARGS__)            \
  PA_PRODUCTS(__nv_bfloat16, "k16.f32.bf16.bf16", "k16.f32.bf16.bf16", ", 0, 0", ", 1", N, __VA_ARGS__) \
  PA_PRODUCTS(Float8E4M3, "k32.f32.e4m3.e4m3", "k32.f32.e4m3.e4m3", "", "", N, __VA_ARGS__)             \
  PA_PRODUCTS(Float8E5M2, "k32.f32.e5m2.e5m2", "k32.f32.e4m3.e5m2", "", "", N, __VA_ARGS__)
PA_ALL_TYPES(32, 16, 17, 18, 19, 20, 21, 22)
PA_ALL_TYPES(64, 32, 33, 34, 35, 36, 37, 38)
PA_ALL_TYPES(72, 36, 37, 38, 39, 40, 41, 42)
PA_ALL_TYPES(80, 40, 41, 42, 43, 44, 45, 46)
PA_ALL_TYPES(96, 48, 49, 50, 51, 52, 53, 54)
PA_ALL_TYPES(104, 52, 53, 54, 55, 56, 57, 58)
PA_ALL_TYPES(112, 56, 57, 58, 59, 60, 61, 62)
PA_ALL_TYPES(128, 64, 65, 66, 67, 68, 69, 70)
PA_ALL_TYPES(136, 68, 69, 70, 71, 72, 73, 74)
PA_ALL_TYPES(192, 96, 97, 98, 99, 100, 101, 102)
PA_ALL_TYPES(256, 128, 129, 130, 131, 132, 133, 134)

#undef PA_REGISTERS_32
#undef PA_TILES_32
#undef PA_REGISTERS_64
#undef PA_TILES_64
#undef PA_REGISTERS_72
#undef PA_TILES_72
#undef PA_REGISTERS_80
#undef PA_TILES_80
#undef PA_REGISTERS_96
#undef PA_TILES_96
#undef PA_REGISTERS_104
#undef PA_TILES_104
#undef PA_REGISTERS_112
#undef PA_TILES_112
#undef PA_REGISTERS_128
#undef PA_TILES_128
#undef PA_REGISTERS_136
#undef PA_TILES_136
#undef PA_REGISTERS_192
#undef PA_TILES_192
#undef PA_REGISTERS_256
#undef PA_TILES_256
#undef PA_TILE
#undef PA_TILES_16
#undef PA_PRODUCTS
#undef PA_ALL_TYPES

// Starts S = Q K^T, of rows and keys as they lie in tiles.
template <class T, class QTile, class KTile, int kSteps, int kEights>
__device__ inline void start_q_k(float (&s)[kEights][4], Operand q, Operand k) {
  fence_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Products<T, 8 * kEights>::q_k(s, further(q, QTile::step_offset(step)), further(k, KTile::step_offset(step)),
                                  step > 0);
  }
  commit_products();
}

}  // namespace pagedattn::cuda
