// Tensor maps: what the bulk tensor copy engine of Hopper is told of a paged cache.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "attention_kernel.h"
#include "params.h"

namespace pagedattn::cuda {

// Can the copy engine read both caches, eight tokens or more of one block at a time?
bool shape_fits_tensor_maps(const AttentionParams &params);
bool strides_fit_tensor_maps(const AttentionParams &params);
// And queries?
bool queries_fit_tensor_map(const AttentionParams &params);

// Do the heads that are to lie side by side in a tile's rows do so in both caches, and fill these rows?
bool heads_fill_rows(const AttentionParams &params, const CacheRowLayout &rows);

// What it takes at once.  Elements past D come as zeros.
struct CacheBox {
  int tokens;    // of one block, and a divisor of the tile's
  int columns;   // that a row is cut into: all of them, or one at a time where D does not fill the last
  int elements;  // of a column
  bool is_cut;   // see BoxTile
  int heads;     // side by side in a row
};
CacheBox cache_box(const AttentionParams &params, const CacheRowLayout &rows, int tile_tokens);

// The map of one cache: [N, Hkv / heads, columns, S, elements], or [N, Hkv, 1, S, D].  Throws PA_ERROR_CUDA.
CUtensorMap encode_cache(const AttentionParams &params, const CacheView &cache, const CacheBox &box);

// The map of queries, [1, T, Hkv, Hq / Hkv, D], of which it takes 64 elements of so many tokens of one KV head at once.
// Throws PA_ERROR_CUDA.
CUtensorMap encode_queries(const AttentionParams &params, int tokens);

}  // namespace pagedattn::cuda
