// Thin wrappers of the PTX instructions that the attention kernels use, named after what they do.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pagedattn::cuda {

using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void *pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Copies `valid_bytes` (0 or kBytes) from global to shared memory and fills the rest with zeros; nothing is read where
// valid_bytes is 0.  16-byte copies go past the L1 cache.
template <int kBytes>
__device__ inline void copy_async(SharedAddress destination, const void *source, int valid_bytes) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4, "the sizes that cp.async knows");
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(kBytes),
                 "r"(valid_bytes)
                 : "memory");
  }
}

// Closes the thread's current group of asynchronous copies; a group may be empty.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the thread's latest groups are unfinished.  Other threads see the data behind the
// next barrier.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline uint4 load_shared(SharedAddress address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// Four 8 x 8 matrices of 16-bit elements.  Lane l gives the address of row l % 8 of matrix l / 8 and receives elements
// 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
__device__ inline void load_matrices(uint32_t (&m)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// The same of the transposed matrices: lane l receives rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
__device__ inline void load_matrices_transposed(uint32_t (&m)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// d += a b for a 16 x 16 (rows), b 16 x 8 (columns) and d 16 x 8 in float32.  With g = lane / 4 and c = lane % 4:
// a[0..3] hold (g, 2c), (g + 8, 2c), (g, 2c + 8), (g + 8, 2c + 8) and each right neighbour; b0, b1 hold rows 2c and
// 2c + 8, each with the row below, of column g; d holds (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1).
template <class T>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to 16 bits, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float first, float second);

template <>
__device__ inline uint32_t pack<__half>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

// Of scores or weights, held as tiles of 8 keys, the t-th 16 keys as a left operand.
template <class T, int kTiles>
__device__ inline void pack_keys(uint32_t (&a)[4], const float (&s)[kTiles][4], int t) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack<T>(s[2 * t + i / 2][i % 2 * 2], s[2 * t + i / 2][i % 2 * 2 + 1]);
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// threadIdx.x, read where it is asked for: what comes of threadIdx.x itself is kept in registers, or spilled from them.
__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The same number, of which the compiler does not know: what comes of it is computed here, rather than kept.
template <class T>
__device__ inline T found_here(T x) {
  static_assert(sizeof(x) == 4);
  asm volatile("" : "+r"(x));
  return x;
}

// The bytes of x and of a zero (numbers 4 to 7) that the four selectors name, lowest first.
__device__ inline uint32_t pick_bytes(uint32_t x, uint32_t selectors) { return __byte_perm(x, 0, selectors); }

// Counts an arrival, or what one adds, and returns how many there are now.  What the thread has stored, or has seen
// stored, is visible to whoever counts later, and what those who counted before had stored is visible to the thread.
__device__ inline uint32_t arrive_and_count(uint32_t *counter, uint32_t arrival = 1) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(arrival) : "memory");
  return before + arrival;
}

// How many have been counted, and what they had stored is visible to the thread.
__device__ inline uint32_t count_arrivals(const uint32_t *counter) {
  uint32_t count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return count;
}

// __syncthreads of some of the block's warps, or of all of them.
template <int kThreads>
__device__ inline void named_barrier(int barrier) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Comes to such a barrier without waiting for it.
template <int kThreads>
__device__ inline void named_barrier_arrive(int barrier) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Reads what another block wrote during this launch: from the L2 cache, never from a stale L1 line.
__device__ inline float2 load_from_l2(const float2 *pointer) { return __ldcg(pointer); }
__device__ inline float4 load_from_l2(const float4 *pointer) { return __ldcg(pointer); }

}  // namespace pagedattn::cuda
