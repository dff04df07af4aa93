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

}  // namespace

bool fits_tensor_maps(const AttentionParams &params) {
  const int64_t row_bytes = params.head_dim * dtype_size(params.kv_dtype);
  const bool row_fits = row_bytes <= kColumnBytes || row_bytes % kAlignment == 0;
  return row_fits && params.block_size % 8 == 0 && params.num_blocks > 0 && params.num_blocks < int64_t{1} << 31 &&
         cache_fits(params, params.k_cache) && cache_fits(params, params.v_cache);
}

CacheBox cache_box(const AttentionParams &params, int tile_tokens) {
  CacheBox box{};
  box.tokens = std::gcd(params.block_size, tile_tokens);
  box.row_bytes = static_cast<int32_t>(params.head_dim * dtype_size(params.kv_dtype));
  box.is_dense = box.row_bytes > kColumnBytes && box.row_bytes % kColumnBytes != 0;
  if (box.is_dense) {
    box.row_stride = box.row_bytes;
    box.column_stride = kColumnBytes;
    box.bytes = box.tokens * box.row_bytes;
    box.stride8 = 8 * box.row_bytes;
    box.stride16 = 16 * box.row_bytes;
  } else {
    const int columns = (box.row_bytes + kColumnBytes - 1) / kColumnBytes;
    box.row_stride = kColumnBytes;
    box.column_stride = box.tokens * kColumnBytes;
    box.bytes = columns * box.column_stride;
    box.stride8 = box.tokens >= 16 ? 8 * kColumnBytes : box.bytes;
    box.stride16 = box.tokens >= 32 ? 16 * kColumnBytes : 16 / box.tokens * box.bytes;
  }
  return box;
}

CUtensorMap encode_cache(const AttentionParams &params, const CacheView &cache, const CacheBox &box) {
  const auto size = static_cast<cuuint64_t>(dtype_size(params.kv_dtype));
  const auto column_elements = static_cast<cuuint32_t>(kColumnBytes / static_cast<int>(size));
  const auto head_dim = static_cast<cuuint32_t>(params.head_dim);
  // Rows of several whole columns are cut into them; others are one column, perhaps filled up with zeros.
  const bool is_cut = !box.is_dense && box.row_bytes > kColumnBytes;
  const cuuint32_t columns = is_cut ? head_dim / column_elements : 1;
  const auto stride = [&](int64_t elements, int64_t extent) {
    return extent <= 1 ? static_cast<cuuint64_t>(kColumnBytes) : static_cast<cuuint64_t>(elements) * size;
  };
  const cuuint64_t extents[5] = {is_cut ? column_elements : head_dim, static_cast<cuuint64_t>(params.block_size),
                                 columns, static_cast<cuuint64_t>(params.num_kv_heads),
                                 static_cast<cuuint64_t>(params.num_blocks)};
  const cuuint64_t strides[4] = {stride(cache.token_stride, params.block_size), kColumnBytes,
                                 stride(cache.head_stride, params.num_kv_heads),
                                 stride(cache.block_stride, params.num_blocks)};
  const cuuint32_t box_extents[5] = {box.is_dense ? head_dim : column_elements, static_cast<cuuint32_t>(box.tokens),
                                     columns, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encoder()(&map, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 5,
                                    cache.data, extents, strides, box_extents, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    box.is_dense ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(PA_ERROR_CUDA, "paged_attention: cuTensorMapEncodeTiled failed with CUDA driver error " +
                                   std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace pagedattn::cuda
