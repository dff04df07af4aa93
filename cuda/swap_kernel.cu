// The kernel that swaps scattered blocks: device memory on one side, mapped host memory or the device's on the other.
//
// SPDX-License-Identifier: Apache-2.0
//
// All accesses of all blocks of all caches are numbered through, and a few thread blocks walk over them, each with 6 KB
// of loads in flight whatever the size of a piece.  An access finds its cache, pair and place by division.  The pairs
// are copied to device memory first, in a buffer that is kept from call to call, since each access of each layer looks
// at them and the bus is what is short.
//
// Bound by the bus.  Where reading host memory takes 2 us under load, 55 GB/s need 110 KB in flight: 18 thread blocks'
// worth, of which some always wait for their pairs or stores.
//
// What a swap takes from kernels beside it is little of the memory's rate (2 %), and room: a thread block takes a
// sixteenth of a multiprocessor's registers and no shared memory.  Beside kernels that leave as much it lies on the
// same multiprocessor.  A kernel whose blocks take all registers, as Hopper's decode does, has to wait for those
// multiprocessors until the swap has ended, which is why thread blocks are few.
#include <cstring>
#include <list>
#include <memory>
#include <mutex>

#include "block_accesses.cuh"
#include "cuda_backend.h"
#include "host_memory.h"
#include "runtime.h"
#include "swap_kernel.h"

namespace pagedattn::cuda {
namespace {

constexpr int kCachesPerLaunch = 192;  // 2 x 8 bytes each: with the rest, under the 4 KB that every driver passes
constexpr int kSwapThreads = 64;
constexpr int kAccessesInFlight = 6;

struct Args {
  const char *src[kCachesPerLaunch];
  char *dst[kCachesPerLaunch];
  const int64_t *mapping;
  int64_t num_accesses;  // of all caches
  IndexDivisor num_pairs;
  IndexDivisor accesses_per_block;
  BlockAccesses block;
};
static_assert(sizeof(Args) <= 4000);

template <class Access, bool kStrided>
__global__ void __launch_bounds__(kSwapThreads, 16) swap_blocks_kernel(const __grid_constant__ Args args) {
  constexpr int64_t kChunk = int64_t{kSwapThreads} * kAccessesInFlight;
  for (int64_t start = blockIdx.x * kChunk; start < args.num_accesses; start += gridDim.x * kChunk) {
    // Three loops without a branch before the last, so that all pairs, then all elements are on their way together.
    // What is behind the end reads the last access again.
    const Access *source[kAccessesInFlight];
    Access *target[kAccessesInFlight];
    Access held[kAccessesInFlight];
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      int64_t i = min(start + k * kSwapThreads + threadIdx.x, args.num_accesses - 1);
      int64_t pair = args.accesses_per_block.split(&i);
      const int64_t cache = args.num_pairs.split(&pair);
      int64_t src_offset, dst_offset;
      args.block.locate<kStrided>(i, int64_t{sizeof(Access)}, &src_offset, &dst_offset);
      const longlong2 blocks = reinterpret_cast<const longlong2 *>(args.mapping)[pair];
      src_offset += blocks.x * args.block.src_block_stride;
      dst_offset += blocks.y * args.block.dst_block_stride;
      source[k] = reinterpret_cast<const Access *>(args.src[cache] + src_offset);
      target[k] = reinterpret_cast<Access *>(args.dst[cache] + dst_offset);
    }
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) held[k] = *source[k];
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      if (start + k * kSwapThreads + threadIdx.x < args.num_accesses) *target[k] = held[k];
    }
  }
}

// Memory on both sides through which a call's pairs reach its kernel, in use until `passed`.
struct PairBuffer {
  explicit PairBuffer(size_t bytes) : bytes(bytes) {
    const RelaxedCapture relaxed;
    check_cuda(cudaHostAlloc(&host, bytes, cudaHostAllocPortable), "cudaHostAlloc");
    const cudaError_t error = cudaMalloc(&memory, bytes);
    if (error == cudaSuccess) return;
    cudaFreeHost(host);
    throw_cuda_error(error, "cudaMalloc");
  }

  size_t bytes;
  void *host = nullptr;
  void *memory = nullptr;
  Event used;
};

// The pairs of one call on the device.  Buffers whose kernel has ended serve the next call; none is freed, since there
// are only as many as calls have ever been under way together.
class DevicePairs {
 public:
  DevicePairs(const CopyBlocksParams &p, cudaStream_t stream) : stream_(stream) {
    const size_t bytes = static_cast<size_t>(2 * p.num_pairs) * sizeof(int64_t);
    buffer_ = take(bytes);
    std::memcpy(buffer_->host, p.mapping, bytes);
    check_cuda(cudaMemcpyAsync(buffer_->memory, buffer_->host, bytes, cudaMemcpyHostToDevice, stream),
               "cudaMemcpyAsync");
  }
  ~DevicePairs() {
    try {
      buffer_->used.record(stream_);
      give_back(std::move(buffer_));
    } catch (const std::exception &) {
      // A buffer whose use nobody can tell the end of serves no other call.
    }
  }
  DevicePairs(const DevicePairs &) = delete;
  DevicePairs &operator=(const DevicePairs &) = delete;

  const int64_t *data() const { return static_cast<const int64_t *>(buffer_->memory); }

 private:
  struct Pool {
    std::mutex mutex;
    std::list<std::unique_ptr<PairBuffer>> buffers;
  };
  static Pool &pool() {
    static auto *const all = new Pool;  // never destroyed: CUDA may be gone by then
    return *all;
  }

  static std::unique_ptr<PairBuffer> take(size_t bytes) {
    Pool &all = pool();
    {
      const std::lock_guard lock(all.mutex);
      for (auto at = all.buffers.begin(); at != all.buffers.end(); ++at) {
        if (!(*at)->used.of_current_device() || (*at)->bytes < bytes || !(*at)->used.passed()) continue;
        std::unique_ptr<PairBuffer> found = std::move(*at);
        all.buffers.erase(at);
        return found;
      }
    }
    constexpr size_t kLeastBytes = 64 * 1024;
    return std::make_unique<PairBuffer>(std::max(kLeastBytes, std::bit_ceil(bytes)));
  }

  static void give_back(std::unique_ptr<PairBuffer> buffer) {
    Pool &all = pool();
    const std::lock_guard lock(all.mutex);
    all.buffers.push_back(std::move(buffer));
  }

  cudaStream_t stream_;
  std::unique_ptr<PairBuffer> buffer_;
};

template <class Access>
void launch(const Args &args, unsigned blocks, cudaStream_t stream) {
  if (args.block.num_dims == 0) {
    swap_blocks_kernel<Access, false><<<blocks, kSwapThreads, 0, stream>>>(args);
  } else {
    swap_blocks_kernel<Access, true><<<blocks, kSwapThreads, 0, stream>>>(args);
  }
  check_launch("swap_blocks_kernel");
}

}  // namespace

void swap_by_kernel(const CopyBlocksParams &p, const BlockRuns &runs, int64_t num_thread_blocks, cudaStream_t stream) {
  const DevicePairs pairs(p, stream);
  const int64_t access_bytes = widest_access(p, runs);
  Args args = {};
  args.mapping = pairs.data();
  args.block = block_accesses(p, runs, access_bytes);
  args.num_pairs = IndexDivisor::of(p.num_pairs);
  args.accesses_per_block = IndexDivisor::of(args.block.accesses_per_block);
  for (int64_t first = 0; first < p.num_caches; first += kCachesPerLaunch) {
    const int64_t count = std::min<int64_t>(kCachesPerLaunch, p.num_caches - first);
    for (int64_t i = 0; i < count; ++i) {
      args.src[i] = static_cast<const char *>(p.src[first + i]);
      args.dst[i] = static_cast<char *>(p.dst[first + i]);
    }
    args.num_accesses = count * p.num_pairs * args.block.accesses_per_block;
    const int64_t chunks = ceil_div(args.num_accesses, int64_t{kSwapThreads} * kAccessesInFlight);
    const auto blocks = static_cast<unsigned>(std::min(chunks, num_thread_blocks));
    with_access(access_bytes, [&](auto access) { launch<decltype(access)>(args, blocks, stream); });
  }
}

}  // namespace pagedattn::cuda
