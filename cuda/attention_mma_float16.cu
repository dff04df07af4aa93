// The tensor-core attention kernels for float16 queries over float16 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "attention_mma.cuh"

namespace pagedattn::cuda {

const AttentionKernelPair &attention_mma_float16(int head_dim_tile) {
  static const AttentionKernelPair kKernels[kNumHeadDimTiles] = {
      {attention_mma<__half, 64, false>("mma_float16_d64_few_rows"),
       attention_mma<__half, 64, true>("mma_float16_d64_many_rows")},
      {attention_mma<__half, 128, false>("mma_float16_d128_few_rows"),
       attention_mma<__half, 128, true>("mma_float16_d128_many_rows")},
      {attention_mma<__half, 256, false>("mma_float16_d256_few_rows"),
       attention_mma<__half, 256, true>("mma_float16_d256_many_rows")},
  };
  return kKernels[head_dim_tile];
}

}  // namespace pagedattn::cuda
