// What the Hopper decode kernels are given besides what every attention kernel is.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "attention_params.cuh"

namespace pagedattn::cuda {

struct HopperDecodeParams : AttentionKernelParams {
  // What the copy engine takes at once: tokens of one block, and columns (see BoxTile).
  int32_t box_tokens;
  int32_t box_columns;
  int32_t box_bytes;
  CUtensorMap k_map;
  CUtensorMap v_map;
};

}  // namespace pagedattn::cuda
