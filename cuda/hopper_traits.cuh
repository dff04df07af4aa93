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
#include "segment_source.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Rows in shared memory as the copy engine writes them, so that ldmatrix, which reads one 16-byte chunk of eight
// neighbouring rows, touches every bank once: rows of whole columns of 128 bytes (or less than one, filled up with
// zeros) are cut into these, eight rows after eight, and the engine permutes the chunks; others lie one after the
// other, each with a chunk of zeros behind it.
template <int kRows, int kUsedBytes>
struct BoxTile {
  static constexpr bool kCut = kUsedBytes <= 128 || kUsedBytes % 128 == 0;
  static constexpr int kChunks = kUsedBytes / 16;
  static constexpr int kColumns = kCut ? (kUsedBytes + 127) / 128 : 1;
  static constexpr int kRowBytes = kCut ? 128 : kUsedBytes + 16;  // from a row to the next, in a column
  static constexpr int kEightRows = 8 * kRowBytes * kColumns;     // in all columns
  static constexpr int kBytes = kRows / 8 * kEightRows;
  static_assert(kUsedBytes % 16 == 0 && (kCut || kUsedBytes % 32 == 0) && kRows % 8 == 0);

  // Of the columns, as the operand of a product (hopper_wgmma.cuh).
  static constexpr int kWidth = 128;
  static constexpr int kColumnBytes = 8 * kWidth;
  __host__ __device__ static constexpr int step_offset(int step) { return step / 4 * kColumnBytes + step % 4 * 32; }

  __host__ __device__ static constexpr int offset(int row, int chunk) {
    if (!kCut) return row * kRowBytes + chunk * 16;
    return row / 8 * kEightRows + chunk / 8 * 1024 + row % 8 * 128 + ((chunk ^ row) & 7) * 16;
  }

  // From the address of chunk 0 or 1 of a row: the same chunk `rows`, a multiple of eight, further down, and the chunk
  // an even number of chunks further on.
  __device__ static SharedAddress down(SharedAddress address, int rows) {
    return address + static_cast<SharedAddress>(rows / 8 * kEightRows);
  }
  __device__ static SharedAddress along(SharedAddress address, int chunks) {
    if (!kCut) return address + static_cast<SharedAddress>(chunks * 16);
    return (address ^ static_cast<SharedAddress>(chunks % 8 * 16)) + static_cast<SharedAddress>(chunks / 8 * 1024);
  }
};

// kTileHeads_ heads of a token that follow each other in memory may be one row of a tile, where the row of one would
// fill no whole columns.  Of a tall kernel, a group's warps multiply each tile together (hopper_group_rows.cuh).
template <class CacheElement_, int kHeadDim_, int kTileHeads_ = 1, bool kTall_ = false>
struct HopperDecodeTraits : MmaTypes<CacheElement_> {
  using CacheElement = CacheElement_;
  using Types = MmaTypes<CacheElement>;
  static constexpr int kHeadDim = kHeadDim_;  // D is at most this; dimensions past D are zeros
  static constexpr int kElementBytes = sizeof(typename Types::Storage);

  static constexpr int kRows = 64;      // query rows of an item, in up to four tiles of 16
  static constexpr int kWarpBands = 1;  // of 16 rows
  // Sums are brought to every larger score, or to one that has a weight of 2^this.
  static constexpr float kLargestStep = kTall_ ? 8.0f : 0.0f;
  static constexpr int kTileHeads = kTileHeads_;
  static constexpr bool kTall = kTall_;
  static constexpr int kHeadBytes = kHeadDim * kElementBytes;
  static constexpr int kTokens = (kTileHeads == 1 && kHeadBytes <= 256 ? 32 : 16) * (kTall ? 2 : 1);
  static constexpr int kWarpTokens = kTokens;
  struct Shape : TileShape<kRows, kTokens, true> {
    static constexpr int kMinSegmentTiles = 128 / kTokens;
    static constexpr int kMaxPieces = 8;
    static constexpr int kMinPieceTiles = 512 / kTokens;
    // Several KV heads an item where it has few tiles, or a head few bytes a token.
    static constexpr int kMaxHeadShift = kTall ? 0 : 2;
    static constexpr int kLeastHeadShift = kTileHeads > 1 ? kMaxHeadShift : 0;
    static constexpr int kMaxTilesOfMany = kHeadBytes < 256 ? kMaxUnits : 256 / kTokens;
    // Of 64 columns, and of 192 over float8, lines have not been measured.  Shorter items cost more than they gain, but
    // tall kernels' items have one head on any line.
    static constexpr bool kHeadsInStep =
        kTileHeads == 1 && (kHeadDim == 128 || (kHeadDim == 192 && kElementBytes == 2) || kHeadDim == 256);
    static constexpr int kLeastTilesInStep = (kTall && kHeadDim == 256 ? 64 : 128 * 1024 / kHeadBytes) / kTokens;
    static constexpr int kMostTilesInStep = (kHeadDim == 256 && kElementBytes == 1 ? 6144 : 3072) / kTokens;
    static constexpr bool kManyRowsInStep = kTall;
    static constexpr bool kPairsInStep = kElementBytes == 2 && !kTall;
    static constexpr int kMostTilesBeforePairs = (kHeadDim <= 128 ? 3072 : kHeadDim <= 192 ? 1536 : 768) / kTokens;
  };
  static_assert(kTileHeads == 1 << Shape::kLeastHeadShift);

  static constexpr int kProducers = 4;  // warps that ask for tiles, the block's first
  static constexpr int kGroups = 2;     // of warps that compute
  static constexpr int kGroupWarps = 4;
  static constexpr int kGroupThreads = 32 * kGroupWarps;
  static constexpr int kThreads = 32 * kProducers + kGroups * kGroupThreads;
  static constexpr int kQThreads = kGroupThreads;
  // Of a thread as the kernel starts, and then of each of the producers and of the groups.  All have 1024 registers of
  // each quarter of the multiprocessor left for a small block beside (swap_kernel.cu), unless they need them.
  static constexpr bool kLeavesRoom = kHeadDim < 256 || kElementBytes == 2;
  static constexpr int kRegisters = kLeavesRoom ? 160 : 168;
  static constexpr int kProducerRegisters = kLeavesRoom ? 64 : 72;
  static constexpr int kMathRegisters = kLeavesRoom ? 208 : 216;
  // Groups have so few beside 256 columns of output that what comes of a segment's number is found again.
  static constexpr bool kSavesRegisters = kTall && kHeadDim > 128;
  static_assert(32 * kProducers * kProducerRegisters + kGroups * kGroupThreads * kMathRegisters <=
                kThreads * kRegisters);

  using QTile = BoxTile<kRows, kHeadDim * 2>;
  using KvTile = BoxTile<kTokens, kHeadBytes * kTileHeads>;
  static_assert(kTileHeads == 1 || KvTile::kCut);
  static_assert(!kTall || (KvTile::kCut && kTileHeads == 1 && !Types::kFloat8), "what wgmma takes as it lies");
  static constexpr bool kQInRegisters = kHeadDim <= 128 && !kTall;
  // Results of rows that no two warps share, rather than through shared memory; 256 columns would spill, unless there
  // is no other way.
  static constexpr bool kWritesFromRegisters = kHeadDim < 256 || kTall;
  // Of the ring, a multiple of the producers, so that a slot is always filled by the same; the rest of shared memory
  // keeps queries and states.
  static constexpr int kSlots = (kHeadDim <= 80    ? 160
                                 : kHeadDim <= 128 ? 132
                                 : kHeadDim <= 192 ? 104
                                                   : 132) *
                                1024 / (2 * KvTile::kBytes) / kProducers * kProducers;
  static_assert(kSlots >= kProducers && kSlots % kGroupWarps == 0,
                "a warp that waits for a slot took the tile before from it");
  static constexpr bool kHasUnseenRows = true;  // slots past a sequence's end come as they are

  using Cut = WorkCut<Shape>;
  using Cursor = WorkCursor<Shape, kThreads>;
  static constexpr int kStateColumns = kHeadDim > 128 ? kHeadDim / 2 : kHeadDim;
  using BlockEpilogue =
      Epilogue<Shape, kGroupThreads, kHeadDim, kGroupWarps, 16 * kGroupWarps, Types::kOutput, kStateColumns, 20>;

  // What the first warp tells the others of a segment.
  struct Segment : cuda::Segment {
    uint32_t first_slot;  // counted from the kernel's first
  };
  static constexpr int kSegments = 2 * kGroups;  // those in work and the next

  // Beside the states where the ring needs no more room, which short sequences of 192 columns gain 3 % by.
  static constexpr bool kQStays = !kQInRegisters && !kTall && kHeadDim <= 192;
  struct alignas(1024) Group {
    union {  // other queries leave their place to the states, once the segment's last tile has been multiplied
      char q[QTile::kBytes];
      float states[kTall ? 1 : BlockEpilogue::kStateFloats];
    };
    char q_to_stay[kQStays ? QTile::kBytes : 16];
    RowTable<kRows> rows;
    SegmentPlan plan;
    bool other_came;  // of two segments, see WarpRows::finish
    typename BlockEpilogue::Shared epilogue;

    __device__ char *queries() { return kQStays ? q_to_stay : q; }
  };

  struct Shared {
    char ring[kSlots][2][KvTile::kBytes];
    Group groups[kGroups];
    Barrier tile_full[kSlots];
    Barrier tile_empty[kSlots];
    Barrier segment_full[kSegments];
    Barrier segment_empty[kSegments];
    Barrier turn[kGroups];      // to take tiles from the ring
    Barrier finished[kGroups];  // the segment before this group's has its result
    Segment segments[kSegments];
    typename Cursor::Shared cursor;
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block may have on sm_90");
};

}  // namespace pagedattn::cuda
