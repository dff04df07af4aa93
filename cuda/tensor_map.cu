// Encodes tensor maps with the driver's own function.
//
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <cstdint>
#include <numeric>
#include <string>

#include "runtime.h"
#include "status.h"
#include "tensor_map.h"

namespace pagedattn::cuda {
namespace {

constexpr int kColumnBytes = 128;
constexpr int64_t kAlignment = 16;

// The driver's encoder, found at run time: the library links no libcuda.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    if (entry == nullptr || found != cudaDriverEntryPointSuccess) {
      throw Error(PA_ERROR_CUDA, "the CUDA driver has no cuTensorMapEncodeTiled; update the driver");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return function;
}

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

}  // namespace

bool shape_fits_tensor_maps(const AttentionParams &params) {
  return params.block_size % 8 == 0 && params.num_blocks > 0 && params.num_blocks < int64_t{1} << 31;
}

bool strides_fit_tensor_maps(const AttentionParams &params) {
  return cache_fits(params, params.k_cache) && cache_fits(params, params.v_cache);
}

bool heads_fill_rows(const AttentionParams &params, const CacheRowLayout &rows) {
  return params.head_dim * rows.heads * dtype_size(params.kv_dtype) == rows.columns * rows.row_bytes &&
         params.num_kv_heads % rows.heads == 0 && params.k_cache.head_stride == params.head_dim &&
         params.v_cache.head_stride == params.head_dim;
}

CacheBox cache_box(const AttentionParams &params, const CacheRowLayout &rows, int tile_tokens) {
  const auto size = static_cast<int>(dtype_size(params.kv_dtype));
  const bool is_full = params.head_dim * rows.heads * size == rows.columns * rows.row_bytes;
  return {rows.columns > 1 ? 8 : std::gcd(params.block_size, tile_tokens), is_full ? rows.columns : 1,
          rows.row_bytes / size, rows.is_cut, rows.heads};
}

CUtensorMap encode_cache(const AttentionParams &params, const CacheView &cache, const CacheBox &box) {
  const auto size = static_cast<cuuint64_t>(dtype_size(params.kv_dtype));
  const auto stride = [&](int64_t elements, int64_t extent) {
    return extent <= 1 ? static_cast<cuuint64_t>(kColumnBytes) : static_cast<cuuint64_t>(elements) * size;
  };
  const auto columns = static_cast<cuuint32_t>(box.columns), elements = static_cast<cuuint32_t>(box.elements);
  const cuuint64_t extents[5] = {
      columns > 1 ? elements : static_cast<cuuint64_t>(params.head_dim), static_cast<cuuint64_t>(params.block_size),
      columns, static_cast<cuuint64_t>(params.num_kv_heads / box.heads), static_cast<cuuint64_t>(params.num_blocks)};
  const cuuint64_t strides[4] = {stride(cache.token_stride, params.block_size), kColumnBytes,
                                 stride(cache.head_stride * box.heads, params.num_kv_heads),
                                 stride(cache.block_stride, params.num_blocks)};
  const cuuint32_t box_extents[5] = {elements, static_cast<cuuint32_t>(box.tokens), columns, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, cache.data,
                extents, strides, box_extents, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                box.is_cut ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                promotion(params.head_dim * box.heads * static_cast<int64_t>(size)), CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(PA_ERROR_CUDA, "paged_attention: cuTensorMapEncodeTiled failed with CUDA driver error " +
                                   std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace pagedattn::cuda
