// The CPU backend's threads where memory runs out while they are started, at each allocation in turn: all tasks are
// done by those there are, or the call throws and the next one succeeds.
//
// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <new>

#include "cpu/backend.h"
#include "cpu/thread_pool.h"
#include "failing_new.h"

int main() {
  using namespace pagedattn::cpu;
  constexpr int64_t kTasks = 64;
  bool out_of_memory = true;
  for (int64_t failing = 0; out_of_memory; ++failing) {
    // Another number than before, so that all threads are started anew.
    set_num_threads(static_cast<int>(4 + failing % 2));
    std::atomic<int64_t> done{0};
    bool threw = false;
    allocations_left = failing;
    try {
      parallel_for(kTasks, [&](int64_t, int) { ++done; });
    } catch (const std::bad_alloc &) {
      threw = true;
    }
    out_of_memory = allocations_left < 0;
    allocations_left = -1;
    if (done != (threw ? 0 : kTasks)) {
      std::printf("without allocation %d: %d tasks were done\n", static_cast<int>(failing), static_cast<int>(done));
      return 1;
    }
  }
  std::puts("all hold");
  return 0;
}
