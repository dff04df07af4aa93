// copy_blocks: whole blocks copied within their caches (copy-on-write), all caches in one launch.
//
// SPDX-License-Identifier: Apache-2.0
//
// The grid is pairs x caches x chunks of a block.  The base pointers of the caches travel as kernel parameters, so a
// call needs no memory of its own and can be captured; more caches than fit take further launches.  A thread loads
// two accesses of up to 16 bytes before it stores the first.  Where a block is one run of bytes its chunks are plain
// ranges; a strided block is cut into runs, and each access finds its run by division.
//
// Bound by memory, or by the launch where few blocks are copied.  Pairs that name a block that does not exist are
// skipped.
#include "block_accesses.cuh"
#include "cuda_backend.h"
#include "launch.h"
#include "overlap.cuh"
#include "runtime.h"

namespace pagedattn::cuda {
namespace {

constexpr int kCachesPerLaunch = 384;  // 8 bytes each: with the rest, under the 4 KB that every driver passes.
constexpr int kFewCaches = 8;
constexpr int kThreads = 128;
constexpr int kAccessesInFlight = 2;
constexpr int kChunk = kThreads * kAccessesInFlight;  // accesses that a thread block takes at once
constexpr int64_t kMaxChunks = 65535;                 // of gridDim.z

// A small call of few caches must not wait for the parameters of 384.
template <int kCaches>
struct Args {
  const int64_t *mapping;
  int64_t num_blocks;
  BlockAccesses block;
  char *caches[kCaches];
};
static_assert(sizeof(Args<kCachesPerLaunch>) <= 4000);

template <class Access, bool kStrided, int kCaches>
__global__ void __launch_bounds__(kThreads) copy_blocks_kernel(const __grid_constant__ Args<kCaches> args) {
  const BlockAccesses &block = args.block;
  char *const cache = args.caches[blockIdx.y];
  const int64_t *const pair = args.mapping + 2 * static_cast<int64_t>(blockIdx.x);
  const int64_t num_accesses = block.accesses_per_block;
  wait_for_kernels_before();
  const auto src = static_cast<uint64_t>(pair[0]), dst = static_cast<uint64_t>(pair[1]);
  if (src >= static_cast<uint64_t>(args.num_blocks) || dst >= static_cast<uint64_t>(args.num_blocks)) return;
  const char *const source = cache + src * block.src_block_stride;
  char *const target = cache + dst * block.dst_block_stride;
  // One pass is the rule, and code that is never run still has to be fetched.
#pragma unroll 1
  for (int64_t chunk = blockIdx.z; chunk * kChunk < num_accesses; chunk += gridDim.z) {
    const int64_t first = chunk * kChunk + threadIdx.x;
    Access held[kAccessesInFlight];
    int64_t to[kAccessesInFlight];
    const auto exists = [&](int k) { return first + k * kThreads < num_accesses; };
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      if (!exists(k)) continue;
      int64_t from;
      block.locate<kStrided>(first + k * kThreads, int64_t{sizeof(Access)}, &from, &to[k]);
      held[k] = *reinterpret_cast<const Access *>(source + from);
    }
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      if (exists(k)) *reinterpret_cast<Access *>(target + to[k]) = held[k];
    }
  }
}

template <class Access, int kCaches>
void launch(const CopyBlocksParams &p, const BlockAccesses &block, int64_t first, int64_t count, cudaStream_t stream,
            const char *name) {
  Args<kCaches> args = {p.mapping, p.num_dst_blocks, block, {}};
  for (int64_t i = 0; i < count; ++i) args.caches[i] = static_cast<char *>(p.dst[first + i]);
  const int64_t chunks = ceil_div(block.accesses_per_block, kChunk);
  const dim3 grid(checked_unsigned(p.num_pairs, "block pairs"), static_cast<unsigned>(count),
                  static_cast<unsigned>(std::min(chunks, kMaxChunks)));
  const auto kernel =
      block.num_dims == 0 ? copy_blocks_kernel<Access, false, kCaches> : copy_blocks_kernel<Access, true, kCaches>;
  launch_kernel({name, grid, dim3(kThreads), 0, stream, EarlyStart::kUnlessCaptured}, kernel, args);
}

}  // namespace

void copy_blocks(const CopyBlocksParams &p, void *stream_pointer) {
  const BlockRuns runs = runs_of(p.block);
  const char *name = runs.num_dims == 0 ? "cuda::copy_blocks_contiguous" : "cuda::copy_blocks_strided";
  record_kernel("copy_blocks", name);
  if (p.num_pairs == 0 || p.num_dst_blocks == 0 || runs.run_bytes == 0) return;
  auto *stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t access_bytes = widest_access(p, runs);
  const BlockAccesses block = block_accesses(p, runs, access_bytes);
  with_access(access_bytes, [&](auto access) {
    using Access = decltype(access);
    if (p.num_caches <= kFewCaches) return launch<Access, kFewCaches>(p, block, 0, p.num_caches, stream, name);
    for (int64_t first = 0; first < p.num_caches; first += kCachesPerLaunch) {
      const int64_t count = std::min<int64_t>(kCachesPerLaunch, p.num_caches - first);
      launch<Access, kCachesPerLaunch>(p, block, first, count, stream, name);
    }
  });
}

}  // namespace pagedattn::cuda
