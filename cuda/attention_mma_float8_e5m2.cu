// The tensor-core attention kernels for 16-bit queries, and float8 ones, over float8 e5m2 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "attention_mma.cuh"

namespace pagedattn::cuda {

const AttentionKernelPair &attention_mma_float8_e5m2(int head_dim_tile) {
  static const AttentionKernelPair kKernels[kNumHeadDimTiles] = {
      {attention_mma<Float8E5M2, 64, false>("mma_float8_e5m2_d64_few_rows"),
       attention_mma<Float8E5M2, 64, true>("mma_float8_e5m2_d64_many_rows")},
      {attention_mma<Float8E5M2, 128, false>("mma_float8_e5m2_d128_few_rows"),
       attention_mma<Float8E5M2, 128, true>("mma_float8_e5m2_d128_many_rows")},
      {attention_mma<Float8E5M2, 256, false>("mma_float8_e5m2_d256_few_rows"),
       attention_mma<Float8E5M2, 256, true>("mma_float8_e5m2_d256_many_rows")},
  };
  return kKernels[head_dim_tile];
}

}  // namespace pagedattn::cuda
