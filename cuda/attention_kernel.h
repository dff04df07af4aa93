// The interface between the attention kernels and the places that choose and launch them.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

namespace pagedattn::cuda {

constexpr int kMaxGrid = 4096;
// Query rows a KV head up to which a sequence goes to the kernel for few rows, and to the Hopper decode kernel.
constexpr int kFewRows = 16;
constexpr int kHopperRows = 64;
// Sequences, and query rows a KV head, up to which the Hopper kernel for few sequences serves a call.
constexpr int kFewSequences = 32;
constexpr int kFewSequencesRows = 8;

// A persistent kernel over AttentionKernelParams (HopperParams), launched with any grid of up to kMaxGrid blocks; those
// for prefill, which have a counter for each warpgroup and two for all, with less than a third of that.
struct AttentionKernel {
  const char *name;
  const void *function;
  int num_threads;
  size_t shared_memory;                         // bytes
  int rows;                                     // query rows of a tile,
  int tokens;                                   // its keys,
  int head_dim;                                 // and its columns
  int (*places_per_block)(bool deterministic);  // partial results in the workspace
  int max_head_shift = 0;                       // an item has up to 2^this KV heads, if no more than `rows` rows
  bool whole_queries = false;                   // tiles begin and end with query tokens, and may have fewer rows
  // Of a kernel whose grid has a block for every KV head in each column: its shared memory, if no sequence has more
  // than so many rows a KV head.
  size_t (*shared_memory_of_rows)(int rows) = nullptr;
};

// For rows of at most 16 a KV head, and for more.
struct AttentionKernelPair {
  AttentionKernel few_rows;
  AttentionKernel many_rows;
};

// By head dimension: tiles of 64, 128 and 256.  Each in its own source file.
constexpr int kNumHeadDimTiles = 3;
const AttentionKernelPair &attention_mma_float16(int head_dim_tile);
const AttentionKernelPair &attention_mma_bfloat16(int head_dim_tile);
const AttentionKernelPair &attention_mma_float8_e4m3(int head_dim_tile);
const AttentionKernelPair &attention_mma_float8_e5m2(int head_dim_tile);
const AttentionKernel &attention_fma_float32(int head_dim_tile);

// How rows of the cache lie in a Hopper kernel's shared memory (see BoxTile and ColumnTile).
struct CacheRowLayout {
  int columns;
  int row_bytes;  // in a column: 128, 64 or 32 if rows are cut
  bool is_cut;    // into columns, whose chunks are permuted
  int heads;      // side by side
};

struct HopperKernel {
  AttentionKernel kernel;
  CacheRowLayout rows;
};

// By rising head dimension, those for several heads last.  Built for sm_90a alone.  Decode is for at most 64 rows a KV
// head, or 16 where rows of the cache have several heads, and for few sequences; tall decode is for 17 to 64, of some
// head dimensions; prefill is for more.
using HopperKernels = std::span<const HopperKernel>;
HopperKernels hopper_decode_float16();
HopperKernels hopper_decode_bfloat16();
HopperKernels hopper_decode_float8_e4m3();
HopperKernels hopper_decode_float8_e5m2();
HopperKernels hopper_tall_decode_float16();
HopperKernels hopper_tall_decode_bfloat16();
HopperKernels hopper_few_sequences_float16();
HopperKernels hopper_few_sequences_bfloat16();
HopperKernels hopper_prefill_float16();
HopperKernels hopper_prefill_bfloat16();
HopperKernels hopper_prefill_float8_e4m3();
HopperKernels hopper_prefill_float8_e5m2();
// For float8 queries, which they multiply in float8.
HopperKernels hopper_prefill_products_float8_e4m3();
HopperKernels hopper_prefill_products_float8_e5m2();

}  // namespace pagedattn::cuda
