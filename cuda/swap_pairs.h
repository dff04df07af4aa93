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

// The caches of a call and its packed pairs (index_checks.h) behind them, to be read by SwapTableReader.
struct SwapTables {
  const char *host;  // in page-locked memory
  char *copy;        // in device memory
  uint32_t bytes;
  uint32_t pairs_begin;
  int number_bytes;
  uint32_t *zeros;  // a few in device memory, for a kernel that leaves zeros there
  uint32_t *done;   // in page-locked memory, set at the kernel's end
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
  // The pairs and the addresses of `params`, which are the device's: for one kernel on the stream, behind a copy that
  // has been enqueued, or to be brought by the kernel itself.
  SwapTables copied(const CopyBlocksParams &params);
  SwapTables to_be_brought(const CopyBlocksParams &params);
  // An event behind that kernel, from now on; null if there is none.
  std::shared_ptr<Event> end_of_use();

 private:
  void need_memory();

  cudaStream_t stream_;
  int64_t num_caches_;
  std::unique_ptr<PairBuffer> buffer_;
  bool used_ = false;
};

}  // namespace pagedattn::cuda
