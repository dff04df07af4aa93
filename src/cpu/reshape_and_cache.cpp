// reshape_and_cache on the CPU: each new token's keys and values go to the slot that the mapping names.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "status.h"

namespace pagedattn::cpu {
namespace {

// Keys or values of one layer, and where they go.
struct Side {
  const void *source;
  void *target;
  const TokensView &tokens;
  const CacheView &cache;
  Scale scale;
};

void write_token(const ReshapeAndCacheParams &p, const Kernels &k, const Side &side, int64_t token, int64_t block,
                 int64_t slot, bool streamed) {
  const int64_t src_size = dtype_size(p.src_dtype);
  const int64_t dst_size = dtype_size(p.kv_dtype);
  const char *src = static_cast<const char *>(side.source) + token * side.tokens.token_stride * src_size;
  char *dst =
      static_cast<char *>(side.target) + (block * side.cache.block_stride + slot * side.cache.token_stride) * dst_size;
  const bool quantize = is_float8(p.kv_dtype);
  // Heads that follow each other on both sides, and share a scale, are one run.
  const bool one_run = side.tokens.head_stride == p.head_dim && side.cache.head_stride == p.head_dim &&
                       !(quantize && side.scale.per_head);
  const int64_t runs = one_run ? 1 : p.num_kv_heads;
  const int64_t length = one_run ? static_cast<int64_t>(p.num_kv_heads) * p.head_dim : p.head_dim;
  for (int64_t run = 0; run < runs; ++run) {
    const char *from = src + run * side.tokens.head_stride * src_size;
    char *to = dst + run * side.cache.head_stride * dst_size;
    if (quantize) {
      k.quantize_row(p.kv_dtype, to, p.src_dtype, from, side.scale.of_head(run), length);
    } else if (streamed) {
      k.stream_run(to, from, from + length * src_size, length * dst_size);
    } else {
      std::memcpy(to, from, static_cast<size_t>(length * dst_size));
    }
  }
}

Scale scale_of_layer(Scale scale, int64_t offset) {
  if (scale.ptr != nullptr) scale.ptr += offset;
  return scale;
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams &p) {
  const Kernels &k = kernels();
  const int64_t token_bytes = 2 * p.num_kv_heads * p.head_dim * (dtype_size(p.src_dtype) + dtype_size(p.kv_dtype));
  const int64_t tokens_a_task = std::max<int64_t>(1, kMinParallelWork / std::max<int64_t>(1, token_bytes));
  const int64_t row_bytes = p.num_kv_heads * p.head_dim * dtype_size(p.kv_dtype);
  const bool streamed =
      !is_float8(p.kv_dtype) && worth_streaming(2 * p.num_layers * p.num_tokens * row_bytes, row_bytes);
  const int64_t tasks_a_layer = (p.num_tokens + tokens_a_task - 1) / tokens_a_task;

  parallel_for(p.num_layers * tasks_a_layer, [&](int64_t task, int) {
    const int64_t at_layer = task / tasks_a_layer;
    const LayerPointers &layer = p.layers[at_layer];
    const Side key = {layer.key, layer.k_cache, p.key, p.k_cache,
                      scale_of_layer(p.k_scale, at_layer * p.k_scale_layer_stride)};
    const Side value = {layer.value, layer.v_cache, p.value, p.v_cache,
                        scale_of_layer(p.v_scale, at_layer * p.v_scale_layer_stride)};
    const int64_t begin = task % tasks_a_layer * tokens_a_task;
    const int64_t end = std::min(p.num_tokens, begin + tokens_a_task);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t at = p.slot_mapping[token];
      if (at < 0) continue;  // padding
      const int64_t block = at / p.block_size;
      const int64_t slot = at % p.block_size;
      write_token(p, k, key, token, block, slot, streamed);
      write_token(p, k, value, token, block, slot, streamed);
    }
    if (streamed) k.finish_streaming();
  });
  record_kernel("reshape_and_cache", k.reshape_and_cache_name);
}

}  // namespace pagedattn::cpu
