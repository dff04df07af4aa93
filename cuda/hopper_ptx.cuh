// Thin wrappers of the PTX instructions of sm_90 that the Hopper kernels use, named after what they do.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx.cuh"

namespace pagedattn::cuda {

// ---- mbarriers: a phase ends when the announced arrivals and bytes have come ------------------------------------

using Barrier = uint64_t;

__device__ inline void init_barrier(Barrier *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine; other threads see them behind the next __syncthreads.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(Barrier *barrier, int count = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// One lane arrives for a warp whose lanes have met.  racecheck of compute-sanitizer does not see that it stands for the
// others: where PAGEDATTN_EVERY_LANE_ARRIVES is set for its sake, all of them arrive.
#ifdef PAGEDATTN_EVERY_LANE_ARRIVES
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ inline bool arrives_for_warp(bool leads) { return kWarpArrivals > 1 || leads; }

// Arrives, and lets the phase wait for `bytes` of asynchronous copies too.
__device__ inline void arrive_and_expect(Barrier *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Lets the phase, which still waits for an arrival, wait for `bytes` of asynchronous copies too.
__device__ inline void expect(Barrier *barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity; returns at once if it is past.
__device__ inline void wait(Barrier *barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// One lane of the warp, of which all call this: for what one thread does with operands that all share.
__device__ inline bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// ---- the bulk tensor copy engine ---------------------------------------------------------------------------------

__device__ inline void prefetch_tensor_map(const CUtensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// For data that is read once: it leaves the L2 cache before other data does.
__device__ inline uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies a box of a five-dimensional tensor to shared memory and counts its bytes at the barrier.
__device__ inline void copy_box(SharedAddress destination, const CUtensorMap *map, const int (&corner)[5],
                                Barrier *barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(destination),
      "l"(map), "r"(corner[0]), "r"(corner[1]), "r"(corner[2]), "r"(corner[3]), "r"(corner[4]),
      "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// The same of data that is read again and again.
__device__ inline void copy_box(SharedAddress destination, const CUtensorMap *map, const int (&corner)[5],
                                Barrier *barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(destination),
      "l"(map), "r"(corner[0]), "r"(corner[1]), "r"(corner[2]), "r"(corner[3]), "r"(corner[4]),
      "r"(shared_address(barrier))
      : "memory");
}

// ---- the same engine without a tensor: multiples of 16 bytes, at addresses that are
// ----------------------------------

__device__ inline void copy_bulk_to_shared(SharedAddress destination, const void *source, int bytes, Barrier *barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// As a group of its own.
__device__ inline void copy_bulk_from_shared(void *destination, SharedAddress source, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until the thread's copies from shared memory have read it, and until they have been written.
__device__ inline void wait_bulk_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void wait_bulk_copies() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- matrices from registers to shared memory ---------------------------------------------------------------------

// What load_matrices would load: lane l gives the address of row l % 8 of matrix l / 8, and has elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 of each.
__device__ inline void store_matrices(SharedAddress row, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]), "r"(m[1]),
               "r"(m[2]), "r"(m[3])
               : "memory");
}

// ---- registers, which a warpgroup hands to another ------------------------------------------------------------

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- programmatic dependent launch -------------------------------------------------------------------------------

// Waits until the kernels before this one have finished and their memory is visible.  Nothing that they may have
// written is to be read earlier.
__device__ inline void wait_for_previous_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel start its blocks as soon as there is room for them.
__device__ inline void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace pagedattn::cuda
