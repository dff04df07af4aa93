// The Hopper decode kernels for 16-bit queries, and float8 ones, over float8 e4m3 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_decode.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_decode_float8_e4m3() {
  static const HopperKernel kKernels[] = {
      hopper_decode<Float8E4M3, 64>("hopper_decode_float8_e4m3_d64"),
      hopper_decode<Float8E4M3, 128>("hopper_decode_float8_e4m3_d128"),
      hopper_decode<Float8E4M3, 192>("hopper_decode_float8_e4m3_d192"),
      hopper_decode<Float8E4M3, 256>("hopper_decode_float8_e4m3_d256"),
      hopper_decode<Float8E4M3, 192, 4>("hopper_decode_float8_e4m3_d192_4_heads"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
