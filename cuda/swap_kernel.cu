// The kernel that swaps scattered blocks by plain accesses: device memory on one side, mapped host memory or the
// device's on the other.  With the host it serves what swap_bulk.cu's cannot: strided blocks, odd addresses, older
// GPUs.
//
// SPDX-License-Identifier: Apache-2.0
//
// Blocks are cut into pieces of 2 KB, and a few warps, each a thread block of its own, take these in turn: the loads of
// a piece are under way together, then its stores.  Each piece of each layer looks at the pairs, which lie in device
// memory.
//
// Bound by the bus.  Reading host memory takes some 2 us under load, so 55 GB/s need 110 KB in flight: 55 warps' worth.
// What is written to the host leaves as fast with less than half as many.
//
// 32 registers a thread, so that a warp fits beside a decode kernel (swap_bulk.cu).
#include <algorithm>

#include "block_accesses.cuh"
#include "fast_divisor.cuh"
#include "runtime.h"
#include "swap_kernel.h"
#include "swap_tables.cuh"

namespace pagedattn::cuda {
namespace {

constexpr int kAccessesInFlight = 4;
constexpr int kPiece = 32 * kAccessesInFlight;  // accesses
constexpr int kRegisters = 32;

struct Args {
  SwapTables tables;
  int num_pieces;  // of all caches
  FastDivisor num_pairs;
  FastDivisor pieces_per_block;
  BlockAccesses block;
};

// The compiler would add up what does not change from piece to piece beforehand, in registers that there are not.
template <class T>
__device__ T *opaque(T *pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

__device__ int opaque(int number) {
  asm("" : "+r"(number));
  return number;
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
  SwapTableReader<false> tables(args.tables, nullptr);
#pragma unroll 1
  for (auto i = static_cast<int>(blockIdx.x); i < args.num_pieces; i += static_cast<int>(gridDim.x)) {
    const int row = args.pieces_per_block.divide(i), cache = args.num_pairs.divide(row);
    const int pair = row - cache * static_cast<int>(args.num_pairs.divisor);
    const int piece = i - row * static_cast<int>(args.pieces_per_block.divisor);
    // The lane's first access and those behind it, until the piece's end or the block's.
    const int64_t first = int64_t{kPiece} * piece + threadIdx.x;
    const auto rest = static_cast<int>(min(int64_t{kPiece}, args.block.accesses_per_block - first));
    int64_t src_offset[kAccessesInFlight], dst_offset[kAccessesInFlight];
    locate_piece<Access, kStrided>(args, first, src_offset, dst_offset);
    const char *const src =
        opaque(tables.cache(cache).src + tables.source(pair) * args.block.src_block_stride + src_offset[0]);
    Access held[kAccessesInFlight];
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      if (32 * k < rest) held[k] = __ldcs(reinterpret_cast<const Access *>(src + (src_offset[k] - src_offset[0])));
    }
    // Looked up behind the loads, which leave no registers for it.
    char *const dst = opaque(tables.cache(opaque(cache)).dst +
                             tables.destination(opaque(pair)) * args.block.dst_block_stride + dst_offset[0]);
#pragma unroll
    for (int k = 0; k < kAccessesInFlight; ++k) {
      if (32 * k < rest) __stcs(reinterpret_cast<Access *>(dst + (dst_offset[k] - dst_offset[0])), held[k]);
    }
  }
  tables.finish();
}

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

void swap_by_kernel(const CopyBlocksParams &p, const BlockRuns &runs, SwapPairs *pairs, int64_t num_warps,
                    cudaStream_t stream) {
  const int64_t access_bytes = widest_access(p, runs);
  Args args = {};
  args.block = block_accesses(p, runs, access_bytes);
  args.num_pairs = FastDivisor::of(checked_int(p.num_pairs, "block pairs"));
  const int64_t pieces_per_block = ceil_div(args.block.accesses_per_block, kPiece);
  args.pieces_per_block = FastDivisor::of(checked_int(pieces_per_block, "pieces a block"));
  const int64_t num_pieces = p.num_caches * p.num_pairs * pieces_per_block;
  checked_int(num_pieces + num_warps, "pieces of 2 KB");  // where the kernel's count ends
  args.num_pieces = static_cast<int>(num_pieces);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(args.num_pieces, num_warps));
  args.tables = pairs->copied(p);  // behind all checks: only the kernel gives the memory back
  with_access(access_bytes, [&](auto access) { launch<decltype(access)>(args, blocks, stream); });
}

}  // namespace pagedattn::cuda
