// copy_blocks: whole blocks copied within their caches (copy-on-write), all caches in one launch.
//
// SPDX-License-Identifier: Apache-2.0
//
// The grid is pairs x caches x chunks of a block.  The base pointers of the caches travel as kernel parameters, so a
// call needs no memory of its own and can be captured; more caches than fit take further launches.  A thread loads
// four accesses of up to 16 bytes before it stores the first.  Where a block is one run of bytes its chunks are plain
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

constexpr int kCachesPerLaunch = 192;  // 2 x 8 bytes each: with the rest, under the 4 KB that every driver passes.
constexpr int kAccessesInFlight = 4;
constexpr int64_t kMaxChunks = 65535;  // of gridDim.z

struct Args {
  const char *src[kCachesPerLaunch];
  char *dst[kCachesPerLaunch];
  const int64_t *mapping;
  int64_t num_src_blocks;
  int64_t num_dst_blocks;
  BlockAccesses block;
};
static_assert(sizeof(Args) <= 4000);

// Where this thread block's pair begins in this thread block's cache.
struct BlockPair {
  const char *src;
  char *dst;
  bool exists;
};

__device__ BlockPair find_pair(const Args &args) {
  const int64_t *pair = args.mapping + 2 * static_cast<int64_t>(blockIdx.x);
  const int64_t src = pair[0];
  const int64_t dst = pair[1];
  if (src < 0 || src >= args.num_src_blocks || dst < 0 || dst >= args.num_dst_blocks) return {nullptr, nullptr, false};
  return {args.src[blockIdx.y] + src * args.block.src_block_stride,
          args.dst[blockIdx.y] + dst * args.block.dst_block_stride, true};
}

template <class Access, bool kStrided>
__global__ void __launch_bounds__(kThreadsPerBlock) copy_blocks_kernel(const __grid_constant__ Args args) {
  wait_for_kernels_before();
  const BlockPair pair = find_pair(args);
  if (!pair.exists) return;
  const int64_t num_accesses = args.block.accesses_per_block;
  const int64_t chunk = static_cast<int64_t>(blockDim.x) * kAccessesInFlight;
  for (int64_t start = blockIdx.z * chunk; start < num_accesses; start += gridDim.z * chunk) {
    Access held[kAccessesInFlight];
    char *target[kAccessesInFlight];
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      const int64_t i = start + static_cast<int64_t>(k) * blockDim.x + threadIdx.x;
      target[k] = nullptr;
      if (i >= num_accesses) continue;
      int64_t src_offset, dst_offset;
      args.block.locate<kStrided>(i, int64_t{sizeof(Access)}, &src_offset, &dst_offset);
      target[k] = pair.dst + dst_offset;
      held[k] = *reinterpret_cast<const Access *>(pair.src + src_offset);
    }
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      if (target[k] != nullptr) *reinterpret_cast<Access *>(target[k]) = held[k];
    }
  }
}

template <class Access>
void launch(const Args &args, int64_t num_pairs, int64_t num_caches, cudaStream_t stream, const char *name) {
  // No more threads than a block has work for.
  const int64_t busy = ceil_div(ceil_div(args.block.accesses_per_block, kAccessesInFlight), 32) * 32;
  const auto threads = static_cast<unsigned>(std::min<int64_t>(busy, kThreadsPerBlock));
  const int64_t chunks = ceil_div(args.block.accesses_per_block, int64_t{threads} * kAccessesInFlight);
  const dim3 grid(checked_unsigned(num_pairs, "block pairs"), static_cast<unsigned>(num_caches),
                  static_cast<unsigned>(std::min(chunks, kMaxChunks)));
  const auto kernel = args.block.num_dims == 0 ? copy_blocks_kernel<Access, false> : copy_blocks_kernel<Access, true>;
  launch_kernel({name, grid, dim3(threads), 0, stream, EarlyStart::kUnlessCaptured}, kernel, args);
}

}  // namespace

void copy_blocks(const CopyBlocksParams &p, void *stream_pointer) {
  const BlockRuns runs = runs_of(p.block);
  const char *name = runs.num_dims == 0 ? "cuda::copy_blocks_contiguous" : "cuda::copy_blocks_strided";
  record_kernel("copy_blocks", name);
  if (p.num_pairs == 0 || p.num_src_blocks == 0 || p.num_dst_blocks == 0 || runs.run_bytes == 0) return;
  auto *stream = static_cast<cudaStream_t>(stream_pointer);

  Args args = {};
  args.mapping = p.mapping;
  args.num_src_blocks = p.num_src_blocks;
  args.num_dst_blocks = p.num_dst_blocks;
  const int64_t access_bytes = widest_access(p, runs);
  args.block = block_accesses(p, runs, access_bytes);
  for (int64_t first = 0; first < p.num_caches; first += kCachesPerLaunch) {
    const int64_t count = std::min<int64_t>(kCachesPerLaunch, p.num_caches - first);
    for (int64_t i = 0; i < count; ++i) {
      args.src[i] = static_cast<const char *>(p.src[first + i]);
      args.dst[i] = static_cast<char *>(p.dst[first + i]);
    }
    with_access(access_bytes, [&](auto access) { launch<decltype(access)>(args, p.num_pairs, count, stream, name); });
  }
}

}  // namespace pagedattn::cuda
