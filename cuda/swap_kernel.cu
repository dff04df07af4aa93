// The kernel that swaps scattered blocks: device memory on one side, mapped host memory or the device's on the other.
//
// SPDX-License-Identifier: Apache-2.0
//
// Blocks are cut into pieces of 2 KB, and a few warps, each a thread block of its own, take these in turn: the loads of
// a piece are under way together, then its stores.  The pairs are copied to device memory first, in a buffer that is
// kept from call to call, since each piece of each layer looks at them and the bus is what is short.
//
// Bound by the bus.  Reading host memory takes some 2 us under load, so 55 GB/s need 110 KB in flight: 55 warps' worth.
// What is written to the host leaves as fast with less than half as many.
//
// A decode kernel has a block on every multiprocessor, and one that leaves no room for it would keep it waiting for all
// of the swap, which is long.  Hopper's decode leaves 1024 registers of each quarter of a multiprocessor, and a warp of
// 32 registers a thread, without shared memory, fits into that.
#include <algorithm>
#include <list>
#include <memory>
#include <mutex>

#include "block_accesses.cuh"
#include "cuda_backend.h"
#include "fast_divisor.cuh"
#include "host_memory.h"
#include "runtime.h"
#include "swap_kernel.h"

namespace pagedattn::cuda {
namespace {

constexpr int kCachesPerLaunch = 192;  // 2 x 8 bytes each: with the rest, under the 4 KB that every driver passes
constexpr int kAccessesInFlight = 4;
constexpr int kPiece = 32 * kAccessesInFlight;  // accesses
constexpr int kRegisters = 32;

struct Args {
  const char *src[kCachesPerLaunch];
  char *dst[kCachesPerLaunch];
  const int2 *mapping;
  int num_pieces;  // of all caches
  FastDivisor num_pairs;
  FastDivisor pieces_per_block;
  BlockAccesses block;
};
static_assert(sizeof(Args) <= 4000);

// The compiler would add up what does not change from piece to piece beforehand, in registers that there are not.
template <class T>
__device__ T *opaque(T *pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// Where a lane's accesses of a piece begin, from the block on.
template <class Access, bool kStrided>
__device__ void locate_piece(const Args &args, int64_t first, int64_t *src_offset, int64_t *dst_offset) {
#pragma unroll
  for (int k = 0; k < kAccessesInFlight; ++k) {
    args.block.locate<kStrided>(first + 32 * k, int64_t{sizeof(Access)}, &src_offset[k], &dst_offset[k]);
  }
}

template <class Access, bool kStrided>
__global__ void __maxnreg__(kStrided ? 64 : kRegisters) swap_blocks_kernel(const __grid_constant__ Args args) {
#pragma unroll 1
  for (auto i = static_cast<int>(blockIdx.x); i < args.num_pieces; i += static_cast<int>(gridDim.x)) {
    const int row = args.pieces_per_block.divide(i), cache = args.num_pairs.divide(row);
    const int pair = row - cache * static_cast<int>(args.num_pairs.divisor);
    const int piece = i - row * static_cast<int>(args.pieces_per_block.divisor);
    const int2 blocks = args.mapping[pair];
    // The lane's first access and those behind it, until the piece's end or the block's.
    const int64_t first = int64_t{kPiece} * piece + threadIdx.x;
    const auto rest = static_cast<int>(min(int64_t{kPiece}, args.block.accesses_per_block - first));
    int64_t src_offset[kAccessesInFlight], dst_offset[kAccessesInFlight];
    locate_piece<Access, kStrided>(args, first, src_offset, dst_offset);
    const char *const src = opaque(args.src[cache] + blocks.x * args.block.src_block_stride + src_offset[0]);
    Access held[kAccessesInFlight];
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      if (32 * k < rest) held[k] = __ldcs(reinterpret_cast<const Access *>(src + (src_offset[k] - src_offset[0])));
    }
    char *const dst = opaque(args.dst[cache] + blocks.y * args.block.dst_block_stride + dst_offset[0]);
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      if (32 * k < rest) __stcs(reinterpret_cast<Access *>(dst + (dst_offset[k] - dst_offset[0])), held[k]);
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
    checked_int(std::max(p.num_src_blocks, p.num_dst_blocks), "blocks");
    const size_t bytes = static_cast<size_t>(p.num_pairs) * sizeof(int2);
    buffer_ = take(bytes);
    std::transform(p.mapping, p.mapping + 2 * p.num_pairs, static_cast<int32_t *>(buffer_->host),
                   [](int64_t block) { return static_cast<int32_t>(block); });
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

  const int2 *data() const { return static_cast<const int2 *>(buffer_->memory); }

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
  const auto kernel = args.block.num_dims == 0 ? swap_blocks_kernel<Access, false> : swap_blocks_kernel<Access, true>;
  // A multiprocessor that divides its memory otherwise has to be empty before a kernel that needs much of it comes.
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "cudaFuncSetAttribute");
  kernel<<<blocks, 32, 0, stream>>>(args);
  check_launch("swap_blocks_kernel");
}

}  // namespace

void swap_by_kernel(const CopyBlocksParams &p, const BlockRuns &runs, int64_t num_warps, cudaStream_t stream) {
  const DevicePairs pairs(p, stream);
  const int64_t access_bytes = widest_access(p, runs);
  Args args = {};
  args.mapping = pairs.data();
  args.block = block_accesses(p, runs, access_bytes);
  args.num_pairs = FastDivisor::of(checked_int(p.num_pairs, "block pairs"));
  const int64_t pieces_per_block = ceil_div(args.block.accesses_per_block, kPiece);
  args.pieces_per_block = FastDivisor::of(checked_int(pieces_per_block, "pieces a block"));
  for (int64_t first = 0; first < p.num_caches; first += kCachesPerLaunch) {
    const int64_t count = std::min<int64_t>(kCachesPerLaunch, p.num_caches - first);
    for (int64_t i = 0; i < count; ++i) {
      args.src[i] = static_cast<const char *>(p.src[first + i]);
      args.dst[i] = static_cast<char *>(p.dst[first + i]);
    }
    args.num_pieces = checked_int(count * p.num_pairs * pieces_per_block, "pieces of 2 KB");
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(args.num_pieces, num_warps));
    with_access(access_bytes, [&](auto access) { launch<decltype(access)>(args, blocks, stream); });
  }
}

}  // namespace pagedattn::cuda
