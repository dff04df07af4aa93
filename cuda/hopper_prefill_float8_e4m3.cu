// The Hopper prefill kernels for 16-bit queries, and float8 ones, over float8 e4m3 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_prefill.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_prefill_float8_e4m3() {
  static const HopperKernel kKernels[] = {
      hopper_prefill<Float8E4M3, 64>("hopper_prefill_float8_e4m3_d64"),
      hopper_prefill<Float8E4M3, 80>("hopper_prefill_float8_e4m3_d80"),
      hopper_prefill<Float8E4M3, 96>("hopper_prefill_float8_e4m3_d96"),
      hopper_prefill<Float8E4M3, 112>("hopper_prefill_float8_e4m3_d112"),
      hopper_prefill<Float8E4M3, 128>("hopper_prefill_float8_e4m3_d128"),
      hopper_prefill<Float8E4M3, 192>("hopper_prefill_float8_e4m3_d192"),
      hopper_prefill<Float8E4M3, 256>("hopper_prefill_float8_e4m3_d256"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
