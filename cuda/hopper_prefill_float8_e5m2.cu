// The Hopper prefill kernels for 16-bit queries, and float8 ones, over float8 e5m2 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_prefill.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_prefill_float8_e5m2() {
  static const HopperKernel kKernels[] = {
      hopper_prefill<Float8E5M2, 64>("hopper_prefill_float8_e5m2_d64"),
      hopper_prefill<Float8E5M2, 80>("hopper_prefill_float8_e5m2_d80"),
      hopper_prefill<Float8E5M2, 96>("hopper_prefill_float8_e5m2_d96"),
      hopper_prefill<Float8E5M2, 112>("hopper_prefill_float8_e5m2_d112"),
      hopper_prefill<Float8E5M2, 128>("hopper_prefill_float8_e5m2_d128"),
      hopper_prefill<Float8E5M2, 192>("hopper_prefill_float8_e5m2_d192"),
      hopper_prefill<Float8E5M2, 256>("hopper_prefill_float8_e5m2_d256"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
