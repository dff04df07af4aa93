// The Hopper decode kernels for few sequences.
//
// SPDX-License-Identifier: Apache-2.0
#include "hopper_few_sequences.cuh"

namespace pagedattn::cuda {

HopperKernels hopper_few_sequences_float16() {
  static const HopperKernel kKernels[] = {
      hopper_few_sequences<__half, 128>("hopper_decode_float16_d128_few_sequences"),
  };
  return kKernels;
}

HopperKernels hopper_few_sequences_bfloat16() {
  static const HopperKernel kKernels[] = {
      hopper_few_sequences<__nv_bfloat16, 128>("hopper_decode_bfloat16_d128_few_sequences"),
  };
  return kKernels;
}

}  // namespace pagedattn::cuda
