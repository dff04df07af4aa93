// The interface between the attention kernels and the one place that picks among them (attention.cu).
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace pagedattn::cuda {

constexpr int kMaxGrid = 4096;
// Query rows a KV head up to which a sequence goes to the kernel for few rows.
constexpr int kFewRows = 16;

// A persistent kernel over AttentionKernelParams, launched with any grid of up to kMaxGrid blocks.
struct AttentionKernel {
  const char *name;
  const void *function;
  int num_threads;
  size_t shared_memory;      // bytes
  size_t place_floats;       // of one partial result in the workspace
  int deterministic_places;  // partial results a block in deterministic mode; otherwise 2
};

// For rows of at most 16 a KV head, and for more.
struct AttentionKernelPair {
  AttentionKernel few_rows;
  AttentionKernel many_rows;
  const char *both;  // name of the launch of both
};

// By head dimension: tiles of 64, 128 and 256.  Each in its own source file.
constexpr int kNumHeadDimTiles = 3;
const AttentionKernelPair &attention_mma_float16(int head_dim_tile);
const AttentionKernelPair &attention_mma_bfloat16(int head_dim_tile);
const AttentionKernelPair &attention_mma_float8_e4m3(int head_dim_tile);
const AttentionKernelPair &attention_mma_float8_e5m2(int head_dim_tile);
const AttentionKernel &attention_fma_float32(int head_dim_tile);

}  // namespace pagedattn::cuda
