// Types, tile sizes and shared memory of the Hopper prefill kernels.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_epilogue.cuh"
#include "attention_kernel.h"
#include "hopper_params.cuh"
#include "hopper_prefill_join.cuh"
#include "hopper_prefill_segments.cuh"
#include "hopper_ptx.cuh"
#include "hopper_row_results.cuh"
#include "mma_traits.cuh"
#include "prefill_schedule.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Rows in shared memory as wgmma wants them and the copy engine writes them: cut into columns of 128, 64 or 32 bytes,
// in which the 16-byte chunks of eight rows are permuted, so that a chunk of each touches every bank once.  Columns lie
// one after the other, or side by side: eight rows of one behind those of the one before, so that the copy engine
// brings all columns of many rows at once.
template <int kRows, int kHeadDim, bool kSideBySide_, int kElementBytes = 2, int kWidth_ = 128>
struct ColumnTile {
  static constexpr bool kSideBySide = kSideBySide_;
  static constexpr int kWidth = kWidth_;  // of a column, in bytes
  static constexpr int kColumns = (kHeadDim * kElementBytes + kWidth - 1) / kWidth;
  static constexpr int kColumnElements = kWidth / kElementBytes;
  static constexpr int kColumnChunks = kWidth / 16;
  static constexpr int kColumnSteps = kWidth / 32;
  static constexpr int kEightRows = 8 * kWidth * (kSideBySide ? kColumns : 1);    // from these to the next
  static constexpr int kColumnBytes = kSideBySide ? 8 * kWidth : kRows * kWidth;  // from a column to the next
  static constexpr int kBytes = kColumns * kRows * kWidth;
  static_assert(kRows % 8 == 0 && (kWidth == 128 || kWidth == 64 || kWidth == 32));

  // Rows that share 128 bytes permute their chunks alike.
  __host__ __device__ static constexpr int offset(int row, int chunk) {
    return chunk / kColumnChunks * kColumnBytes + row / 8 * kEightRows + row % 8 * kWidth +
           ((chunk ^ row / (128 / kWidth)) & (kColumnChunks - 1)) * 16;
  }
  // Of the 32 bytes from 32 * step on, which a product takes.
  __host__ __device__ static constexpr int step_offset(int step) {
    return step / kColumnSteps * kColumnBytes + step % kColumnSteps * 32;
  }
};

// Rooms that tiles of keys, or of values, come to, one behind the other.
struct TileRing {
  char *rooms;
  Barrier *full;
  Barrier *empty;
};

template <class CacheElement_, int kHeadDim_>
struct HopperPrefillTraits : MmaTypes<CacheElement_> {
  using CacheElement = CacheElement_;
  using Types = MmaTypes<CacheElement>;
  static constexpr bool kFloat8Products = false;
  static constexpr int kStepDims = 16;        // that a product sums over
  static constexpr int kHeadDim = kHeadDim_;  // D is at most this; dimensions past D are zeros

  // Warpgroups that compute, 64 query rows each.  The third hides latencies, where registers are enough.
  static constexpr int kGroups = kHeadDim <= 96 && !Types::kFloat8 ? 3 : 2;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kTokens = kGroups == 3 ? 96 : kHeadDim <= 128 ? 128 : kHeadDim <= 192 ? 96 : 64;
  struct Shape : PrefillShape<kRows, kTokens> {};
  using Cut = WorkCut<Shape>;

  // The first warpgroup brings data; over float8 caches another widens it.
  static constexpr int kFirstMathGroup = Types::kFloat8 ? 2 : 1;
  static constexpr int kWarpgroups = kFirstMathGroup + kGroups;
  static constexpr int kThreads = 128 * kWarpgroups;
  // Of a thread as the kernel starts, and then of the warpgroups that bring data, that widen it and that compute: as
  // many as keep all from spilling.
  static constexpr int kRegisters = kWarpgroups == 4 ? 128 : 168;
  static constexpr int kProducerRegisters = Types::kFloat8                     ? (kHeadDim <= 192 ? 48 : 32)
                                            : kHeadDim == 64 || kHeadDim == 96 ? 32
                                            : kHeadDim <= 128                  ? 56
                                                                               : 40;
  static constexpr int kChangerRegisters = kProducerRegisters;  // if there are such
  static constexpr int kMathRegisters =
      (kWarpgroups * kRegisters - kFirstMathGroup * kProducerRegisters) / kGroups / 8 * 8;
  // What comes of a thread's number is found anew where it is needed; but where the compiler then spills something
  // else, it is kept whether the thread is its warp's first.
  static constexpr bool kKeepsLeader = Types::kFloat8 && kHeadDim >= 96;
  // All warps are short of registers, and keep nothing that they can find again.
  static constexpr bool kSavesRegisters = kHeadDim > 192 && Types::kFloat8;
  // Where the compiler would spill otherwise: output is cleared behind a join, and of scores that are computed anew a
  // lane finds one key after the other.
  static constexpr bool kClearsJoined = kHeadDim > 192, kFindsKeysInTurn = Types::kFloat8 && kHeadDim == 128;

  // Of 80 and 96 columns narrow ones, which rows of K and V fill, so that the copy engine brings them side by side.
  static constexpr int kColumnWidth = Types::kFloat8 ? 128 : kHeadDim == 80 ? 32 : kHeadDim == 96 ? 64 : 128;
  using QTile = ColumnTile<kRows, kHeadDim, false, 2, kColumnWidth>;
  using KvTile = ColumnTile<kTokens, kHeadDim, Types::kFloat8 || kHeadDim * 2 % kColumnWidth == 0, 2, kColumnWidth>;
  // Where the copy engine brings a tile to, in its room: float8 ones to the end, from where they become float16.
  static constexpr int kRawBytes = Types::kFloat8 ? kTokens * kHeadDim : KvTile::kBytes;
  static constexpr int kRawPlace = KvTile::kBytes - kRawBytes;
  static constexpr int kBoxColumns = Types::kFloat8 ? 1 : KvTile::kColumns;  // that a box may have one of, or all
  static constexpr int kRawQueryPlace = QTile::kColumnBytes / 2;             // in each column of float8 queries
  static constexpr int kQStages = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kKvStages = kHeadDim <= 64   ? 4
                                   : Types::kFloat8 ? 2
                                   : kHeadDim <= 80 ? 4
                                   : kHeadDim <= 96 ? 3
                                                    : 2;  // of K, and of V

  using Schedule = PrefillSchedule<Shape, kThreads, 2 * sizeof(typename Types::Storage) * kHeadDim>;
  using Source = PrefillSource<Shape, Schedule>;
  // Named barriers, one a group.
  static constexpr int kFirstTurn = 1, kFirstOwn = kFirstTurn + kGroups, kWidenerBarrier = kFirstOwn + kGroups;
  static constexpr int kSegments = 4;  // in work, and ahead
  // Of a segment's last that the next is wanted.
  static constexpr int kTilesAhead = 3;

  struct RawData {  // float8, and queries of that call in their own type
    Barrier k[kKvStages];
    Barrier v[kKvStages];
    Barrier q[kQStages];
    float factors[kQStages][kRows];  // of the rows' scores
  };
  struct NoRawData {};
  struct Shared {
    char q[kQStages][QTile::kBytes];
    char k[kKvStages][KvTile::kBytes];
    char v[kKvStages][KvTile::kBytes];
    Barrier q_full[kQStages];
    Barrier q_empty[kQStages];
    Barrier k_full[kKvStages];
    Barrier k_empty[kKvStages];
    Barrier v_full[kKvStages];
    Barrier v_empty[kKvStages];
    Barrier wanted;  // the next segment
    Barrier segment_full[kSegments];
    Barrier segment_empty[kSegments];
    PrefillSegment segments[kSegments];
    RowFacts<kGroups> facts[kQStages];
    std::conditional_t<Types::kFloat8, RawData, NoRawData> raw;
    ResultsRoom results[4 * kGroups];  // of a warp's rows each
    JoinShare join_share[kGroups];
    typename Schedule::Shared schedule;
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block may have on sm_90");

  __device__ static TileRing ring(Shared &shared, bool keys) {
    if constexpr (Types::kFloat8) {
      return keys ? TileRing{shared.k[0], shared.raw.k, shared.k_empty}
                  : TileRing{shared.v[0], shared.raw.v, shared.v_empty};
    } else {
      return keys ? TileRing{shared.k[0], shared.k_full, shared.k_empty}
                  : TileRing{shared.v[0], shared.v_full, shared.v_empty};
    }
  }
  __device__ static constexpr int raw_row(int row, int column) {
    return Types::kFloat8 ? kRawPlace + row * kHeadDim : KvTile::offset(row, column * KvTile::kColumnChunks);
  }
};

}  // namespace pagedattn::cuda
