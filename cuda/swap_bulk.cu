// The kernel that swaps scattered blocks with the host on GPUs with a bulk copy engine: at the bus's rate, and no
// faster.
//
// SPDX-License-Identifier: Apache-2.0
//
// A few warps, each a thread block of its own, copy pieces of up to 4 KB through shared memory: the engine fetches
// three steps' worth while it writes the one before, so that the bus has enough to do however slow memory answers.  A
// step is a piece, or up to eight that are small, each with a lane, a slot of shared memory and a barrier of its own.
//
// Once the bus is full, what waits for it fills queues that all memory accesses stand in, and a decode kernel beside
// would keep half of its speed or less.  How fast the bus is depends on the machine, on what else uses it and on
// whether it is used both ways.  So each warp keeps to a timetable that finds out.  Which warp was slowed is chance, so
// they claim their work as they go.  Beside a swap the other way it is otherwise.  What is read is not paced: reads
// wait behind writes, and would give way until hardly any were left.  What is written is late now and then and does not
// give way for that, but keeps to a rate that leaves room for as many reads.
//
// A decode kernel has a block on every multiprocessor, and one that leaves no room for it would keep it waiting for all
// of the swap, which is long.  Hopper's decode leaves 1024 registers of each quarter of a multiprocessor and 18 KB of
// shared memory, and a warp of 32 registers a thread and 16 KB fits into that.
#include <algorithm>
#include <array>
#include <atomic>

#include "block_accesses.cuh"
#include "fast_divisor.cuh"
#include "hopper_ptx.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "runtime.h"
#include "swap_kernel.h"
#include "swap_tables.cuh"
#include "timetable.cuh"

namespace pagedattn::cuda {
namespace {

constexpr int kSteps = 4;         // whose pieces shared memory holds
constexpr int kStepBytes = 4096;  // at most
constexpr int kMostLanes = 32 / kSteps;

constexpr int kFirstRate = 32;  // bytes a cycle, of all warps: more than PCIe 5 takes; others are found in time
// And where blocks are read meanwhile: what PCIe 5 has left for writes if as much is read.
constexpr int kRateBesideReads = 22;

// Warps that read from the host and that write to it at the moment.  (Builds for older GPUs leave the kernel empty.)
[[maybe_unused]] __device__ unsigned moving_warps[2];

struct Args {
  SwapTables tables;
  int64_t src_block_stride;  // bytes
  int64_t dst_block_stride;  // bytes
  int64_t block_bytes;
  FastDivisor num_pairs;
  FastDivisor pieces_per_block;
  int num_pieces;  // of all caches
  int piece_bytes;
  int lanes;                // of a step
  uint32_t first_interval;  // of steps, in cycles
  uint32_t interval_beside_reads;
  bool to_host;
};
__global__ void __maxnreg__(32) swap_blocks_bulk_kernel(const __grid_constant__ Args args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char slots[];
  __shared__ Barrier arrived[32];
  const auto lane = static_cast<int>(threadIdx.x);
  const int my_step = lane / args.lanes;  // of a round; others' lanes have no slot
  char *const slot = slots + lane * args.piece_bytes;
  init_barrier(&arrived[lane], 1);
  publish_barriers();
  wait_for_kernels_before();
  __shared__ uint32_t copy_complete;
  SwapTableReader<true> tables(args.tables, &copy_complete);
  tables.bring();
  __syncwarp();

  // Rounds of four steps.  A warp takes two and then claims what is left, far enough ahead not to wait for the answer.
  const int pieces_a_round = kSteps * args.lanes;
  const auto rounds = static_cast<uint32_t>((args.num_pieces - 1) / pieces_a_round + 1);
  uint32_t round = blockIdx.x, next_round = gridDim.x + blockIdx.x;
  uint32_t claimed = 0;  // the lowest bit says whether others move blocks the other way meanwhile
  const auto claim = [&] {
    if (lane > 0) return;
    claimed = 2 * (2 * gridDim.x + tables.claim());
    if (*static_cast<volatile unsigned *>(&moving_warps[args.to_host ? 0 : 1]) > 0) claimed |= 1;
  };
  claim();
  if (lane == 0) atomicAdd(&moving_warps[args.to_host ? 1 : 0], 1);

  int piece = static_cast<int>(round) * pieces_a_round + lane;  // this lane's next, if it is one
  const auto exists = [&] { return my_step < kSteps && piece < args.num_pieces; };
  const auto fetch_pair = [&] {
    const int row = args.pieces_per_block.divide(piece);
    return tables.blocks(row - args.num_pairs.divide(row) * static_cast<int>(args.num_pairs.divisor));
  };
  int2 blocks = {};
  if (exists()) blocks = fetch_pair();
  uint32_t phase = 0;
  char *target = nullptr;
  int bytes = 0;  // in the slot
  Timetable timetable(args.first_interval);

#pragma unroll 1
  for (int step = 0; round < rounds || step % kSteps != kSteps - 1; ++step) {
    const bool my_turn = my_step == step % kSteps;
    if (my_turn && round < rounds && exists()) {
      const int row = args.pieces_per_block.divide(piece), cache = args.num_pairs.divide(row);
      const int64_t offset =
          int64_t{args.piece_bytes} * (piece - row * static_cast<int>(args.pieces_per_block.divisor));
      const SwapCache addresses = tables.cache(cache);
      const char *const source = addresses.src + blocks.x * args.src_block_stride + offset;
      target = addresses.dst + blocks.y * args.dst_block_stride + offset;
      bytes = static_cast<int>(min(int64_t{args.piece_bytes}, args.block_bytes - offset));
      wait_bulk_reads();
      arrive_and_expect(&arrived[lane], bytes);
      copy_bulk_to_shared(shared_address(slot), source, bytes, &arrived[lane]);
    }
    if (my_turn && next_round < rounds) {
      piece = static_cast<int>(next_round) * pieces_a_round + lane;
      if (exists()) blocks = fetch_pair();
    }
    if (step % kSteps == kSteps - 1) {
      round = next_round;
      next_round = __shfl_sync(0xffffffffu, claimed, 0) / 2;
      if (next_round < rounds) claim();
    }
    if (step < kSteps - 1) continue;
    const bool filled = my_step == (step + 1) % kSteps && bytes > 0;
    if (filled) wait(&arrived[lane], phase);
    __syncwarp();
    const bool both_ways = __shfl_sync(0xffffffffu, claimed, 0) % 2 == 1;
    if (both_ways && !args.to_host) {
      timetable.begin_again();
    } else {
      timetable.wait(both_ways ? args.interval_beside_reads : 0);
    }
    if (filled) {
      copy_bulk_from_shared(target, shared_address(slot), bytes);
      phase ^= 1;
      bytes = 0;
    }
  }
  wait_bulk_copies();
  if (lane == 0) atomicSub(&moving_warps[args.to_host ? 1 : 0], 1);
  tables.finish();
#else
  __trap();  // chosen only where it has been built for sm_90 or later
#endif
}

int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// The architecture that the kernel which this device runs was built for: another device may run another.  Found out at
// the first call, which also makes all of a multiprocessor's memory shared memory as far as it may be.
int built_for_current_device() {
  static std::array<std::atomic<int>, 64> known;
  const int device = current_device();
  const bool kept = device < static_cast<int>(known.size());
  int built_for = kept ? known[static_cast<size_t>(device)].load(std::memory_order_relaxed) : 0;
  if (built_for == 0) {
    check_cuda(cudaFuncSetAttribute(swap_blocks_bulk_kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "cudaFuncSetAttribute");
    cudaFuncAttributes attributes = {};
    check_cuda(cudaFuncGetAttributes(&attributes, swap_blocks_bulk_kernel), "cudaFuncGetAttributes");
    built_for = attributes.ptxVersion;
    if (kept) known[static_cast<size_t>(device)].store(built_for, std::memory_order_relaxed);
  }
  return built_for;
}

}  // namespace

bool bulk_kernel_serves(const CopyBlocksParams &p, const BlockRuns &runs) {
  if (p.src_on_host == p.dst_on_host || runs.num_dims > 0 || widest_access(p, runs) < 16) return false;
  if (device_facts().compute_capability < 90) return false;
  return built_for_current_device() >= 90;
}

void swap_by_bulk_kernel(const CopyBlocksParams &p, const BlockRuns &runs, SwapPairs *pairs, int64_t num_warps,
                         cudaStream_t stream) {
  Args args = {};
  args.src_block_stride = p.src_block_stride * p.block.element_size;
  args.dst_block_stride = p.dst_block_stride * p.block.element_size;
  args.block_bytes = runs.run_bytes;
  args.to_host = p.dst_on_host;
  args.num_pairs = FastDivisor::of(checked_int(p.num_pairs, "block pairs"));
  const int64_t pieces_per_block = ceil_div(runs.run_bytes, kStepBytes);
  args.pieces_per_block = FastDivisor::of(checked_int(pieces_per_block, "pieces a block"));
  args.piece_bytes = static_cast<int>(round_up(ceil_div(runs.run_bytes, pieces_per_block), 16));
  args.lanes = std::clamp(kStepBytes / args.piece_bytes, 1, kMostLanes);
  const int pieces_of_a_warp = kSteps * args.lanes;
  const auto shared_bytes = static_cast<unsigned>(pieces_of_a_warp * args.piece_bytes);
  const int64_t num_pieces = p.num_caches * p.num_pairs * pieces_per_block;
  checked_int(num_pieces + pieces_of_a_warp, "pieces of 4 KB");
  args.num_pieces = static_cast<int>(num_pieces);
  const auto blocks = static_cast<unsigned>(std::min(ceil_div(num_pieces, pieces_of_a_warp), num_warps));
  const auto step_bytes = static_cast<unsigned>(args.lanes * args.piece_bytes);
  args.first_interval = blocks * step_bytes / kFirstRate;
  args.interval_beside_reads = blocks * step_bytes / kRateBesideReads;
  args.tables = pairs->to_be_brought(p);  // behind all checks: only the kernel gives the memory back
  launch_kernel({"swap_blocks_bulk_kernel", dim3(blocks), dim3(32), shared_bytes, stream, EarlyStart::kAlways},
                swap_blocks_bulk_kernel, args);
}

}  // namespace pagedattn::cuda
