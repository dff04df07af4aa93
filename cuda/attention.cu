// Paged attention on CUDA devices: picks the kernels for a call, gives them a workspace and launches them.
//
// SPDX-License-Identifier: Apache-2.0
//
// Lengths are known on the device alone, so sequences of few rows a KV head (decode) and of many (prefill) are told
// apart there: where a batch may hold both, both kernels are launched and each passes over the other's sequences.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "access.cuh"
#include "attention.h"
#include "attention_kernel.h"
#include "attention_params.cuh"
#include "cuda_backend.h"
#include "runtime.h"
#include "status.h"

namespace pagedattn::cuda {
namespace {

constexpr std::array<int, kNumHeadDimTiles> kHeadDimTiles = {64, 128, 256};
// Rows of a sequence and keys of a tile are counted in 31 bits with room to spare.
constexpr int64_t kMaxRows = int64_t{1} << 30;
constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max() - 1024;

// ---- which kernel --------------------------------------------------------------------------------------------

int head_dim_tile(int head_dim) {
  int tile = 0;
  while (kHeadDimTiles[static_cast<size_t>(tile)] < head_dim) ++tile;
  return tile;
}

const AttentionKernelPair &mma_kernels(DType kv_dtype, int tile) {
  switch (kv_dtype) {
    case DType::kFloat16:
      return attention_mma_float16(tile);
    case DType::kBFloat16:
      return attention_mma_bfloat16(tile);
    case DType::kFloat8E4M3:
      return attention_mma_float8_e4m3(tile);
    case DType::kFloat8E5M2:
      return attention_mma_float8_e5m2(tile);
    default:
      throw Error(PA_ERROR_INTERNAL, "paged_attention: no CUDA kernel for this cache type");
  }
}

struct Selection {
  const char *name;
  std::array<const AttentionKernel *, 2> kernels;  // in launch order; the second may be null
};

// The one place that decides.
Selection select_kernels(const AttentionParams &params) {
  const int tile = head_dim_tile(params.head_dim);
  if (params.q_dtype == DType::kFloat32) {
    const AttentionKernel &kernel = attention_fma_float32(tile);
    return {kernel.name, {&kernel, nullptr}};
  }
  const AttentionKernelPair &pair = mma_kernels(params.kv_dtype, tile);
  const int64_t group = params.num_q_heads / params.num_kv_heads;
  const int64_t most_rows = params.query_start_loc == nullptr ? group : params.num_tokens * group;
  if (most_rows <= kFewRows) return {pair.few_rows.name, {&pair.few_rows, nullptr}};
  if (group > kFewRows) return {pair.many_rows.name, {&pair.many_rows, nullptr}};
  return {pair.both, {&pair.many_rows, &pair.few_rows}};
}

std::string make_kernel_table() {
  std::string table;
  const auto add = [&](const std::string &types, int tile, const char *rows, const AttentionKernel &kernel) {
    const std::string head_dim = "D <= " + std::to_string(kHeadDimTiles[static_cast<size_t>(tile)]);
    table += "paged_attention\t" + types + ", " + head_dim + rows + "\t" + kernel.name + "\n";
  };
  const std::pair<const char *, DType> types[] = {{"float16", DType::kFloat16},
                                                  {"bfloat16", DType::kBFloat16},
                                                  {"float8_e4m3 cache", DType::kFloat8E4M3},
                                                  {"float8_e5m2 cache", DType::kFloat8E5M2}};
  for (const auto &[name, dtype] : types) {
    for (int tile = 0; tile < kNumHeadDimTiles; ++tile) {
      add(name, tile, ", at most 16 rows a KV head", mma_kernels(dtype, tile).few_rows);
      add(name, tile, ", more rows", mma_kernels(dtype, tile).many_rows);
    }
  }
  for (int tile = 0; tile < kNumHeadDimTiles; ++tile) add("float32", tile, "", attention_fma_float32(tile));
  return table;
}

// ---- grid and workspace --------------------------------------------------------------------------------------

// As many blocks as the current device holds at once.  Asked, and the shared memory granted, once a kernel and device.
int grid_of(const AttentionKernel &kernel) {
  static std::mutex mutex;
  static std::map<std::pair<const void *, int>, int> grids;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = grids.try_emplace({kernel.function, device}, 0);
  if (!is_new && entry->second > 0) return entry->second;

  const auto bytes = static_cast<int>(kernel.shared_memory);
  check_cuda(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), kernel.name);
  int blocks = 0;
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.num_threads, kernel.shared_memory),
      kernel.name);
  if (blocks == 0) {
    throw Error(PA_ERROR_UNSUPPORTED, std::string("paged_attention: kernel ") + kernel.name + " needs " +
                                          std::to_string(bytes) + " bytes of shared memory a block; this device has " +
                                          std::to_string(device_facts().max_shared_memory_per_block));
  }
  entry->second = std::min(blocks * device_facts().num_multiprocessors, kMaxGrid);
  return entry->second;
}

// The arrival counters, whose size is that of the largest grid whatever the kernel (see attention_epilogue.cuh), then
// the partial results.
constexpr size_t kAlignment = 256;
constexpr size_t kArrivalBytes = sizeof(uint32_t) * kMaxGrid;
static_assert(kArrivalBytes % kAlignment == 0);

size_t workspace_bytes(const Selection &selection, bool deterministic) {
  size_t partials = 0;
  for (const AttentionKernel *kernel : selection.kernels) {
    if (kernel == nullptr) continue;
    const auto places =
        static_cast<size_t>(grid_of(*kernel)) * static_cast<size_t>(deterministic ? kernel->deterministic_places : 2);
    partials = std::max(partials, places * kernel->place_floats * sizeof(float));
  }
  return kArrivalBytes + partials;
}

// ---- parameters ----------------------------------------------------------------------------------------------

void check_limits(const AttentionParams &params) {
  const int64_t group = params.num_q_heads / params.num_kv_heads;
  const int64_t rows = params.query_start_loc == nullptr ? group : params.num_tokens * group;
  if (rows >= kMaxRows || params.num_tokens > std::numeric_limits<int32_t>::max()) {
    throw Error(
        PA_ERROR_UNSUPPORTED,
        "paged_attention: the CUDA kernels take fewer than 2^30 query tokens times query heads a KV head; got " +
            std::to_string(params.num_tokens) + " x " + std::to_string(group));
  }
}

Batch make_batch(const AttentionParams &params) {
  const int64_t capacity = params.num_blocks == 0 ? 0 : int64_t{params.max_blocks_per_seq} * params.block_size;
  Batch batch{};
  batch.seq_lens = params.seq_lens;
  batch.query_start_loc = params.query_start_loc;
  batch.num_seqs = params.num_seqs;
  batch.num_tokens = static_cast<int32_t>(params.num_tokens);
  batch.max_length = static_cast<int32_t>(std::min(capacity, kMaxLength));
  batch.num_kv_heads = params.num_kv_heads;
  batch.group = FastDivisor::of(params.num_q_heads / params.num_kv_heads);
  batch.window = params.window < kMaxLength ? static_cast<int32_t>(params.window) : 0;
  batch.causal = params.causal;
  batch.deterministic = params.deterministic;
  return batch;
}

int64_t access_bytes(const TokensView &view, int64_t element_size, const AttentionParams &params) {
  AccessWidth width(params.head_dim * element_size);
  width.address(view.data);
  width.stride(view.token_stride * element_size, params.num_tokens);
  width.stride(view.head_stride * element_size, params.num_q_heads);
  return width.bytes();
}

int32_t kv_copy_bytes(const AttentionParams &params, int64_t element_size) {
  AccessWidth width(params.head_dim * element_size);
  for (const CacheView *cache : {&params.k_cache, &params.v_cache}) {
    width.address(cache->data);
    width.stride(cache->block_stride * element_size, params.num_blocks);
    width.stride(cache->token_stride * element_size, params.block_size);
    width.stride(cache->head_stride * element_size, params.num_kv_heads);
  }
  return static_cast<int32_t>(width.bytes() >= 8 ? width.bytes() : element_size);
}

CachePointer cache_pointer(const CacheView &view, int64_t element_size) {
  return {static_cast<const char *>(view.data), view.block_stride * element_size, view.token_stride * element_size,
          view.head_stride * element_size};
}

ScalePointer scale_pointer(const Scale &scale) { return {scale.ptr, scale.value, scale.per_head ? 1 : 0}; }

AttentionKernelParams make_params(const AttentionParams &params) {
  const int64_t q_size = dtype_size(params.q_dtype), kv_size = dtype_size(params.kv_dtype);
  AttentionKernelParams p{};
  p.batch = make_batch(params);
  p.q = {params.q.data, params.q.token_stride, params.q.head_stride};
  p.out = {params.out.data, params.out.token_stride, params.out.head_stride};
  p.k_cache = cache_pointer(params.k_cache, kv_size);
  p.v_cache = cache_pointer(params.v_cache, kv_size);
  p.block_tables = params.block_tables;
  p.block_table_stride = params.block_table_stride;
  p.block_size = FastDivisor::of(params.block_size);
  p.last_block =
      static_cast<int32_t>(std::clamp<int64_t>(params.num_blocks - 1, 0, std::numeric_limits<int32_t>::max()));
  p.head_dim = params.head_dim;
  p.lse = params.lse;
  p.lse_token_stride = params.lse_token_stride;
  p.lse_head_stride = params.lse_head_stride;
  p.alibi_slopes = params.alibi_slopes;
  p.sinks = params.sinks;
  p.k_scale = scale_pointer(params.k_scale);
  p.v_scale = scale_pointer(params.v_scale);
  p.scale = params.scale;
  p.softcap = params.softcap;
  p.kv_copy_bytes = kv_copy_bytes(params, kv_size);
  p.q_wide = access_bytes(params.q, q_size, params) >= 16;
  p.out_wide = access_bytes(params.out, q_size, params) >= 4 * q_size;
  p.q_is_bfloat16 = params.q_dtype == DType::kBFloat16;
  return p;
}

char *align_up(void *pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return reinterpret_cast<char *>((address + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace

size_t paged_attention_workspace_size(const AttentionParams &params) {
  // A caller's bytes may begin anywhere.
  return workspace_bytes(select_kernels(params), params.deterministic) + kAlignment;
}

void paged_attention(const AttentionParams &params, void *stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  check_limits(params);
  const Selection selection = select_kernels(params);
  const size_t bytes = workspace_bytes(selection, params.deterministic);
  if (params.workspace != nullptr && params.workspace_size < bytes + kAlignment) {
    throw_invalid("paged_attention: `workspace` must have at least " + std::to_string(bytes + kAlignment) +
                  " bytes; got " + std::to_string(params.workspace_size));
  }
  record_kernel("paged_attention", selection.name);
  if (params.num_tokens == 0 || params.num_seqs == 0) return;

  std::optional<StreamMemory> own_memory;
  if (params.workspace == nullptr) own_memory.emplace(bytes + kAlignment, stream);
  char *const workspace = align_up(params.workspace == nullptr ? own_memory->data() : params.workspace);
  if (own_memory) check_cuda(cudaMemsetAsync(workspace, 0, kArrivalBytes, stream), "cudaMemsetAsync");

  AttentionKernelParams kernel_params = make_params(params);
  kernel_params.arrivals = reinterpret_cast<uint32_t *>(workspace);
  kernel_params.partials = reinterpret_cast<float *>(workspace + kArrivalBytes);
  void *arguments[] = {&kernel_params};
  for (const AttentionKernel *kernel : selection.kernels) {
    if (kernel == nullptr) continue;
    check_cuda(
        cudaLaunchKernel(kernel->function, dim3(static_cast<unsigned>(grid_of(*kernel))),
                         dim3(static_cast<unsigned>(kernel->num_threads)), arguments, kernel->shared_memory, stream),
        kernel->name);
  }
}

const char *attention_kernel_table() {
  static const std::string table = make_kernel_table();
  return table.c_str();
}

}  // namespace pagedattn::cuda
