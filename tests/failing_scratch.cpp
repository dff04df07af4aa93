// Attention on the CPU where a thread gets no memory for its work: what others cannot do the caller does, with the same
// bits; and where the caller itself gets none, the call fails before anything is written.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <pagedattn/pagedattn.hpp>
#include <thread>
#include <vector>

namespace pa = pagedattn;
using pa::tensor;

namespace {

constexpr std::size_t kLarge = 64 * 1024;  // bytes: no other allocation of an aligned block is as large
std::atomic<bool> scarce{false};
std::atomic<int> refused{0};
thread_local bool has_memory = false;

constexpr std::int64_t kSeqs = 16, kLength = 512, kBlockSize = 16, kHeads = 4, kDim = 64;
constexpr std::int64_t kBlocks = kSeqs * kLength / kBlockSize;

}  // namespace

// Not inlined, since compilers then take aligned_alloc and delete for a pair that does not match.
[[gnu::noinline]] void *operator new(std::size_t size, std::align_val_t alignment,
                                     const std::nothrow_t & /*tag*/) noexcept {
  if (scarce && !has_memory && size >= kLarge) {
    ++refused;
    return nullptr;
  }
  const auto to = static_cast<std::size_t>(alignment);
  return std::aligned_alloc(to, (size + to - 1) / to * to);
}
[[gnu::noinline]] void operator delete(void *memory, std::align_val_t) noexcept { std::free(memory); }

int main() {
  std::vector<float> q(kSeqs * kHeads * kDim), k(kBlocks * kBlockSize * kHeads * kDim), v(k.size());
  for (auto *array : {&q, &k, &v}) {
    for (std::size_t i = 0; i < array->size(); ++i) (*array)[i] = static_cast<float>(i * 7919 % 2003) / 1001.0f - 1.0f;
  }
  std::vector<std::int32_t> table(kBlocks), lengths(kSeqs, static_cast<std::int32_t>(kLength));
  std::iota(table.begin(), table.end(), 0);
  const auto attend = [&](std::vector<float> &out) {
    const pa::PagedCache<float> cache{tensor(k.data(), {kBlocks, kBlockSize, kHeads, kDim}),
                                      tensor(v.data(), {kBlocks, kBlockSize, kHeads, kDim})};
    pa::AttentionOptions options;
    options.deterministic = true;
    pa::paged_attention(tensor(q.data(), {kSeqs, kHeads, kDim}), cache,
                        tensor(table.data(), {kSeqs, kLength / kBlockSize}), tensor(lengths.data(), {kSeqs}),
                        tensor(out.data(), {kSeqs, kHeads, kDim}), options);
  };
  has_memory = true;
  std::vector<float> expected(q.size()), out(q.size());
  pa_set_num_threads(1, nullptr);
  attend(expected);

  // New threads, which have no memory yet.
  scarce = true;
  pa_set_num_threads(4, nullptr);
  for (int round = 0; round < 100; ++round) {
    std::fill(out.begin(), out.end(), -1.0f);
    attend(out);
    if (out != expected) return std::puts("others without memory: other results"), 1;
  }
  if (refused == 0) return std::puts("others without memory: none asked for any"), 1;

  // A caller without memory.
  std::fill(out.begin(), out.end(), -1.0f);
  bool threw = false;
  std::thread([&] {
    try {
      attend(out);
    } catch (const pa::Error &) {
      threw = true;
    }
  }).join();
  if (!threw || std::any_of(out.begin(), out.end(), [](float x) { return x != -1.0f; })) {
    return std::puts("a caller without memory: written"), 1;
  }
  std::puts("all hold");
  return 0;
}
