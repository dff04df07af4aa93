// What the Hopper decode kernels are given besides what every attention kernel is.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "attention_params.cuh"

namespace pagedattn::cuda {

// What the copy engine takes at once, `tokens` of one block, and how they lie in shared memory: either in columns of
// 128 bytes, each a stack of the tokens with their 16-byte chunks permuted (chunk ^= token % 8), the last column filled
// up with zeros; or, where D would leave much of a second or later column empty, densely, one token after the other.
// Strides are in bytes.
struct CacheBox {
  int32_t tokens;  // 8, 16 or 32
  int32_t bytes;
  int32_t row_bytes;   // of a token in the cache
  int32_t row_stride;  // from a token to the next
  int32_t stride8;     // to the eighth, which may lie in another box
  int32_t stride16;
  int32_t column_stride;
  bool is_dense;
};

struct HopperDecodeParams : AttentionKernelParams {
  CacheBox box;
  CUtensorMap k_map;
  CUtensorMap v_map;
};

}  // namespace pagedattn::cuda
