// The Hopper decode kernels for bfloat16 queries over bfloat16 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_decode.cuh"

namespace pagedattn::cuda {

const HopperDecodeKernel &hopper_decode_bfloat16(int head_dim_tile) {
  static const HopperDecodeKernel kKernels[kNumHopperTiles] = {
      hopper_decode<__nv_bfloat16, 64>("hopper_decode_bfloat16_d64",
                                       "hopper_decode_bfloat16_d64+mma_bfloat16_d64_many_rows"),
      hopper_decode<__nv_bfloat16, 128>("hopper_decode_bfloat16_d128",
                                        "hopper_decode_bfloat16_d128+mma_bfloat16_d128_many_rows"),
      hopper_decode<__nv_bfloat16, 192>("hopper_decode_bfloat16_d192",
                                        "hopper_decode_bfloat16_d192+mma_bfloat16_d256_many_rows"),
      hopper_decode<__nv_bfloat16, 256>("hopper_decode_bfloat16_d256",
                                        "hopper_decode_bfloat16_d256+mma_bfloat16_d256_many_rows"),
  };
  return kKernels[head_dim_tile];
}

}  // namespace pagedattn::cuda
