// What the Hopper kernels are given besides what every attention kernel is.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "attention_params.cuh"

namespace pagedattn::cuda {

// For the bulk tensor copy engine, see tensor_map.h.
struct TensorMaps {
  // What it takes at once of a cache: tokens of one block, and columns.
  int32_t box_tokens;
  int32_t box_columns;
  int32_t box_bytes;
  int32_t heads_to_block;  // see CacheBox
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap q;  // of prefill's queries
};

struct HopperParams : AttentionKernelParams {
  float plain_scale;  // a score in units of log 2 is a product times this; 0 where it takes more than that to make one
  uint32_t zero;      // that the compiler does not know to be one
  float *announced;   // parts of few sequences, zero between launches, see announced_parts.cuh
  TensorMaps maps;
};

}  // namespace pagedattn::cuda
