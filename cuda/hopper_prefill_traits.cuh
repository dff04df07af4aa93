// Types, tile sizes and shared memory of the Hopper prefill kernels.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_epilogue.cuh"
#include "attention_kernel.h"
#include "hopper_params.cuh"
#include "hopper_ptx.cuh"
#include "mma_traits.cuh"
#include "prefill_schedule.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Rows in shared memory as wgmma wants them and the copy engine writes them: cut into columns of 128 bytes, in which
// the 16-byte chunks of eight rows are permuted.  Columns lie one after the other, or side by side: eight rows of one
// behind those of the one before, so that the copy engine brings all columns of many rows at once.
template <int kRows, int kHeadDim, bool kSideBySide_>
struct ColumnTile {
  static constexpr bool kSideBySide = kSideBySide_;
  static constexpr int kColumns = (kHeadDim + 63) / 64;
  static constexpr int kEightRows = kSideBySide ? kColumns * 1024 : 1024;  // from these to the next
  static constexpr int kColumnBytes = kSideBySide ? 1024 : kRows * 128;    // from a column to the next
  static constexpr int kBytes = kColumns * kRows * 128;
  static_assert(kRows % 8 == 0);

  __host__ __device__ static constexpr int offset(int row, int chunk) {
    return chunk / 8 * kColumnBytes + row / 8 * kEightRows + row % 8 * 128 + ((chunk ^ row) & 7) * 16;
  }
  // Of the 16 dimensions from 16 * step on.
  __host__ __device__ static constexpr int step_offset(int step) { return step / 4 * kColumnBytes + step % 4 * 32; }
};

template <class CacheElement_, int kHeadDim_>
struct HopperPrefillTraits : MmaTypes<CacheElement_> {
  using CacheElement = CacheElement_;
  using Types = MmaTypes<CacheElement>;
  static constexpr int kHeadDim = kHeadDim_;  // D is at most this; dimensions past D are zeros

  // Warpgroups that compute, 64 query rows each.  The third hides latencies, where registers are enough.
  static constexpr int kGroups = kHeadDim <= 80 ? 3 : 2;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kTokens = kHeadDim <= 80 ? 96 : kHeadDim <= 128 ? 128 : kHeadDim <= 192 ? 96 : 64;
  struct Shape : TileShape<kRows, kTokens, false> {};
  using Cut = WorkCut<Shape>;

  static constexpr int kThreads = 128 * (1 + kGroups);
  // Of a thread as the kernel starts, and then of the warpgroup that brings data, and of those that compute.
  static constexpr int kRegisters = kGroups == 3 ? 128 : 168;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kMathRegisters = kGroups == 3 ? 160 : 232;
  static_assert(kProducerRegisters + kGroups * kMathRegisters <= (1 + kGroups) * kRegisters);

  using QTile = ColumnTile<kRows, kHeadDim, false>;
  using KvTile = ColumnTile<kTokens, kHeadDim, kHeadDim % 64 == 0>;
  static constexpr int kQStages = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kKvStages = kHeadDim <= 64 ? 4 : 2;  // of K, and of V

  using Schedule = PrefillSchedule<Shape, kThreads, 2 * 2 * kHeadDim>;
  using Source = PrefillSource<Shape, Schedule>;
  static constexpr int kSegments = 4;    // in work, and ahead
  static constexpr int kTilesAhead = 1;  // of a segment's last that the next is wanted

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
    bool last_to_arrive[kGroups];
    typename Schedule::Shared schedule;
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block may have on sm_90");
};

}  // namespace pagedattn::cuda
