// copy_blocks, and swap_blocks between host memories: whole blocks, in runs as long as both layouts allow.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "cpu/backend.h"
#include "cpu/thread_pool.h"

namespace pagedattn::cpu {
namespace {

// A block as `num_runs` runs of `run_bytes`; the outer dimensions of `block` number the runs.
struct Runs {
  int outer_dims = 0;
  int64_t num_runs = 1;
  int64_t run_bytes = 0;
};

Runs find_runs(const BlockLayout &block) {
  if (block.contiguous_bytes > 0) return {0, 1, block.contiguous_bytes};
  int64_t length = 1;  // elements that lie together in source and destination
  int dims = block.ndim;
  while (dims > 0) {
    const int inner = dims - 1;
    const bool dense = block.src_strides[inner] == length && block.dst_strides[inner] == length;
    if (!dense && block.shape[inner] != 1) break;
    length *= block.shape[inner];
    --dims;
  }
  Runs runs{dims, 1, length * block.element_size};
  for (int d = 0; d < dims; ++d) runs.num_runs *= block.shape[d];
  return runs;
}

void copy_run(const BlockLayout &block, const Runs &runs, const char *src, char *dst, int64_t run) {
  int64_t from = 0;
  int64_t to = 0;
  for (int d = runs.outer_dims - 1; d >= 0; --d) {
    const int64_t i = run % block.shape[d];
    run /= block.shape[d];
    from += i * block.src_strides[d];
    to += i * block.dst_strides[d];
  }
  std::memcpy(dst + to * block.element_size, src + from * block.element_size, static_cast<size_t>(runs.run_bytes));
}

}  // namespace

void copy_blocks(const CopyBlocksParams &p) {
  const Runs runs = find_runs(p.block);
  const int64_t block_bytes = runs.num_runs * runs.run_bytes;
  const int64_t num_copies = p.num_pairs * p.num_caches;
  if (num_copies > 0 && block_bytes > 0) {
    const int64_t copies_a_task = std::max<int64_t>(1, kMinParallelWork / block_bytes);
    // A cache's pairs lie together, so that a task stays within one cache where it can.
    const auto copy = [&](int64_t i) {
      const int64_t cache = i / p.num_pairs;
      const int64_t *pair = p.mapping + i % p.num_pairs * 2;
      const char *src = static_cast<const char *>(p.src[cache]) + pair[0] * p.src_block_stride * p.block.element_size;
      char *dst = static_cast<char *>(p.dst[cache]) + pair[1] * p.dst_block_stride * p.block.element_size;
      for (int64_t run = 0; run < runs.num_runs; ++run) copy_run(p.block, runs, src, dst, run);
    };
    parallel_for((num_copies + copies_a_task - 1) / copies_a_task, [&](int64_t task, int) {
      const int64_t end = std::min(num_copies, (task + 1) * copies_a_task);
      for (int64_t i = task * copies_a_task; i < end; ++i) copy(i);
    });
  }
}

}  // namespace pagedattn::cpu
