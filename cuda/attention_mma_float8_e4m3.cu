// The tensor-core attention kernels for 16-bit queries, and float8 ones, over float8 e4m3 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "attention_mma.cuh"

namespace pagedattn::cuda {

const AttentionKernelPair &attention_mma_float8_e4m3(int head_dim_tile) {
  static const AttentionKernelPair kKernels[kNumHeadDimTiles] = {
      {attention_mma<Float8E4M3, 64, false>("mma_float8_e4m3_d64_few_rows"),
       attention_mma<Float8E4M3, 64, true>("mma_float8_e4m3_d64_many_rows")},
      {attention_mma<Float8E4M3, 128, false>("mma_float8_e4m3_d128_few_rows"),
       attention_mma<Float8E4M3, 128, true>("mma_float8_e4m3_d128_many_rows")},
      {attention_mma<Float8E4M3, 256, false>("mma_float8_e4m3_d256_few_rows"),
       attention_mma<Float8E4M3, 256, true>("mma_float8_e4m3_d256_many_rows")},
  };
  return kKernels[head_dim_tile];
}

}  // namespace pagedattn::cuda
