// Partial results that announce themselves to the block that joins them.
//
// SPDX-License-Identifier: Apache-2.0
//
// They lie in workspace that is zero between launches, and no word of them is zero: who waits for a part reads it until
// no word is, and then sets it back.  No fence, no counter, no barrier.  Whoever waits holds a multiprocessor, so a
// block may wait for blocks of lower index alone, which the device has started before it, and only when it has handed
// on all that others may wait for.
#pragma once

#include <cstdint>

#include "work_schedule.cuh"

namespace pagedattn::cuda {

// A negative zero is as good.
__device__ inline float never_zero(float x) { return x == 0.0f ? -0.0f : x; }
__device__ inline bool is_there(float x) { return __float_as_uint(x) != 0; }

// Read and written past the L1 cache, in words that are whole each.
__device__ inline float4 read_part(const float4 *part) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(part)
               : "memory");
  return x;
}
__device__ inline float2 read_part(const float2 *part) {
  float2 x;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(part) : "memory");
  return x;
}
__device__ inline bool is_there(float4 x) { return is_there(x.x) && is_there(x.y) && is_there(x.z) && is_there(x.w); }
__device__ inline bool is_there(float2 x) { return is_there(x.x) && is_there(x.y); }

__device__ inline void announce(float4 *part, float4 x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(part), "f"(never_zero(x.x)),
               "f"(never_zero(x.y)), "f"(never_zero(x.z)), "f"(never_zero(x.w))
               : "memory");
}
__device__ inline void announce(float2 *part, float2 x) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(part), "f"(never_zero(x.x)), "f"(never_zero(x.y))
               : "memory");
}

}  // namespace pagedattn::cuda
