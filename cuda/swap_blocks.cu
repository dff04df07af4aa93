// swap_blocks: blocks copied between host and device, or between devices, by the copy engines.
//
// SPDX-License-Identifier: Apache-2.0
//
// The pairs are known on the host, so the work is to ask for few, large copies.  Pairs that step by one block in source
// and destination alike make one copy: plain where their blocks touch, two-dimensional where a gap follows each block.
// A block that is not one run of bytes takes a two-dimensional copy over its innermost dimension for each index of the
// others.
//
// Bound by the link.  CUDA finds out from the addresses what kind of memory it has been given.
#include <cuda_runtime_api.h>

#include "block_runs.h"
#include "cuda_backend.h"
#include "runtime.h"
#include "status.h"

namespace pagedattn::cuda {
namespace {

constexpr int64_t kMaxPitch = 0x7fffffff;  // cudaDevAttrMaxPitch of every device so far

struct Copy {
  char *dst;
  const char *src;
  int64_t bytes;
};

void enqueue(const Copy &copy, cudaStream_t stream) {
  check_cuda(cudaMemcpyAsync(copy.dst, copy.src, static_cast<size_t>(copy.bytes), cudaMemcpyDefault, stream),
             "cudaMemcpyAsync");
}

// `dim.extent` copies, the strides of `dim` apart.
void enqueue(Copy copy, const RunDim &dim, cudaStream_t stream) {
  if (dim.extent == 1) return enqueue(copy, stream);
  if (dim.src_stride == copy.bytes && dim.dst_stride == copy.bytes) {
    copy.bytes *= dim.extent;
    return enqueue(copy, stream);
  }
  const auto fits_pitch = [&copy](int64_t stride) { return stride >= copy.bytes && stride <= kMaxPitch; };
  if (fits_pitch(dim.src_stride) && fits_pitch(dim.dst_stride)) {
    return check_cuda(
        cudaMemcpy2DAsync(copy.dst, static_cast<size_t>(dim.dst_stride), copy.src, static_cast<size_t>(dim.src_stride),
                          static_cast<size_t>(copy.bytes), static_cast<size_t>(dim.extent), cudaMemcpyDefault, stream),
        "cudaMemcpy2DAsync");
  }
  for (int64_t i = 0; i < dim.extent; ++i) {
    enqueue({copy.dst + i * dim.dst_stride, copy.src + i * dim.src_stride, copy.bytes}, stream);
  }
}

// One block, run by run.
void enqueue_strided_block(char *dst, const char *src, const BlockRuns &runs, cudaStream_t stream) {
  const RunDim &inner = runs.dims[0];
  for (int64_t i = 0; i < runs.dims[3].extent; ++i) {
    for (int64_t j = 0; j < runs.dims[2].extent; ++j) {
      for (int64_t k = 0; k < runs.dims[1].extent; ++k) {
        const int64_t dst_offset =
            i * runs.dims[3].dst_stride + j * runs.dims[2].dst_stride + k * runs.dims[1].dst_stride;
        const int64_t src_offset =
            i * runs.dims[3].src_stride + j * runs.dims[2].src_stride + k * runs.dims[1].src_stride;
        enqueue({dst + dst_offset, src + src_offset, runs.run_bytes}, inner, stream);
      }
    }
  }
}

// How many pairs from `first` on step by one block in source and destination.
int64_t consecutive_pairs(const CopyBlocksParams &p, int64_t first) {
  int64_t count = 1;
  while (first + count < p.num_pairs && p.mapping[2 * (first + count)] == p.mapping[2 * first] + count &&
         p.mapping[2 * (first + count) + 1] == p.mapping[2 * first + 1] + count) {
    ++count;
  }
  return count;
}

void swap_cache(const CopyBlocksParams &p, int64_t cache, const BlockRuns &runs, cudaStream_t stream) {
  const int64_t src_block_bytes = p.src_block_stride * p.block.element_size;
  const int64_t dst_block_bytes = p.dst_block_stride * p.block.element_size;
  const auto *src_base = static_cast<const char *>(p.src[cache]);
  auto *dst_base = static_cast<char *>(p.dst[cache]);
  for (int64_t pair = 0; pair < p.num_pairs;) {
    const int64_t count = consecutive_pairs(p, pair);
    const char *src = src_base + p.mapping[2 * pair] * src_block_bytes;
    char *dst = dst_base + p.mapping[2 * pair + 1] * dst_block_bytes;
    if (runs.num_dims == 0) {
      enqueue({dst, src, runs.run_bytes}, {count, src_block_bytes, dst_block_bytes}, stream);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        enqueue_strided_block(dst + i * dst_block_bytes, src + i * src_block_bytes, runs, stream);
      }
    }
    pair += count;
  }
}

}  // namespace

void swap_blocks(const CopyBlocksParams &p, void *stream) {
  const BlockRuns runs = runs_of(p.block);
  for (int64_t cache = 0; cache < p.num_caches && runs.run_bytes > 0; ++cache) {
    swap_cache(p, cache, runs, static_cast<cudaStream_t>(stream));
  }
  record_kernel("swap_blocks", "cuda::swap_blocks_memcpy");
}

}  // namespace pagedattn::cuda
