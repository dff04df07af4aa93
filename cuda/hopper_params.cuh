// What the Hopper decode kernels are given besides what every attention kernel is.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "attention_params.cuh"

namespace pagedattn::cuda {

struct HopperDecodeParams : AttentionKernelParams {
  int32_t box_columns;  // of 128 bytes that the copy engine takes at once: all, or one where D fills them only in part
  CUtensorMap k_map;    // [N, Hkv, columns, S, elements]
  CUtensorMap v_map;
};

}  // namespace pagedattn::cuda
