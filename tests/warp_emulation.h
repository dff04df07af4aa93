// A block of CUDA threads on the host, as far as the cursor over a batch's work needs one: threads are fibers that go
// on in turn, and those of a warp or of the block wait for each other where device code makes them.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __CUDACC__
#define __host__
#define __device__

namespace emulation {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kMaxWarps = 32;

struct Fiber {
  ucontext_t context;
  char stack[kStackBytes];
  bool done;
};

// Threads that meet: each waits until as many have come as there are.
struct Meeting {
  int arrived = 0;
  int number = 0;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> body;
  ucontext_t host;
  int num_threads = 0;
  int thread = 0;  // whose turn it is
  Meeting of_block;
  Meeting of_warp[kMaxWarps];
  uint64_t values[kMaxWarps][32];  // that the lanes of a warp show each other
};
inline Block block;

struct Index {
  unsigned x;
};

inline int warp() { return block.thread / 32; }
inline int lane() { return block.thread % 32; }

}  // namespace emulation

inline emulation::Index threadIdx, blockIdx, gridDim;

namespace emulation {

inline void let_others_go_on() {
  Fiber &fiber = *block.fibers[static_cast<size_t>(block.thread)];
  swapcontext(&fiber.context, &block.host);
}

inline void meet(Meeting &meeting, int threads) {
  const int number = meeting.number;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.number;
  }
  while (meeting.number == number) let_others_go_on();
}

inline void run_thread() {
  block.body();
  block.fibers[static_cast<size_t>(block.thread)]->done = true;
  let_others_go_on();
}

// Runs the body in so many threads, a multiple of 32.
inline void run(int num_threads, std::function<void()> body) {
  block.num_threads = num_threads;
  block.body = std::move(body);
  while (block.fibers.size() < static_cast<size_t>(num_threads)) block.fibers.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < num_threads; ++i) {
    Fiber &fiber = *block.fibers[static_cast<size_t>(i)];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.done = false;
    makecontext(&fiber.context, run_thread, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (int i = 0; i < num_threads; ++i) {
      Fiber &fiber = *block.fibers[static_cast<size_t>(i)];
      if (fiber.done) continue;
      any = true;
      block.thread = i;
      threadIdx.x = static_cast<unsigned>(i);
      swapcontext(&block.host, &fiber.context);
    }
  }
}

// What the lane `from` of the thread's warp shows.
template <class T>
T exchange(T value, int from) {
  std::memcpy(&block.values[warp()][lane()], &value, sizeof value);
  meet(block.of_warp[warp()], 32);
  std::memcpy(&value, &block.values[warp()][from], sizeof value);
  meet(block.of_warp[warp()], 32);
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::block.of_block, emulation::block.num_threads); }
inline void __syncwarp() { emulation::meet(emulation::block.of_warp[emulation::warp()], 32); }

template <class T>
T __shfl_sync(uint32_t, T value, int from) {
  return emulation::exchange(value, from % 32);
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int bits) {
  return emulation::exchange(value, emulation::lane() ^ bits);
}
template <class T>
T __shfl_up_sync(uint32_t, T value, int distance) {
  const int lane = emulation::lane();
  return emulation::exchange(value, lane >= distance ? lane - distance : lane);
}
inline uint32_t __ballot_sync(uint32_t, bool holds) {
  uint32_t all = holds ? 1u << emulation::lane() : 0u;
  for (int bits = 16; bits > 0; bits /= 2) all |= __shfl_xor_sync(~0u, all, bits);
  return all;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
