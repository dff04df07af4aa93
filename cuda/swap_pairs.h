// The pairs of a swap where its kernels find them.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

namespace pagedattn::cuda {

struct PairBuffer;

// Room for the pairs of one call, as numbers of 32 bits, in page-locked memory that no kernel uses any more.
class SwapPairs {
 public:
  SwapPairs(int64_t num_pairs, cudaStream_t stream);
  ~SwapPairs();  // the memory serves other calls once the stream has got here
  SwapPairs(const SwapPairs &) = delete;
  SwapPairs &operator=(const SwapPairs &) = delete;

  // To be filled, before those below.
  int32_t *host() const;
  // A copy in device memory, enqueued on the stream.
  const int2 *on_device();
  // A few zeros in device memory, for a kernel that leaves zeros there.
  uint32_t *zeros();

 private:
  void need_memory();

  int64_t num_pairs_;
  cudaStream_t stream_;
  std::unique_ptr<PairBuffer> buffer_;
  bool used_ = false;
};

}  // namespace pagedattn::cuda
