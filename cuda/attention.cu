// Paged attention on CUDA devices: gives the kernels that were chosen for a call a workspace, and launches them.
//
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <numbers>
#include <optional>
#include <string>
#include <vector>

#include "access.cuh"
#include "attention_kernel.h"
#include "attention_select.h"
#include "cuda_backend.h"
#include "hopper_params.cuh"
#include "launch.h"
#include "runtime.h"
#include "status.h"
#include "tensor_map.h"
#include "work_schedule.cuh"

namespace pagedattn::cuda {
namespace {

// Rows of a sequence and keys of a tile are counted in 31 bits with room to spare.
constexpr int64_t kMaxRows = int64_t{1} << 30;
constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max() - 1024;

// ---- grid and workspace --------------------------------------------------------------------------------------

// As many blocks as the current device holds at once.  Asked, and the shared memory granted, once a kernel, device and
// thread.
int find_grid(const AttentionKernel &kernel) {
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
  return std::min(blocks * device_facts().num_multiprocessors, kMaxGrid);
}

int grid_of(const AttentionKernel &kernel) {
  struct Known {
    const void *function;
    int device;
    int grid;
  };
  thread_local std::vector<Known> all_known;
  const int device = current_device();
  for (const Known &known : all_known) {
    if (known.function == kernel.function && known.device == device) return known.grid;
  }
  all_known.push_back({kernel.function, device, find_grid(kernel)});
  return all_known.back().grid;
}

// The arrival counters, whose size is that of the largest grid whatever the kernel (see attention_epilogue.cuh), and
// the parts that announce themselves (announced_parts.cuh), which are zero between launches too and whose size is that
// of the device; then the partial results.
constexpr size_t kAlignment = 256;
constexpr size_t kArrivalBytes = sizeof(uint32_t) * kMaxGrid;
constexpr size_t kAnnouncedBlockBytes = sizeof(float) * kFewSequencesRows * place_row_floats(128);
static_assert(kArrivalBytes % kAlignment == 0);

size_t announced_bytes() {
  if (device_facts().compute_capability != 90) return 0;
  const size_t bytes = kAnnouncedBlockBytes * static_cast<size_t>(device_facts().num_multiprocessors);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

dim3 grid_for(const AttentionKernel &kernel, const AttentionParams &params) {
  const int blocks = grid_of(kernel);
  if (kernel.shared_memory_of_rows == nullptr) return dim3(static_cast<unsigned>(blocks));
  return dim3(static_cast<unsigned>(blocks / params.num_kv_heads), static_cast<unsigned>(params.num_kv_heads));
}

size_t shared_memory_for(const AttentionKernel &kernel, const AttentionParams &params) {
  if (kernel.shared_memory_of_rows == nullptr) return kernel.shared_memory;
  return kernel.shared_memory_of_rows(static_cast<int>(most_rows(params)));
}

// Log 2 of the KV heads that an item may have, see work_schedule.cuh.
int max_head_shift(const AttentionKernel &kernel, const AttentionParams &params) {
  if (params.deterministic) return 0;
  return std::min(kernel.max_head_shift, std::countr_zero(static_cast<uint32_t>(params.num_kv_heads)));
}

// Of a partial result.
int place_floats(const AttentionKernel &kernel, const AttentionParams &params) {
  const int64_t rows = std::min<int64_t>(kernel.rows, most_rows(params) << max_head_shift(kernel, params));
  return static_cast<int>(rows) * place_row_floats(kernel.head_dim);
}

size_t workspace_bytes(const AttentionSelection &selection, const AttentionParams &params) {
  size_t partials = 0;
  for (int i = 0; i < selection.num_launches; ++i) {
    const AttentionKernel &kernel = *selection.launches[i].kernel;
    const auto places =
        static_cast<size_t>(grid_of(kernel)) * static_cast<size_t>(kernel.places_per_block(params.deterministic));
    partials = std::max(partials, places * static_cast<size_t>(place_floats(kernel, params)) * sizeof(float));
  }
  return kArrivalBytes + announced_bytes() + partials;
}

// ---- parameters ----------------------------------------------------------------------------------------------

void check_limits(const AttentionParams &params) {
  if (most_rows(params) >= kMaxRows || params.num_tokens > std::numeric_limits<int32_t>::max()) {
    throw Error(
        PA_ERROR_UNSUPPORTED,
        "paged_attention: the CUDA kernels take fewer than 2^30 query tokens times query heads a KV head; got " +
            std::to_string(params.num_tokens) + " x " + std::to_string(params.num_q_heads / params.num_kv_heads));
  }
}

// Of an item of a kernel whose tiles hold whole query tokens.
int tile_queries(const AttentionKernel &kernel, const AttentionParams &params) {
  return kernel.whole_queries ? kernel.rows / (params.num_q_heads / params.num_kv_heads) : 0;
}

// KV tiles to cost units, see work_schedule.cuh.
int unit_shift(const AttentionKernel &kernel, const AttentionParams &params, int64_t max_length) {
  const int group = params.num_q_heads / params.num_kv_heads;
  const int tile_rows = kernel.whole_queries ? tile_queries(kernel, params) * group : kernel.rows;
  // Without query starts, sequences have a query token each.  With them, each may have a tile that is not full.
  const int64_t full_tiles = (params.num_tokens * group + tile_rows - 1) / tile_rows;
  const int64_t items =
      (params.query_start_loc == nullptr ? params.num_seqs * int64_t{(group + tile_rows - 1) / tile_rows}
                                         : params.num_seqs + full_tiles) *
      params.num_kv_heads;
  const int64_t tiles = max_length / kernel.tokens + 2;
  for (int shift = 0; shift < 24; ++shift) {
    if (items * ((tiles >> shift) + 1 + kMostItemOverhead) < kMaxUnits) return shift;
  }
  throw Error(PA_ERROR_UNSUPPORTED, "paged_attention: the CUDA kernels take fewer than " +
                                        std::to_string(kMaxUnits / (2 + kMostItemOverhead)) +
                                        " tiles of query rows; got " + std::to_string(items));
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
  const int64_t q_size = dtype_size(params.q_dtype), kv_size = dtype_size(params.kv_dtype),
                out_size = dtype_size(params.out_dtype);
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
  p.q_scale = scale_pointer(params.q_scale);
  p.k_scale = scale_pointer(params.k_scale);
  p.v_scale = scale_pointer(params.v_scale);
  p.scale = params.scale;
  p.softcap = params.softcap;
  p.kv_copy_bytes = kv_copy_bytes(params, kv_size);
  p.q_wide = access_bytes(params.q, q_size, params) >= std::min<int64_t>(16, 8 * q_size);
  p.out_bytes = static_cast<int32_t>(access_bytes(params.out, out_size, params));
  p.q_is_bfloat16 = params.q_dtype == DType::kBFloat16;
  p.q_is_float8 = is_float8(params.q_dtype);
  p.out_is_bfloat16 = params.out_dtype == DType::kBFloat16;
  return p;
}

// That ask for more than eight tokens at once where the cache allows it.
bool takes_whole_boxes(const AttentionKernel &kernel) {
  return kernel.whole_queries || kernel.shared_memory_of_rows != nullptr;
}

TensorMaps encode_maps(const HopperKernel &hopper, const AttentionParams &params) {
  const CacheBox box = cache_box(params, hopper.rows, hopper.kernel.tokens, takes_whole_boxes(hopper.kernel));
  TensorMaps maps{};
  maps.box_tokens = box.tokens;
  maps.box_columns = box.columns;
  maps.box_bytes = box.tokens * box.columns * hopper.rows.row_bytes;
  maps.heads_to_block = static_cast<int32_t>(box.heads_to_block);
  encode_caches(params, box, &maps.k, &maps.v);
  if (hopper.kernel.whole_queries) maps.q = encode_queries(params, hopper.rows, tile_queries(hopper.kernel, params));
  return maps;
}

HopperParams make_hopper_params(const AttentionParams &params) {
  HopperParams p{};
  static_cast<AttentionKernelParams &>(p) = make_params(params);
  const bool plain = params.softcap == 0.0f && params.alibi_slopes == nullptr && params.scale > 0.0f;
  p.plain_scale = plain ? params.scale * std::numbers::log2e_v<float> : 0.0f;
  return p;
}

char *align_up(void *pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return reinterpret_cast<char *>((address + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace

size_t paged_attention_workspace_size(const AttentionParams &params) {
  // A caller's bytes may begin anywhere, and other arrays of these shapes may lie better or worse.
  return std::max(workspace_bytes(select_attention(params, ArrayAlignment::kAssumedGood), params),
                  workspace_bytes(select_attention(params, ArrayAlignment::kAssumedBad), params)) +
         kAlignment;
}

void paged_attention(const AttentionParams &params, void *stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  check_limits(params);
  const AttentionSelection selection = select_attention(params);
  const size_t bytes = paged_attention_workspace_size(params);  // whatever these arrays' alignment
  if (params.workspace != nullptr && params.workspace_size < bytes) {
    throw_invalid("paged_attention: `workspace` must have at least " + std::to_string(bytes) + " bytes; got " +
                  std::to_string(params.workspace_size));
  }
  record_kernel("paged_attention", selection.name);
  if (params.num_tokens == 0 || params.num_seqs == 0) return;

  HopperParams kernel_params = make_hopper_params(params);
  int shifts[2] = {};
  TensorMaps maps[2];
  for (int i = 0; i < selection.num_launches; ++i) {  // before anything is enqueued
    shifts[i] = unit_shift(*selection.launches[i].kernel, params, kernel_params.batch.max_length);
    if (selection.launches[i].hopper != nullptr) maps[i] = encode_maps(*selection.launches[i].hopper, params);
  }
  std::optional<StreamMemory> own_memory;
  if (params.workspace == nullptr) own_memory.emplace(bytes, stream);
  char *const workspace = align_up(params.workspace == nullptr ? own_memory->data() : params.workspace);
  if (own_memory)
    check_cuda(cudaMemsetAsync(workspace, 0, kArrivalBytes + announced_bytes(), stream), "cudaMemsetAsync");

  kernel_params.arrivals = reinterpret_cast<uint32_t *>(workspace);
  kernel_params.announced = reinterpret_cast<float *>(workspace + kArrivalBytes);
  kernel_params.partials = reinterpret_cast<float *>(workspace + kArrivalBytes + announced_bytes());
  void *arguments[] = {&kernel_params};  // every kernel's parameters are these, or the first of them
  for (int i = 0; i < selection.num_launches; ++i) {
    const auto &[kernel, hopper, min_rows, max_rows] = selection.launches[i];
    kernel_params.batch.min_rows = min_rows;
    // Places of partial results have room for no more than the call says.
    kernel_params.batch.max_rows = static_cast<int32_t>(std::min<int64_t>(max_rows, most_rows(params)));
    kernel_params.batch.unit_shift = shifts[i];
    kernel_params.batch.tile_queries = tile_queries(*kernel, params);
    kernel_params.batch.max_head_shift = max_head_shift(*kernel, params);
    kernel_params.place_floats = place_floats(*kernel, params);
    kernel_params.maps = maps[i];
    const EarlyStart early_start = hopper != nullptr ? EarlyStart::kAlways : EarlyStart::kNever;
    launch_kernel({kernel->name, grid_for(*kernel, params), dim3(static_cast<unsigned>(kernel->num_threads)),
                   shared_memory_for(*kernel, params), stream, early_start},
                  kernel->function, arguments);
  }
}

}  // namespace pagedattn::cuda
