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
  bool is_cut;   // see CacheRowLayout
  int heads;     // side by side in a row
  // More than eight tokens in several columns are eight tokens after eight.  That takes a dimension, and heads and
  // blocks are one: a block is so many heads further on.  0: they are not.
  int64_t heads_to_block;
};
// `whole`: of as many tokens as there are, even if rows have several columns.
CacheBox cache_box(const AttentionParams &params, const CacheRowLayout &rows, int tile_tokens, bool whole);

// The maps of both caches: [N, Hkv / heads, columns, S, elements], or [N, Hkv, 1, S, D], or
// [N Hkv, S / 8, columns, 8, elements].  Throws PA_ERROR_CUDA.
void encode_caches(const AttentionParams &params, const CacheBox &box, CUtensorMap *k, CUtensorMap *v);

// The map of queries, [1, T, Hkv, Hq / Hkv, D], of which it takes a column of so many tokens of one KV head at once: as
// wide as the cache's if its rows are cut, or else of 64 elements, which are to become float16.  Throws PA_ERROR_CUDA.
CUtensorMap encode_queries(const AttentionParams &params, const CacheRowLayout &rows, int tokens);

}  // namespace pagedattn::cuda
