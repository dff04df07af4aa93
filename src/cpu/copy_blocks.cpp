// copy_blocks, and swap_blocks between host memories: whole blocks, in runs as long as both layouts allow.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "cpu/backend.h"
#include "cpu/isa.h"
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

// Where a run lies, from the blocks of its pair on.
struct RunOffset {
  int64_t src;
  int64_t dst;
};

RunOffset run_offset(const BlockLayout &block, const Runs &runs, int64_t run) {
  RunOffset offset{0, 0};
  for (int d = runs.outer_dims - 1; d >= 0; --d) {
    const int64_t i = run % block.shape[d];
    run /= block.shape[d];
    offset.src += i * block.src_strides[d] * block.element_size;
    offset.dst += i * block.dst_strides[d] * block.element_size;
  }
  return offset;
}

// A pair of blocks in one cache, in the order of the work: a cache's pairs lie together, so that a task stays within
// one cache where it can.
class BlockCopy {
 public:
  BlockCopy(const CopyBlocksParams &p, int64_t number)
      : p_(p), cache_(number / p.num_pairs), pair_(number % p.num_pairs) {}

  const char *src() const {
    return static_cast<const char *>(p_.src[cache_]) +
           p_.mapping[2 * pair_] * p_.src_block_stride * p_.block.element_size;
  }
  char *dst() const {
    return static_cast<char *>(p_.dst[cache_]) +
           p_.mapping[2 * pair_ + 1] * p_.dst_block_stride * p_.block.element_size;
  }
  void advance() {
    if (++pair_ < p_.num_pairs) return;
    pair_ = 0;
    ++cache_;
  }

 private:
  const CopyBlocksParams &p_;
  int64_t cache_;
  int64_t pair_;
};

void copy_task(const CopyBlocksParams &p, const Runs &runs, int64_t first, int64_t count) {
  BlockCopy copy(p, first);
  for (int64_t i = 0; i < count; ++i, copy.advance()) {
    for (int64_t run = 0; run < runs.num_runs; ++run) {
      const RunOffset at = run_offset(p.block, runs, run);
      std::memcpy(copy.dst() + at.dst, copy.src() + at.src, static_cast<size_t>(runs.run_bytes));
    }
  }
}

void stream_task(const CopyBlocksParams &p, const Runs &runs, const Kernels &k, int64_t first, int64_t count) {
  BlockCopy copy(p, first);
  const char *src = copy.src();
  for (int64_t i = 0; i < count; ++i) {
    char *dst = copy.dst();
    if (i + 1 < count) copy.advance();
    const char *const src_behind = copy.src();
    for (int64_t run = 0; run < runs.num_runs; ++run) {
      const RunOffset at = run_offset(p.block, runs, run);
      const char *next = run + 1 < runs.num_runs ? src + run_offset(p.block, runs, run + 1).src : src_behind;
      k.stream_run(dst + at.dst, src + at.src, next, runs.run_bytes);
    }
    src = src_behind;
  }
  k.finish_streaming();
}

}  // namespace

void copy_blocks(const CopyBlocksParams &p) {
  const Runs runs = find_runs(p.block);
  const int64_t block_bytes = runs.num_runs * runs.run_bytes;
  const int64_t num_copies = p.num_pairs * p.num_caches;
  if (num_copies == 0 || block_bytes == 0) return;
  const bool streamed = worth_streaming(num_copies * block_bytes, runs.run_bytes);
  const int64_t copies_a_task = std::max<int64_t>(1, kMinParallelWork / block_bytes);
  parallel_for((num_copies + copies_a_task - 1) / copies_a_task, [&](int64_t task, int) {
    const int64_t first = task * copies_a_task;
    const int64_t count = std::min(copies_a_task, num_copies - first);
    if (streamed) {
      stream_task(p, runs, kernels(), first, count);
    } else {
      copy_task(p, runs, first, count);
    }
  });
}

}  // namespace pagedattn::cpu
