// A block of a cache as runs of contiguous bytes.
//
// SPDX-License-Identifier: Apache-2.0
//
// Whatever the order of a block's dimensions, what copying it costs is decided by how long the runs are that lie
// contiguously in both source and destination, and by how many dimensions remain around them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>

#include "params.h"

namespace pagedattn::cuda {

struct RunDim {
  int64_t extent = 1;
  int64_t src_stride = 0;  // bytes
  int64_t dst_stride = 0;  // bytes
};

struct BlockRuns {
  int64_t run_bytes = 0;  // 0: the block is empty
  int num_dims = 0;
  std::array<RunDim, 4> dims;  // around a run, the innermost first

  int64_t num_runs() const {
    int64_t runs = 1;
    for (const RunDim &dim : dims) runs *= dim.extent;
    return runs;
  }
};

inline BlockRuns runs_of(const BlockLayout &block) {
  BlockRuns runs;
  if (block.contiguous_bytes > 0) {
    runs.run_bytes = block.contiguous_bytes;
    return runs;
  }
  std::array<RunDim, 4> dims;
  int num_dims = 0;
  for (int d = 0; d < block.ndim; ++d) {
    if (block.shape[d] == 0) return runs;
    if (block.shape[d] == 1) continue;
    dims[num_dims++] = {block.shape[d], block.src_strides[d] * block.element_size,
                        block.dst_strides[d] * block.element_size};
  }
  // Elements may be visited in any order: the source's order in memory joins the most.
  std::stable_sort(dims.begin(), dims.begin() + num_dims,
                   [](const RunDim &a, const RunDim &b) { return std::abs(a.src_stride) < std::abs(b.src_stride); });
  runs.run_bytes = block.element_size;
  for (int d = 0; d < num_dims; ++d) {
    const RunDim &dim = dims[d];
    if (runs.num_dims == 0 && dim.src_stride == runs.run_bytes && dim.dst_stride == runs.run_bytes) {
      runs.run_bytes *= dim.extent;
      continue;
    }
    if (runs.num_dims > 0) {
      RunDim &inner = runs.dims[runs.num_dims - 1];
      if (dim.src_stride == inner.src_stride * inner.extent && dim.dst_stride == inner.dst_stride * inner.extent) {
        inner.extent *= dim.extent;
        continue;
      }
    }
    runs.dims[runs.num_dims++] = dim;
  }
  return runs;
}

}  // namespace pagedattn::cuda
