// Encodes tensor maps with the driver's own function.
//
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>

#include "runtime.h"
#include "status.h"
#include "tensor_map.h"

namespace pagedattn::cuda {
namespace {

constexpr int64_t kWidenedColumn = 64;  // elements of queries that are to be widened
constexpr int64_t kAlignment = 16;
constexpr int64_t kUnusedStride = 128;

// Strides of extents of one are never used and need not fit.
bool stride_fits(int64_t elements, int64_t element_size, int64_t extent) {
  if (extent <= 1) return true;
  const int64_t bytes = elements * element_size;
  return elements > 0 && bytes % kAlignment == 0 && bytes < int64_t{1} << 40;
}

bool cache_fits(const AttentionParams &params, const CacheView &cache) {
  const int64_t size = dtype_size(params.kv_dtype);
  return reinterpret_cast<uintptr_t>(cache.data) % kAlignment == 0 &&
         stride_fits(cache.token_stride, size, params.block_size) &&
         stride_fits(cache.head_stride, size, params.num_kv_heads) &&
         stride_fits(cache.block_stride, size, params.num_blocks);
}

// The L2 cache fetches so many bytes at once.  More than a row would be of other heads, which other blocks read, later.
CUtensorMapL2promotion promotion(int64_t row_bytes) {
  if (row_bytes % 256 == 0) return CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  if (row_bytes % 128 == 0) return CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  if (row_bytes % 64 == 0) return CU_TENSOR_MAP_L2_PROMOTION_L2_64B;
  return CU_TENSOR_MAP_L2_PROMOTION_NONE;
}

// A tensor of five dimensions, the innermost first, whose elements follow each other.
struct Tensor {
  const void *data;
  int64_t element_size;
  std::array<int64_t, 5> extents;
  std::array<int64_t, 4> strides;  // of the outer four, in elements
  std::array<cuuint32_t, 5> box;
  bool is_cut;  // into columns as wide as a box, whose chunks are permuted
  int64_t row;  // elements that are read together
};

// As ColumnTile permutes chunks.
CUtensorMapSwizzle swizzle(const Tensor &tensor) {
  if (!tensor.is_cut) return CU_TENSOR_MAP_SWIZZLE_NONE;
  const int64_t column_bytes = tensor.box[0] * tensor.element_size;
  return column_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : column_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                              : CU_TENSOR_MAP_SWIZZLE_32B;
}

void check_driver(CUresult result, const char *function) {
  if (result == CUDA_SUCCESS) return;
  throw Error(PA_ERROR_CUDA, std::string("paged_attention: ") + function + " failed with CUDA driver error " +
                                 std::to_string(static_cast<int>(result)));
}

CUtensorMap encode(const Tensor &tensor) {
  cuuint64_t extents[5], strides[4];
  for (size_t i = 0; i < 5; ++i) {
    extents[i] = static_cast<cuuint64_t>(tensor.extents[i]);
    if (i == 0) continue;
    strides[i - 1] =
        static_cast<cuuint64_t>(tensor.extents[i] <= 1 ? kUnusedStride : tensor.strides[i - 1] * tensor.element_size);
  }
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  static const auto encode_tiled = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  CUtensorMap map;
  const CUresult result = encode_tiled(
      &map, tensor.element_size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 5,
      const_cast<void *>(tensor.data), extents, strides, tensor.box.data(), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle(tensor), promotion(tensor.row * tensor.element_size), CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check_driver(result, "cuTensorMapEncodeTiled");
  return map;
}

CUtensorMap at_address(const CUtensorMap &map, const void *data) {
  static const auto replace = driver_function<decltype(&cuTensorMapReplaceAddress)>("cuTensorMapReplaceAddress");
  CUtensorMap moved = map;
  check_driver(replace(&moved, const_cast<void *>(data)), "cuTensorMapReplaceAddress");
  return moved;
}

bool same_strides(const CacheView &k, const CacheView &v) {
  return k.block_stride == v.block_stride && k.token_stride == v.token_stride && k.head_stride == v.head_stride;
}

// How many heads further on the same head of the next block is, in both caches; 0 if none is, or there are too many for
// a coordinate.
int64_t heads_to_next_block(const AttentionParams &params) {
  if (params.num_kv_heads == 1) return 1;
  const CacheView &k = params.k_cache, &v = params.v_cache;
  const int64_t heads = params.num_blocks == 1 ? params.num_kv_heads : k.block_stride / k.head_stride;
  const auto fits = [&](const CacheView &cache) {
    return params.num_blocks == 1 || cache.block_stride == heads * cache.head_stride;
  };
  const bool enough = heads >= params.num_kv_heads && (params.num_blocks + 1) * heads < int64_t{1} << 31;
  return enough && fits(k) && fits(v) ? heads : 0;
}

CUtensorMap encode_cache(const AttentionParams &params, const CacheView &cache, const CacheBox &box) {
  const auto columns = static_cast<cuuint32_t>(box.columns), elements = static_cast<cuuint32_t>(box.elements);
  Tensor tensor{};
  tensor.data = cache.data;
  tensor.element_size = dtype_size(params.kv_dtype);
  tensor.is_cut = box.is_cut;
  tensor.row = params.head_dim * box.heads;
  if (box.heads_to_block > 0) {
    const bool one_head = params.num_kv_heads == 1;
    tensor.extents = {box.elements, 8, box.columns, params.block_size / 8, params.num_blocks * box.heads_to_block};
    tensor.strides = {cache.token_stride, box.elements, cache.token_stride * 8,
                      one_head ? cache.block_stride : cache.head_stride};
    tensor.box = {elements, 8, columns, static_cast<cuuint32_t>(box.tokens / 8), 1};
  } else {
    tensor.extents = {box.columns > 1 ? box.elements : params.head_dim, params.block_size, box.columns,
                      params.num_kv_heads / box.heads, params.num_blocks};
    tensor.strides = {cache.token_stride, box.elements, cache.head_stride * box.heads, cache.block_stride};
    tensor.box = {elements, static_cast<cuuint32_t>(box.tokens), columns, 1, 1};
  }
  return encode(tensor);
}

}  // namespace

bool shape_fits_tensor_maps(const AttentionParams &params) {
  return params.block_size % 8 == 0 && params.num_blocks > 0 && params.num_blocks < int64_t{1} << 31;
}

bool strides_fit_tensor_maps(const AttentionParams &params) {
  return cache_fits(params, params.k_cache) && cache_fits(params, params.v_cache);
}

bool queries_fit_tensor_map(const AttentionParams &params) {
  const int64_t size = dtype_size(params.q_dtype);
  return reinterpret_cast<uintptr_t>(params.q.data) % kAlignment == 0 &&
         stride_fits(params.q.head_stride, size, params.num_q_heads) &&
         stride_fits(params.q.token_stride, size, params.num_tokens);
}

bool heads_fill_rows(const AttentionParams &params, const CacheRowLayout &rows) {
  return params.head_dim * rows.heads * dtype_size(params.kv_dtype) == rows.columns * rows.row_bytes &&
         params.num_kv_heads % rows.heads == 0 && params.k_cache.head_stride == params.head_dim &&
         params.v_cache.head_stride == params.head_dim;
}

CacheBox cache_box(const AttentionParams &params, const CacheRowLayout &rows, int tile_tokens, bool whole) {
  const auto size = static_cast<int>(dtype_size(params.kv_dtype));
  const bool is_full = params.head_dim * rows.heads * size == rows.columns * rows.row_bytes;
  const int most_tokens = std::gcd(params.block_size, tile_tokens);
  const int64_t heads_to_block = whole && is_full && rows.columns > 1 ? heads_to_next_block(params) : 0;
  return {rows.columns > 1 && heads_to_block == 0 ? 8 : most_tokens,
          is_full ? rows.columns : 1,
          rows.row_bytes / size,
          rows.is_cut,
          rows.heads,
          heads_to_block};
}

void encode_caches(const AttentionParams &params, const CacheBox &box, CUtensorMap *k, CUtensorMap *v) {
  *k = encode_cache(params, params.k_cache, box);
  if (same_strides(params.k_cache, params.v_cache)) {
    *v = at_address(*k, params.v_cache.data);  // in a fifth of the time
  } else {
    *v = encode_cache(params, params.v_cache, box);
  }
}

CUtensorMap encode_queries(const AttentionParams &params, const CacheRowLayout &rows, int tokens) {
  const int group = params.num_q_heads / params.num_kv_heads;
  const int64_t size = dtype_size(params.q_dtype);
  Tensor tensor{};
  tensor.data = params.q.data;
  tensor.element_size = size;
  tensor.is_cut = size == 2 || rows.is_cut;  // what widens float8 puts it in its place
  tensor.row = params.head_dim;
  tensor.extents = {params.head_dim, group, params.num_kv_heads, params.num_tokens, 1};
  tensor.strides = {params.q.head_stride, params.q.head_stride * group, params.q.token_stride, 0};
  const auto column = static_cast<cuuint32_t>(rows.is_cut ? rows.row_bytes / size : kWidenedColumn);
  tensor.box = {column, static_cast<cuuint32_t>(group), 1, static_cast<cuuint32_t>(tokens), 1};
  return encode(tensor);
}

}  // namespace pagedattn::cuda
