// The Hopper decode kernels for float16 queries over float16 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_decode.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_decode_float16() {
  static const HopperKernel kKernels[] = {
      hopper_decode<__half, 64>("hopper_decode_float16_d64"),
      hopper_decode<__half, 80>("hopper_decode_float16_d80"),
      hopper_decode<__half, 96>("hopper_decode_float16_d96"),
      hopper_decode<__half, 112>("hopper_decode_float16_d112"),
      hopper_decode<__half, 128>("hopper_decode_float16_d128"),
      hopper_decode<__half, 192>("hopper_decode_float16_d192"),
      hopper_decode<__half, 256>("hopper_decode_float16_d256"),
      hopper_decode<__half, 80, 4>("hopper_decode_float16_d80_4_heads"),
      hopper_decode<__half, 96, 4>("hopper_decode_float16_d96_4_heads"),
      hopper_decode<__half, 112, 4>("hopper_decode_float16_d112_4_heads"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
