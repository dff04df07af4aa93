// Tensor maps: what the bulk tensor copy engine of Hopper is told of a paged cache.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hopper_params.cuh"
#include "params.h"

namespace pagedattn::cuda {

// Can the copy engine read both caches, eight tokens or more of one block at a time?
bool fits_tensor_maps(const AttentionParams &params);

// What it takes at once, at most `tile_tokens` tokens.
CacheBox cache_box(const AttentionParams &params, int tile_tokens);

// The map of one cache, [N, Hkv, columns, S, elements of a column].  Throws PA_ERROR_CUDA.
CUtensorMap encode_cache(const AttentionParams &params, const CacheView &cache, const CacheBox &box);

}  // namespace pagedattn::cuda
