// A block of a cache as a sequence of accesses, each at an offset of its own in source and destination.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "access.cuh"
#include "block_runs.h"
#include "index_divisor.cuh"
#include "params.h"

namespace pagedattn::cuda {

struct BlockAccesses {
  struct Dim {
    IndexDivisor extent;
    int64_t src_stride;  // bytes
    int64_t dst_stride;  // bytes
  };

  int64_t src_block_stride;  // bytes
  int64_t dst_block_stride;  // bytes
  int64_t accesses_per_block;
  int num_dims;                   // 0: a block is one run
  IndexDivisor accesses_per_run;  // strided blocks only, like what follows
  Dim dims[4];

  // Where access i of a block begins, from the block on.
  template <bool kStrided>
  __device__ void locate(int64_t i, int64_t access_bytes, int64_t *src_offset, int64_t *dst_offset) const {
    if constexpr (!kStrided) {
      *src_offset = *dst_offset = i * access_bytes;
    } else {
      int64_t within = i, run = accesses_per_run.split(&within);
      *src_offset = *dst_offset = within * access_bytes;
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        if (d >= num_dims) break;
        int64_t index = run;
        run = dims[d].extent.split(&index);
        *src_offset += index * dims[d].src_stride;
        *dst_offset += index * dims[d].dst_stride;
      }
    }
  }
};

// The widest access that serves all caches of a call.
inline int64_t widest_access(const CopyBlocksParams &p, const BlockRuns &runs) {
  AccessWidth width(runs.run_bytes);
  for (int64_t i = 0; i < p.num_caches; ++i) {
    width.address(p.src[i]);
    width.address(p.dst[i]);
  }
  width.stride(p.src_block_stride * p.block.element_size, p.num_src_blocks);
  width.stride(p.dst_block_stride * p.block.element_size, p.num_dst_blocks);
  for (const RunDim &dim : runs.dims) {
    width.stride(dim.src_stride, dim.extent);
    width.stride(dim.dst_stride, dim.extent);
  }
  return width.bytes();
}

inline BlockAccesses block_accesses(const CopyBlocksParams &p, const BlockRuns &runs, int64_t access_bytes) {
  BlockAccesses block = {};
  const int64_t accesses_per_run = runs.run_bytes / access_bytes;
  block.src_block_stride = p.src_block_stride * p.block.element_size;
  block.dst_block_stride = p.dst_block_stride * p.block.element_size;
  block.accesses_per_block = accesses_per_run * runs.num_runs();
  block.num_dims = runs.num_dims;
  block.accesses_per_run = IndexDivisor::of(accesses_per_run);
  for (size_t d = 0; d < runs.dims.size(); ++d) {
    const RunDim &dim = runs.dims[d];
    block.dims[d] = {IndexDivisor::of(dim.extent), dim.src_stride, dim.dst_stride};
  }
  return block;
}

}  // namespace pagedattn::cuda
