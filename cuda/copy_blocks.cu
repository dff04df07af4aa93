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
#include "access.cuh"
#include "block_runs.h"
#include "cuda_backend.h"
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
  int64_t src_block_stride;  // bytes
  int64_t dst_block_stride;  // bytes
  int64_t accesses_per_block;
  int64_t accesses_per_run;  // strided blocks only, like what follows
  int num_dims;
  RunDim dims[4];
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
  return {args.src[blockIdx.y] + src * args.src_block_stride, args.dst[blockIdx.y] + dst * args.dst_block_stride, true};
}

// Copies the accesses of this thread block's chunks; `locate(i, src, dst)` points both at access i.
template <class Access, class Locate>
__device__ void copy_chunks(int64_t num_accesses, Locate locate) {
  const int64_t chunk = static_cast<int64_t>(blockDim.x) * kAccessesInFlight;
  for (int64_t start = blockIdx.z * chunk; start < num_accesses; start += gridDim.z * chunk) {
    Access held[kAccessesInFlight];
    Access *target[kAccessesInFlight];
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      const int64_t i = start + static_cast<int64_t>(k) * blockDim.x + threadIdx.x;
      target[k] = nullptr;
      if (i >= num_accesses) continue;
      const Access *source;
      locate(i, &source, &target[k]);
      held[k] = *source;
    }
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      if (target[k] != nullptr) *target[k] = held[k];
    }
  }
}

template <class Access>
__global__ void __launch_bounds__(kThreadsPerBlock) copy_contiguous_kernel(const __grid_constant__ Args args) {
  const BlockPair pair = find_pair(args);
  if (!pair.exists) return;
  copy_chunks<Access>(args.accesses_per_block, [&](int64_t i, const Access **src, Access **dst) {
    *src = reinterpret_cast<const Access *>(pair.src) + i;
    *dst = reinterpret_cast<Access *>(pair.dst) + i;
  });
}

template <class Access>
__global__ void __launch_bounds__(kThreadsPerBlock) copy_strided_kernel(const __grid_constant__ Args args) {
  const BlockPair pair = find_pair(args);
  if (!pair.exists) return;
  copy_chunks<Access>(args.accesses_per_block, [&](int64_t i, const Access **src, Access **dst) {
    int64_t run = quotient(i, args.accesses_per_run);
    int64_t src_offset = (i - run * args.accesses_per_run) * static_cast<int64_t>(sizeof(Access));
    int64_t dst_offset = src_offset;
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      if (d >= args.num_dims) break;
      const int64_t rest = quotient(run, args.dims[d].extent);
      const int64_t index = run - rest * args.dims[d].extent;
      src_offset += index * args.dims[d].src_stride;
      dst_offset += index * args.dims[d].dst_stride;
      run = rest;
    }
    *src = reinterpret_cast<const Access *>(pair.src + src_offset);
    *dst = reinterpret_cast<Access *>(pair.dst + dst_offset);
  });
}

int64_t widest_access(const CopyBlocksParams &p, const Args &args, const BlockRuns &runs) {
  AccessWidth width(runs.run_bytes);
  for (int64_t i = 0; i < p.num_caches; ++i) {
    width.address(p.src[i]);
    width.address(p.dst[i]);
  }
  width.stride(args.src_block_stride, p.num_src_blocks);
  width.stride(args.dst_block_stride, p.num_dst_blocks);
  for (const RunDim &dim : runs.dims) {
    width.stride(dim.src_stride, dim.extent);
    width.stride(dim.dst_stride, dim.extent);
  }
  return width.bytes();
}

template <class Access>
void launch(const Args &args, dim3 grid, cudaStream_t stream, const char *name) {
  // No more threads than a block has work for.
  const int64_t busy = ceil_div(ceil_div(args.accesses_per_block, kAccessesInFlight), 32) * 32;
  const auto threads = static_cast<unsigned>(std::min<int64_t>(busy, kThreadsPerBlock));
  const int64_t chunks = ceil_div(args.accesses_per_block, int64_t{threads} * kAccessesInFlight);
  grid.z = static_cast<unsigned>(std::min(chunks, kMaxChunks));
  if (args.num_dims == 0) {
    copy_contiguous_kernel<Access><<<grid, threads, 0, stream>>>(args);
  } else {
    copy_strided_kernel<Access><<<grid, threads, 0, stream>>>(args);
  }
  check_launch(name);
}

}  // namespace

void copy_blocks(const CopyBlocksParams &p, void *stream_pointer) {
  const BlockRuns runs = runs_of(p.block);
  const char *name = runs.num_dims == 0 ? "cuda::copy_blocks_contiguous" : "cuda::copy_blocks_strided";
  auto *stream = static_cast<cudaStream_t>(stream_pointer);
  const bool empty = p.num_pairs == 0 || p.num_src_blocks == 0 || p.num_dst_blocks == 0 || runs.run_bytes == 0;

  Args args = {};
  args.mapping = p.mapping;
  args.num_src_blocks = p.num_src_blocks;
  args.num_dst_blocks = p.num_dst_blocks;
  args.src_block_stride = p.src_block_stride * p.block.element_size;
  args.dst_block_stride = p.dst_block_stride * p.block.element_size;
  args.num_dims = runs.num_dims;
  std::copy(runs.dims.begin(), runs.dims.end(), args.dims);

  const int64_t access_bytes = widest_access(p, args, runs);
  args.accesses_per_run = runs.run_bytes / access_bytes;
  args.accesses_per_block = args.accesses_per_run * runs.num_runs();
  for (int64_t first = 0; first < p.num_caches && !empty; first += kCachesPerLaunch) {
    const int64_t count = std::min<int64_t>(kCachesPerLaunch, p.num_caches - first);
    for (int64_t i = 0; i < count; ++i) {
      args.src[i] = static_cast<const char *>(p.src[first + i]);
      args.dst[i] = static_cast<char *>(p.dst[first + i]);
    }
    const dim3 grid(checked_unsigned(p.num_pairs, "block pairs"), static_cast<unsigned>(count));
    with_access(access_bytes, [&](auto access) { launch<decltype(access)>(args, grid, stream, name); });
  }
  record_kernel("copy_blocks", name);
}

}  // namespace pagedattn::cuda
