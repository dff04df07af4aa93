// The Hopper prefill kernels for float8 queries over float8 caches, which multiply in float8.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_prefill.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_prefill_products_float8_e4m3() {
  static const HopperKernel kKernels[] = {
      hopper_prefill_products<Float8E4M3, 64>("hopper_prefill_products_float8_e4m3_d64"),
      hopper_prefill_products<Float8E4M3, 96>("hopper_prefill_products_float8_e4m3_d96"),
      hopper_prefill_products<Float8E4M3, 128>("hopper_prefill_products_float8_e4m3_d128"),
      hopper_prefill_products<Float8E4M3, 192>("hopper_prefill_products_float8_e4m3_d192"),
  };
  return kKernels;
}

HopperKernels hopper_prefill_products_float8_e5m2() {
  static const HopperKernel kKernels[] = {
      hopper_prefill_products<Float8E5M2, 64>("hopper_prefill_products_float8_e5m2_d64"),
      hopper_prefill_products<Float8E5M2, 96>("hopper_prefill_products_float8_e5m2_d96"),
      hopper_prefill_products<Float8E5M2, 128>("hopper_prefill_products_float8_e5m2_d128"),
      hopper_prefill_products<Float8E5M2, 192>("hopper_prefill_products_float8_e5m2_d192"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
