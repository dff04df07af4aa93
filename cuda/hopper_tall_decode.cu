// The Hopper decode kernels for 17 to 64 rows a KV head, over 16-bit caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_decode.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_tall_decode_float16() {
  static const HopperKernel kKernels[] = {
      hopper_decode<__half, 64, 1, true>("hopper_decode_float16_d64_tall"),
      hopper_decode<__half, 128, 1, true>("hopper_decode_float16_d128_tall"),
      hopper_decode<__half, 256, 1, true>("hopper_decode_float16_d256_tall"),
  };
  return kKernels;
}

HopperKernels hopper_tall_decode_bfloat16() {
  static const HopperKernel kKernels[] = {
      hopper_decode<__nv_bfloat16, 64, 1, true>("hopper_decode_bfloat16_d64_tall"),
      hopper_decode<__nv_bfloat16, 128, 1, true>("hopper_decode_bfloat16_d128_tall"),
      hopper_decode<__nv_bfloat16, 256, 1, true>("hopper_decode_bfloat16_d256_tall"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
