// Types, tile sizes and shared memory of the tensor-core attention kernels.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "attention_epilogue.cuh"
#include "attention_kernel.h"
#include "float8_fragments.cuh"
#include "kv_loader.cuh"
#include "row_table.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

template <class CacheElement>
struct MmaTypes {  // float16 and bfloat16 caches
  using Math = CacheElement;
  using Storage = CacheElement;
  static constexpr bool kFloat8 = false;
  static constexpr OutputType kOutput =
      std::is_same_v<CacheElement, __half> ? OutputType::kFloat16 : OutputType::kBFloat16;
};
template <>
struct MmaTypes<Float8E4M3> {
  using Math = __half;
  using Storage = uint8_t;
  static constexpr bool kFloat8 = true;
  static constexpr OutputType kOutput = OutputType::kFromParams;
};
template <>
struct MmaTypes<Float8E5M2> : MmaTypes<Float8E4M3> {};

template <class CacheElement_, int kHeadDim_, bool kManyRows_>
struct MmaTraits : MmaTypes<CacheElement_> {
  using CacheElement = CacheElement_;
  using Types = MmaTypes<CacheElement>;
  static constexpr int kHeadDim = kHeadDim_;  // D is at most this; dimensions past D are zeros
  static constexpr bool kManyRows = kManyRows_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQThreads = kThreads;     // that load queries
  static constexpr int kTileHeads = 1;           // that a row of a KV tile has side by side
  static constexpr bool kHasUnseenRows = false;  // the loader makes zeros of rows of V that no query sees
  static constexpr int kElementBytes = sizeof(typename Types::Storage);

  // Bands of 16 rows of a warp: what it loads of K and V serves all of them.  Two of 256 columns have no room in
  // registers.
  static constexpr int kWarpBands = kManyRows && kHeadDim <= 128 ? 2 : 1;
  // Log 2 of the weight that a key may have before sums are brought to a larger m: far from what a float16 holds.
  static constexpr float kLargestStep = kManyRows ? 8.0f : 0.0f;

  static constexpr int kRows = kManyRows ? kWarps * kWarpBands * 16 : kFewRows;
  static constexpr int kTokens = kManyRows && kHeadDim > 128 ? 32 : 64;
  struct Shape : TileShape<kRows, kTokens, !kManyRows> {
    static constexpr int kItemOverhead = !kManyRows ? 1 : kWarpBands > 1 ? 4 : 2;
  };
  // What one warp multiplies with, and what one warp copies.
  static constexpr int kWarpTokens = kManyRows ? kTokens : kTokens / kWarps;
  static constexpr int kCopyTokens = kTokens / kWarps;

  using QTile = SwizzledTile<kHeadDim * 2>;
  using KvTile = SwizzledTile<kHeadDim * kElementBytes>;
  static constexpr int kQBytes = kRows * QTile::kRowBytes;
  static constexpr int kCopyBytes = kCopyTokens * KvTile::kRowBytes;  // a warp's share of a tile of K or of V
  static constexpr int kTileBytes = kTokens * KvTile::kRowBytes;
  // Tiles of K and V each in flight: two, or as many as make 64 KB a block where each warp has a ring.
  static constexpr int kStages = kManyRows                         ? 2
                                 : 2 * kTileBytes >= 64 * 1024     ? 1
                                 : 2 * kTileBytes * 4 <= 64 * 1024 ? 4
                                                                   : 2;
  static constexpr bool kQInRegisters = kHeadDim <= 128 && kWarpBands == 1;
  // Blocks a multiprocessor that registers are rationed for: three where that spills none.
  static constexpr int kBlocks = !kManyRows && kHeadDim <= (Types::kFloat8 ? 64 : 128) ? 3 : 2;

  using TileLoader = KvLoader<kCopyTokens, KvTile, typename Types::Storage>;
  using Cut = WorkCut<Shape>;
  using Cursor = BlockCursor<Shape, kThreads>;
  using BlockEpilogue = Epilogue<Shape, kThreads, kHeadDim, kWarps, kWarps * kRows, Types::kOutput>;  // of few rows

  struct Tiles {
    char kv[kStages * 2 * kTileBytes];
    char q[kQBytes];
  };
  struct SharedOfFewRows {
    union {
      Tiles tiles;
      float states[BlockEpilogue::kStateFloats];
    };
    typename BlockEpilogue::Shared epilogue;
  };
  struct SharedOfManyRows {
    Tiles tiles;
    bool last_to_arrive;
  };
  struct Shared : std::conditional_t<kManyRows, SharedOfManyRows, SharedOfFewRows> {
    typename Cursor::Shared cursor;
    RowTable<kRows> rows;
  };
  static_assert(sizeof(Shared) <= 99 * 1024, "what a block may have on every sm_8x and later device");
};

}  // namespace pagedattn::cuda
