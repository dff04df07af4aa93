// The Hopper prefill kernels for bfloat16 queries over bfloat16 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_prefill.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_prefill_bfloat16() {
  static const HopperKernel kKernels[] = {
      hopper_prefill<__nv_bfloat16, 64>("hopper_prefill_bfloat16_d64"),
      hopper_prefill<__nv_bfloat16, 80>("hopper_prefill_bfloat16_d80"),
      hopper_prefill<__nv_bfloat16, 96>("hopper_prefill_bfloat16_d96"),
      hopper_prefill<__nv_bfloat16, 112>("hopper_prefill_bfloat16_d112"),
      hopper_prefill<__nv_bfloat16, 128>("hopper_prefill_bfloat16_d128"),
      hopper_prefill<__nv_bfloat16, 192>("hopper_prefill_bfloat16_d192"),
      hopper_prefill<__nv_bfloat16, 256>("hopper_prefill_bfloat16_d256"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
