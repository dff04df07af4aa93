// What every attention kernel is given: pointers, strides and options in the form that device code wants.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "fast_divisor.cuh"

namespace pagedattn::cuda {

// The lengths of a batch and what decides which keys a query token sees: all that work is divided by.
struct Batch {
  const int32_t *seq_lens;         // [B]
  const int32_t *query_start_loc;  // [B + 1] or null: one query token a sequence
  int32_t num_seqs;                // B
  int32_t num_tokens;              // T
  int32_t max_length;              // what a block table can hold; longer lengths are cut to it
  int32_t num_kv_heads;
  int32_t max_head_shift;  // items may have up to 2^this KV heads, which divide all KV heads; some kernels' always do
  FastDivisor group;       // query heads a KV head
  int32_t tile_queries;    // of an item, for kernels whose tiles hold whole query tokens
  int32_t min_rows;        // a KV head of the sequences that a kernel serves: it passes over those with fewer or more
  int32_t max_rows;
  int32_t window;      // 0: off
  int32_t unit_shift;  // KV tiles to cost units: 0, or what keeps the sum of all costs under 2^31
  bool causal;
  bool deterministic;
};

// [N, S, Hkv, D], strides in bytes.
struct CachePointer {
  const char *data;
  int64_t block_stride;
  int64_t token_stride;
  int64_t head_stride;
};

// [T, Hq, D], strides in elements.
struct TokensPointer {
  void *data;
  int64_t token_stride;
  int64_t head_stride;
};

struct ScalePointer {
  const float *data;  // null: `value` is the scale
  float value;
  int32_t head_stride;  // 0: one number for all heads

  __device__ float of_head(int kv_head) const {
    return data == nullptr ? value : data[static_cast<int64_t>(kv_head) * head_stride];
  }
};

// Of a row of a partial result: O, m, l and what makes it whole 16 bytes.
__host__ __device__ constexpr int place_row_floats(int head_dim) { return head_dim + 4; }

struct AttentionKernelParams {
  Batch batch;
  TokensPointer q;
  TokensPointer out;
  CachePointer k_cache;
  CachePointer v_cache;
  const int32_t *block_tables;  // [B, max_blocks]
  int64_t block_table_stride;
  FastDivisor block_size;
  int32_t last_block;  // N - 1: table entries are clamped to 0 ... N - 1
  int32_t head_dim;
  float *lse;  // [T, Hq] or null
  int64_t lse_token_stride;
  int64_t lse_head_stride;
  const float *alibi_slopes;  // [Hq] or null
  const float *sinks;         // [Hq] or null
  ScalePointer q_scale;       // read by the float8 kernels alone
  ScalePointer k_scale;
  ScalePointer v_scale;
  float scale;
  float softcap;          // 0: off
  int32_t kv_copy_bytes;  // the widest copy that base, strides and D of both caches allow: 16, 8, or one element
  bool q_wide;            // rows of q can be read eight elements at a time
  int32_t out_bytes;      // the widest access that rows of out allow, up to 16
  // Read by the float8 kernels alone, which compute in float16 whatever the type of q.
  bool q_is_bfloat16;
  bool q_is_float8;  // of the cache's type
  bool out_is_bfloat16;
  float *partials;       // unfinished results, see attention_epilogue.cuh
  int32_t place_floats;  // that the place of one of them has
  uint32_t *arrivals;    // [kMaxGrid] zero between launches
};

}  // namespace pagedattn::cuda
