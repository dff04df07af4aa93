// The Hopper decode kernels for 16-bit queries, and float8 ones, over float8 e5m2 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_decode.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_decode_float8_e5m2() {
  static const HopperKernel kKernels[] = {
      hopper_decode<Float8E5M2, 64>("hopper_decode_float8_e5m2_d64"),
      hopper_decode<Float8E5M2, 128>("hopper_decode_float8_e5m2_d128"),
      hopper_decode<Float8E5M2, 192>("hopper_decode_float8_e5m2_d192"),
      hopper_decode<Float8E5M2, 256>("hopper_decode_float8_e5m2_d256"),
      hopper_decode<Float8E5M2, 192, 4>("hopper_decode_float8_e5m2_d192_4_heads"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
