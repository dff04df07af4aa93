// The validated form of every operation: raw pointers, element strides and plain numbers.
//
// SPDX-License-Identifier: Apache-2.0
//
// Validation (validate_*.cpp) turns the C ABI's argument structs into these; the CPU and the CUDA backend take nothing
// else.  A backend may therefore assume everything that the C header promises: shapes agree, strides fit in 64 bits,
// last dimensions are contiguous, outputs do not overlap inputs.  The CPU backend may also assume that every index
// value (block table, slot, length, query start) is in range; the CUDA backend may not, unless checked mode verified
// them, and must never write outside a tensor whatever they hold.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pagedattn {

enum class DType : int32_t { kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3, kFloat8E4M3 = 4, kFloat8E5M2 = 5 };

constexpr int64_t dtype_size(DType t) {
  return t == DType::kFloat32 ? 4 : (t == DType::kFloat16 || t == DType::kBFloat16) ? 2 : 1;
}
constexpr bool is_float8(DType t) { return t == DType::kFloat8E4M3 || t == DType::kFloat8E5M2; }

// A scale that is one number known on the host (ptr == nullptr), one number in the tensors' memory (per_head false), or
// one number a KV head (per_head true).
struct Scale {
  const float *ptr = nullptr;
  float value = 1.0f;
  bool per_head = false;

  float of_head(int64_t head) const { return ptr == nullptr ? value : ptr[per_head ? head : 0]; }
};

// One of the two caches: [num_blocks, block_size, num_kv_heads, head_dim], the last dimension contiguous.
struct CacheView {
  void *data = nullptr;
  int64_t block_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// [tokens, heads, head_dim], the last dimension contiguous.
struct TokensView {
  void *data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

struct AttentionParams {
  TokensView q;          // [T, Hq, D] of q_dtype
  CacheView k_cache;     // of kv_dtype
  CacheView v_cache;     // of kv_dtype
  TokensView out;        // [T, Hq, D] of out_dtype
  float *lse = nullptr;  // [T, Hq] or null
  int64_t lse_token_stride = 0;
  int64_t lse_head_stride = 0;
  const int32_t *block_tables = nullptr;  // [B, max_blocks_per_seq], rows block_table_stride apart
  int64_t block_table_stride = 0;
  const int32_t *seq_lens = nullptr;         // [B]
  const int32_t *query_start_loc = nullptr;  // [B + 1], or null: one query token a sequence
  const float *alibi_slopes = nullptr;       // [Hq] or null
  const float *sinks = nullptr;              // [Hq] or null
  Scale q_scale;                             // of a KV head's queries
  Scale k_scale;
  Scale v_scale;
  void *workspace = nullptr;  // CUDA only; zero at first use.  Null: allocate on the stream
  size_t workspace_size = 0;

  int64_t num_tokens = 0;     // T
  int32_t num_seqs = 0;       // B
  int64_t max_query_len = 0;  // at most T
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // a multiple of 8, at most 256
  int64_t num_blocks = 0;
  int32_t block_size = 0;
  int32_t max_blocks_per_seq = 0;
  DType q_dtype = DType::kFloat32;
  DType kv_dtype = DType::kFloat32;   // q_dtype, or float8 with 16-bit queries
  DType out_dtype = DType::kFloat32;  // q_dtype, or 16-bit with float8 queries

  float scale = 1.0f;    // already the default where none was given
  float softcap = 0.0f;  // 0: off
  int64_t window = 0;    // 0: off
  bool causal = true;
  bool deterministic = false;
};

struct MergeStatesParams {
  int64_t num_parts = 0;
  const TokensView *outs = nullptr;  // host array of num_parts views
  struct Lse {
    const float *data = nullptr;
    int64_t token_stride = 0;
    int64_t head_stride = 0;
  };
  const Lse *lses = nullptr;  // host array of num_parts views
  TokensView out;
  float *out_lse = nullptr;  // or null
  int64_t out_lse_token_stride = 0;
  int64_t out_lse_head_stride = 0;
  int64_t num_tokens = 0;
  int32_t num_heads = 0;
  int32_t head_dim = 0;  // any size >= 1
  DType dtype = DType::kFloat32;
};

// What differs from layer to layer where one call serves many.
struct LayerPointers {
  void *key = nullptr;
  void *value = nullptr;
  void *k_cache = nullptr;
  void *v_cache = nullptr;
};

struct ReshapeAndCacheParams {
  TokensView key;    // [>= T, Hkv, D] of src_dtype; its pointer, like the next three, is layer 0's
  TokensView value;  // likewise
  CacheView k_cache;
  CacheView v_cache;
  int64_t num_layers = 1;
  const LayerPointers *layers = nullptr;  // host array of num_layers
  const int64_t *slot_mapping = nullptr;  // [T]
  Scale k_scale;
  Scale v_scale;
  int64_t k_scale_layer_stride = 0;  // of k_scale.ptr
  int64_t v_scale_layer_stride = 0;
  int64_t num_tokens = 0;  // T
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // any size >= 1
  int64_t num_blocks = 0;
  int32_t block_size = 0;
  DType src_dtype = DType::kFloat32;
  DType kv_dtype = DType::kFloat32;
};

// reshape_and_cache of one layer, whose keys are rotated on the way.  query and query_out may be the same.
struct RopeAndCacheParams {
  ReshapeAndCacheParams write;
  TokensView query;      // [>= T, Hq, D] of src_dtype, where num_q_heads > 0
  TokensView query_out;  // likewise
  int32_t num_q_heads = 0;
  const void *positions = nullptr;  // [T] of int64 or int32
  bool long_positions = false;
  const void *cos_sin = nullptr;  // [max_position, rotary_dim]: cosines, then sines
  int64_t cos_sin_stride = 0;     // elements
  DType cos_sin_dtype = DType::kFloat32;
  int64_t max_position = 0;
  int32_t rotary_dim = 0;  // even, at most head_dim, which is even too
  bool interleaved = false;

  int64_t position(int64_t token) const {
    return long_positions ? static_cast<const int64_t *>(positions)[token]
                          : int64_t{static_cast<const int32_t *>(positions)[token]};
  }
};

// The inner layout of one block: up to four dimensions behind the block dimension, in elements of element_size bytes.
// `contiguous_bytes` > 0 means that a block is one run of that many bytes in both source and destination.
struct BlockLayout {
  int32_t ndim = 0;
  int64_t shape[4] = {1, 1, 1, 1};
  int64_t src_strides[4] = {0, 0, 0, 0};  // elements
  int64_t dst_strides[4] = {0, 0, 0, 0};  // elements
  int64_t element_size = 1;
  int64_t contiguous_bytes = 0;
};

// copy_blocks (src == dst arrays, one device) and swap_blocks (any pair of memories) alike.  On CUDA, swap_blocks alone
// looks at what follows the mapping.
struct CopyBlocksParams {
  int64_t num_caches = 0;
  void *const *src = nullptr;    // host array of num_caches base pointers
  void *const *dst = nullptr;    // host array of num_caches base pointers
  int64_t src_block_stride = 0;  // elements
  int64_t dst_block_stride = 0;  // elements
  int64_t num_src_blocks = 0;
  int64_t num_dst_blocks = 0;
  BlockLayout block;
  const int64_t *mapping = nullptr;  // [num_pairs, 2] contiguous; device memory for copy_blocks on CUDA, else host
  int64_t num_pairs = 0;
  bool src_on_host = false;
  bool dst_on_host = false;
  void *event = nullptr;  // a cudaEvent_t to be recorded behind the copies, or null
};

struct GatherKvParams {
  CacheView k_cache;
  CacheView v_cache;
  TokensView k_out;  // [num_rows, Hkv, D] of out_dtype
  TokensView v_out;
  int64_t num_rows = 0;
  const int32_t *block_tables = nullptr;
  int64_t block_table_stride = 0;
  const int32_t *seq_lens = nullptr;
  const int32_t *seq_starts = nullptr;     // [B] or null
  const int32_t *out_start_loc = nullptr;  // [B + 1] or null: sequences follow each other
  Scale k_scale;
  Scale v_scale;
  int32_t num_seqs = 0;
  int32_t max_blocks_per_seq = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int64_t num_blocks = 0;
  int32_t block_size = 0;
  DType kv_dtype = DType::kFloat32;
  DType out_dtype = DType::kFloat32;  // kv_dtype, or a wider one where kv_dtype is float8
};

}  // namespace pagedattn
