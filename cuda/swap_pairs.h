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

// In device memory.
struct SwapTables {
  const SwapCache *caches;
  const int2 *pairs;
  uint32_t *zeros;  // a few, for a kernel that leaves zeros there
};

// Room for the pairs of one call, as numbers of 32 bits, and the addresses of its caches, in page-locked memory that no
// kernel uses any more.
class SwapPairs {
 public:
  SwapPairs(const CopyBlocksParams &params, cudaStream_t stream);
  ~SwapPairs();  // the memory serves other calls once the stream has got here
  SwapPairs(const SwapPairs &) = delete;
  SwapPairs &operator=(const SwapPairs &) = delete;

  // The pairs, to be filled before the call below.
  int32_t *host() const;
  // A copy in device memory, enqueued on the stream, beside the addresses of `params`, which are the device's.
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
