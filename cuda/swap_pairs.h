// The pairs and caches of a swap where its kernels find them.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "params.h"

namespace pagedattn::cuda {

struct PairBuffer;
class Event;

// The device's addresses of a cache, read in one access.
struct alignas(16) SwapCache {
  const char *src;
  char *dst;
};

// In device memory, but for `done`.
struct SwapTables {
  const SwapCache *caches;
  const void *pairs;  // packed; see index_checks.h
  int number_bytes;
  uint32_t *zeros;  // a few, for a kernel that leaves zeros there
  uint32_t *done;   // the host's: to be set by finish()

#ifdef __CUDACC__
  // Source and destination.
  __device__ int2 pair(int i) const {
    if (number_bytes == 2) {
      const auto *const group = static_cast<const uint16_t *>(pairs) + (i / 4 * 8 + i % 4);
      return make_int2(group[0], group[4]);
    }
    const auto *const group = static_cast<const int32_t *>(pairs) + (i / 2 * 4 + i % 2);
    return make_int2(group[0], group[2]);
  }
  // The end of a warp, which is a thread block: the last one leaves the zeros and tells the host.
  __device__ void finish() const {
    __syncwarp();
    if (threadIdx.x > 0 || atomicAdd(zeros + 1, 1) < gridDim.x - 1) return;
    zeros[0] = zeros[1] = 0;
    __threadfence_system();
    *static_cast<volatile uint32_t *>(done) = 1;
  }
#endif
};

// Room for the packed pairs of one call, and the addresses of its caches, in page-locked memory that no kernel uses any
// more.
class SwapPairs {
 public:
  SwapPairs(const CopyBlocksParams &params, cudaStream_t stream);
  ~SwapPairs();  // the memory serves other calls once the stream has got here
  SwapPairs(const SwapPairs &) = delete;
  SwapPairs &operator=(const SwapPairs &) = delete;

  // The pairs, to be filled before the call below.
  void *host() const;
  // A copy in device memory, enqueued on the stream, beside the addresses of `params`, which are the device's.  To be
  // followed by one kernel, whose warps each end with finish().
  SwapTables on_device(const CopyBlocksParams &params);
  // An event behind the kernels that read that copy, from now on; null if none do.
  std::shared_ptr<Event> end_of_use();

 private:
  void need_memory();

  cudaStream_t stream_;
  int64_t num_caches_;
  std::unique_ptr<PairBuffer> buffer_;
  bool used_ = false;
};

}  // namespace pagedattn::cuda
