// Types, tile sizes and shared memory of the Hopper decode kernels.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_epilogue.cuh"
#include "attention_kernel.h"
#include "hopper_params.cuh"
#include "hopper_ptx.cuh"
#include "mma_traits.cuh"
#include "row_table.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Query rows in columns of 128 bytes, eight rows after eight.  ldmatrix, which reads one chunk of eight neighbouring
// rows, touches every bank once.
template <int kRows, int kRowBytes>
struct QueryTile {
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kRowBytes % 128 == 0 && kRows % 8 == 0);

  __host__ __device__ static constexpr int offset(int row, int chunk) {
    return row / 8 * 8 * kRowBytes + chunk / 8 * 1024 + row % 8 * 128 + ((chunk ^ row) & 7) * 16;
  }
  // From chunk 0 or 1 of a row, an even number of chunks further on.
  __device__ static SharedAddress along(SharedAddress address, int chunks) {
    return (address ^ static_cast<SharedAddress>(chunks % 8 * 16)) + static_cast<SharedAddress>(chunks / 8 * 1024);
  }
};

// Where the lanes find the chunks of K and V in boxes as the copy engine writes them (see CacheBox): the interface is
// that of SwizzledReader.
template <bool kFloat8>
class BoxReader {
 public:
  __device__ BoxReader(const HopperDecodeParams &params, int lane) : box_(params.box) {
    const int key_row = kFloat8 ? lane % 16 : lane / 16 * 8 + lane % 8, value_row = lane % 16;
    const int key_chunk = kFloat8 ? lane / 16 : lane / 8 % 2, value_chunk = lane / 16;
    key_row_ = row_offset(key_row);
    value_row_ = row_offset(value_row);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      key_chunk_[i] = chunk_offset(key_row, 2 * i + key_chunk);
      value_chunk_[i] = chunk_offset(value_row, 2 * i + value_chunk);
    }
  }
  __device__ SharedAddress keys(const char *tile) const { return shared_address(tile) + key_row_; }
  __device__ SharedAddress values(const char *tile) const { return shared_address(tile) + value_row_; }
  __device__ SharedAddress key(SharedAddress keys, int tokens16, int chunk) const {
    return keys + further(tokens16, chunk) + key_chunk_[chunk % 8 / 2];
  }
  __device__ SharedAddress value(SharedAddress values, int tokens16, int chunk) const {
    return values + further(tokens16, chunk) + value_chunk_[chunk % 8 / 2];
  }
  // In dense boxes, what lies behind dimension D is the next token.
  __device__ bool rows_run_over() const { return box_.is_dense; }
  __device__ void clear_past_row(uint32_t &a, uint32_t &b, int chunk) const {
    if (chunk * 16 >= box_.row_bytes) a = b = 0;
  }

 private:
  __device__ SharedAddress row_offset(int row) const {
    return static_cast<SharedAddress>(row / 8 * box_.stride8 + row % 8 * box_.row_stride);
  }
  __device__ SharedAddress chunk_offset(int row, int chunk) const {
    return static_cast<SharedAddress>((box_.is_dense ? chunk : (chunk ^ row) & 7) * 16);
  }
  __device__ SharedAddress further(int tokens16, int chunk) const {
    return static_cast<SharedAddress>(tokens16 * box_.stride16 + chunk / 8 * box_.column_stride);
  }

  const CacheBox &box_;
  SharedAddress key_row_;
  SharedAddress value_row_;
  SharedAddress key_chunk_[4];
  SharedAddress value_chunk_[4];
};

template <class CacheElement_, int kHeadDim_>
struct HopperDecodeTraits : MmaTypes<CacheElement_> {
  using CacheElement = CacheElement_;
  using Params = HopperDecodeParams;
  using Types = MmaTypes<CacheElement>;
  static constexpr int kHeadDim = kHeadDim_;  // D is at most this; dimensions past D are zeros
  static constexpr int kElementBytes = sizeof(typename Types::Storage);
  static constexpr int kRowBytes = kHeadDim * kElementBytes > 128 ? kHeadDim * kElementBytes : 128;

  static constexpr int kRows = 64;  // query rows of an item, in up to four tiles of 16
  static constexpr int kTokens = kRowBytes <= 256 ? 32 : 16;
  static constexpr int kWarpTokens = kTokens;
  using Shape = TileShape<kRows, kTokens, true, 128 / kTokens, 8, 512 / kTokens>;

  static constexpr int kProducers = 4;  // warps that ask for tiles, the block's first
  static constexpr int kGroups = 2;     // of warps that compute
  static constexpr int kGroupWarps = 4;
  static constexpr int kGroupThreads = 32 * kGroupWarps;
  static constexpr int kThreads = 32 * kProducers + kGroups * kGroupThreads;
  static constexpr int kQThreads = kGroupThreads;
  // What a multiprocessor's 64 K registers give each thread of the producers and of the groups.
  static constexpr int kProducerRegisters = kHeadDim <= 128 ? 88 : 72;
  static constexpr int kMathRegisters = kHeadDim <= 128 ? 208 : 216;
  static_assert(32 * kProducers * kProducerRegisters + kGroups * kGroupThreads * kMathRegisters <= 64 * 1024);

  using QTile = QueryTile<kRows, kHeadDim * 2>;
  using KvReader = BoxReader<Types::kFloat8>;
  static constexpr int kTileBytes = kTokens * kRowBytes;  // of K or V
  static constexpr bool kQInRegisters = kHeadDim <= 128;
  // Of the ring; shared memory is divided between them and what keeps queries and states.
  static constexpr int kSlots = (kHeadDim <= 128 ? 128 : kHeadDim <= 192 ? 96 : 64) * 1024 / (2 * kTileBytes);
  static_assert(kSlots % kProducers == 0, "a slot is always filled by the same producer");
  static constexpr bool kHasUnseenRows = true;  // slots past a sequence's end come as they are

  using Cut = WorkCut<Shape>;
  using Cursor = WorkCursor<Shape, kThreads>;
  static constexpr int kStateColumns = kHeadDim > 128 ? kHeadDim / 2 : kHeadDim;
  using BlockEpilogue =
      Epilogue<Shape, kGroupThreads, kHeadDim, kGroupWarps, 16 * kGroupWarps, Types::kOutput, kStateColumns, 20>;

  // What the first warp tells the others of a segment.
  struct Segment {
    bool valid;  // false: there are no more
    WorkItem item;
    Range tiles;
    uint32_t first_tile;  // counted from the kernel's first
    int granule;
  };
  static constexpr int kSegments = 2 * kGroups;  // those in work and the next

  struct alignas(1024) Group {
    union {  // queries that are kept in registers leave their place to the states
      char q[QTile::kBytes];
      float states[BlockEpilogue::kStateFloats];
    };
    char q_to_stay[kQInRegisters ? 16 : QTile::kBytes];
    RowTable<kRows> rows;
    SegmentPlan plan;
    typename BlockEpilogue::Shared epilogue;

    __device__ char *queries() { return kQInRegisters ? q : q_to_stay; }
  };

  struct Shared {
    char ring[kSlots][2][kTileBytes];
    Group groups[kGroups];
    Barrier tile_full[kSlots];
    Barrier tile_empty[kSlots];
    Barrier segment_full[kSegments];
    Barrier segment_empty[kSegments];
    Barrier turn[kGroups];  // to take tiles from the ring
    Segment segments[kSegments];
    typename Cursor::Shared cursor;
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block may have on sm_90");
};

}  // namespace pagedattn::cuda
