// The Hopper decode kernels for bfloat16 queries over bfloat16 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_decode.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_decode_bfloat16() {
  static const HopperKernel kKernels[] = {
      hopper_decode<__nv_bfloat16, 64>("hopper_decode_bfloat16_d64"),
      hopper_decode<__nv_bfloat16, 80>("hopper_decode_bfloat16_d80"),
      hopper_decode<__nv_bfloat16, 96>("hopper_decode_bfloat16_d96"),
      hopper_decode<__nv_bfloat16, 112>("hopper_decode_bfloat16_d112"),
      hopper_decode<__nv_bfloat16, 128>("hopper_decode_bfloat16_d128"),
      hopper_decode<__nv_bfloat16, 192>("hopper_decode_bfloat16_d192"),
      hopper_decode<__nv_bfloat16, 256>("hopper_decode_bfloat16_d256"),
      hopper_decode<__nv_bfloat16, 80, 4>("hopper_decode_bfloat16_d80_4_heads"),
      hopper_decode<__nv_bfloat16, 96, 4>("hopper_decode_bfloat16_d96_4_heads"),
      hopper_decode<__nv_bfloat16, 112, 4>("hopper_decode_bfloat16_d112_4_heads"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
