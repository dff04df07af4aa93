// The caches and pairs of a swap as its kernels read them.
//
// SPDX-License-Identifier: Apache-2.0
//
// The host writes them to page-locked memory, and a kernel that read them there would wait behind all else that a swap
// reads from the host.  So a kernel needs a copy in device memory.  To enqueue one takes the host half as long as a
// launch; so the bulk kernel brings it, each warp its parts, and reads from the host until all are there.
#pragma once

#include "swap_pairs.h"

namespace pagedattn::cuda {

template <bool kBrings>
class SwapTableReader {
 public:
  __device__ SwapTableReader(const SwapTables &tables, uint32_t *complete) : tables_(tables), complete_(complete) {}

  // By all warps, each of which is a thread block: parts of 16 bytes a lane, before anything else.
  __device__ void bring() const {
    constexpr uint32_t kAtOnce = 4, kAccess = sizeof(uint4), kPart = 32 * kAccess;
    for (uint32_t first = blockIdx.x; first * kPart < tables_.bytes; first += kAtOnce * gridDim.x) {
      const auto offset = [&](uint32_t k) { return (first + k * gridDim.x) * kPart + threadIdx.x * kAccess; };
      uint4 held[kAtOnce];
#pragma unroll
      for (uint32_t k = 0; k < kAtOnce; ++k) {
        if (offset(k) < tables_.bytes) held[k] = __ldcs(reinterpret_cast<const uint4 *>(tables_.host + offset(k)));
      }
#pragma unroll
      for (uint32_t k = 0; k < kAtOnce; ++k) {
        if (offset(k) < tables_.bytes) *reinterpret_cast<uint4 *>(tables_.copy + offset(k)) = held[k];
      }
    }
    *complete_ = 0;
    __syncwarp();
    if (threadIdx.x > 0) return;
    __threadfence();
    atomicAdd(tables_.zeros + kBrought, 1);
  }

  __device__ SwapCache cache(int i) {
    return *reinterpret_cast<const SwapCache *>(at(static_cast<uint32_t>(i) * uint32_t{sizeof(SwapCache)}));
  }

  __device__ int source(int pair) { return number(group_of(pair), pair); }
  __device__ int destination(int pair) { return number(group_of(pair) + kGroupBytes / 2, pair); }
  // Both, looked up once.
  __device__ int2 blocks(int pair) {
    const char *const group = group_of(pair);
    return make_int2(number(group, pair), number(group + kGroupBytes / 2, pair));
  }

  // A number that counts up from zero.
  __device__ uint32_t claim() const { return atomicAdd(tables_.zeros + kClaimed, 1); }

  // The end of a warp: the last one leaves zeros and tells the host that nobody reads the tables any more.  That all
  // blocks have arrived is for an event behind the kernel to say.
  __device__ void finish() const {
    __syncwarp();
    if (threadIdx.x > 0 || atomicAdd(tables_.zeros + kEnded, 1) < gridDim.x - 1) return;
    tables_.zeros[kClaimed] = tables_.zeros[kBrought] = tables_.zeros[kEnded] = 0;
    __threadfence_system();
    *static_cast<volatile uint32_t *>(tables_.done) = 1;
  }

 private:
  enum Zero { kClaimed, kBrought, kEnded };
  static constexpr uint32_t kGroupBytes = 16;

  __device__ bool narrow() const { return tables_.number_bytes == 2; }
  __device__ int log2_group() const { return narrow() ? 2 : 1; }

  __device__ const char *group_of(int pair) {
    return at(tables_.pairs_begin + static_cast<uint32_t>(pair >> log2_group()) * kGroupBytes);
  }

  __device__ int number(const char *numbers, int pair) const {
    const int place = pair & ((1 << log2_group()) - 1);
    return narrow() ? reinterpret_cast<const uint16_t *>(numbers)[place]
                    : reinterpret_cast<const int *>(numbers)[place];
  }

  __device__ const char *at(uint32_t offset) {
    if (kBrings && !*complete_) {
      uint32_t brought;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(brought) : "l"(tables_.zeros + kBrought) : "memory");
      if (brought == gridDim.x) *complete_ = 1;
    }
    return (!kBrings || *complete_ ? tables_.copy : tables_.host) + offset;
  }

  const SwapTables &tables_;
  uint32_t *complete_;  // in shared memory: whether the copy is, as far as this warp knows
};

}  // namespace pagedattn::cuda
