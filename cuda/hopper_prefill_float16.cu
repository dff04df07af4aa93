// The Hopper prefill kernels for float16 queries over float16 caches.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_prefill.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_prefill_float16() {
  static const HopperKernel kKernels[] = {
      hopper_prefill<__half, 64>("hopper_prefill_float16_d64"),
      hopper_prefill<__half, 80>("hopper_prefill_float16_d80"),
      hopper_prefill<__half, 96>("hopper_prefill_float16_d96"),
      hopper_prefill<__half, 112>("hopper_prefill_float16_d112"),
      hopper_prefill<__half, 128>("hopper_prefill_float16_d128"),
      hopper_prefill<__half, 192>("hopper_prefill_float16_d192"),
      hopper_prefill<__half, 256>("hopper_prefill_float16_d256"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
