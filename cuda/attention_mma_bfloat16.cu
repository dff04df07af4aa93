// The tensor-core attention kernels for bfloat16 queries over bfloat16 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "attention_mma.cuh"

namespace pagedattn::cuda {

const AttentionKernelPair &attention_mma_bfloat16(int head_dim_tile) {
  static const AttentionKernelPair kKernels[kNumHeadDimTiles] = {
      {attention_mma<__nv_bfloat16, 64, false>("mma_bfloat16_d64_few_rows"),
       attention_mma<__nv_bfloat16, 64, true>("mma_bfloat16_d64_many_rows")},
      {attention_mma<__nv_bfloat16, 128, false>("mma_bfloat16_d128_few_rows"),
       attention_mma<__nv_bfloat16, 128, true>("mma_bfloat16_d128_many_rows")},
      {attention_mma<__nv_bfloat16, 256, false>("mma_bfloat16_d256_few_rows"),
       attention_mma<__nv_bfloat16, 256, true>("mma_bfloat16_d256_many_rows")},
  };
  return kKernels[head_dim_tile];
}

}  // namespace pagedattn::cuda
