// How the warps of the Hopper prefill kernels follow the segments that the first of them finds.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hopper_ptx.cuh"
#include "prefill_schedule.cuh"

namespace pagedattn::cuda {

// The segment of this number, once it is known.
template <class Traits>
__device__ const PrefillSegment &wait_segment(typename Traits::Shared &shared, uint32_t number) {
  const uint32_t place = number % Traits::kSegments;
  wait(&shared.segment_full[place], number / Traits::kSegments & 1);
  return shared.segments[place];
}

// Called by whole warps that do not look at it again.
template <class Traits>
__device__ void release_segment(typename Traits::Shared &shared, uint32_t number) {
  __syncwarp();
  const auto thread = Traits::kSavesRegisters ? static_cast<uint32_t>(thread_index()) : threadIdx.x;
  if (arrives_for_warp(thread % 32 == 0)) arrive(&shared.segment_empty[number % Traits::kSegments]);
}

// Of the rows of an item's tile.  Whoever brings the queries finds it, while they are on their way, so that the warps
// that compute need no divisions.
template <int kGroups>
struct RowFacts {
  Range visible_to_all[kGroups];  // keys that all rows of a group see
  int num_rows;                   // that are a token's; others come behind
};

// By a warp.
template <int kGroups>
__device__ void tell_of_rows(const Batch &batch, const WorkItem &item, RowFacts<kGroups> &facts) {
  const int lane = thread_index() % 32;
  if (lane < kGroups) {
    facts.visible_to_all[lane] = {keys_of_row(batch, item, 64 * lane + 63).begin,
                                  keys_of_row(batch, item, 64 * lane).end};
  }
  if (lane == 0) facts.num_rows = tile_rows(batch, item);
}

}  // namespace pagedattn::cuda
