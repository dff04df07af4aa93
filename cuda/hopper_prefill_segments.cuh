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
  if (arrives_for_warp(threadIdx.x % 32 == 0)) arrive(&shared.segment_empty[number % Traits::kSegments]);
}

}  // namespace pagedattn::cuda
