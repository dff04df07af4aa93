// Tensor maps: what the bulk tensor copy engine of Hopper is told of a paged cache.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "params.h"

namespace pagedattn::cuda {

// Can the copy engine read both caches, in boxes of eight tokens of one block?
bool fits_tensor_maps(const AttentionParams &params);

// Columns of 128 bytes that a box has, where rows fill `columns` of them, the last perhaps in part.
int box_columns(const AttentionParams &params, int columns);

// The map of one cache: [N, Hkv, columns, S, elements of 128 bytes], or [N, Hkv, 1, S, D] where D does not fill the
// last column.  Elements past D read as zeros.  Throws PA_ERROR_CUDA.
CUtensorMap encode_cache(const AttentionParams &params, const CacheView &cache, int columns);

}  // namespace pagedattn::cuda
