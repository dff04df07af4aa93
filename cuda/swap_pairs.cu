// Memory through which the pairs and caches of a swap reach its kernels.
//
// SPDX-License-Identifier: Apache-2.0
//
// A call returns before its kernel has read the pairs, so each call has a buffer of its own, from a pool: those whose
// kernel has ended serve the next call.  None is freed, since there are only as many as calls have ever been under way
// together.  The addresses of the caches stand beside the pairs, because a launch takes longer the more arguments it
// has.
#include <algorithm>
#include <atomic>
#include <bit>
#include <list>
#include <mutex>
#include <new>
#include <utility>

#include "access.cuh"
#include "host_memory.h"
#include "index_checks.h"
#include "runtime.h"
#include "swap_pairs.h"

namespace pagedattn::cuda {

constexpr size_t kHeadBytes = 256;  // `done` in page-locked memory and zeros in the device's, before what is aligned so

// In use until a kernel has set `done`: to look there takes less time than to ask for an event.  The device's half
// comes with the first call that needs it.
struct PairBuffer {
  explicit PairBuffer(size_t bytes) : bytes(bytes) {
    const RelaxedCapture relaxed;
    void *memory = nullptr;
    check_cuda(cudaHostAlloc(&memory, kHeadBytes + bytes, cudaHostAllocPortable | cudaHostAllocMapped),
               "cudaHostAlloc");
    done = new (memory) std::atomic<uint32_t>(1);
    host = static_cast<char *>(memory) + kHeadBytes;
  }

  size_t bytes;
  std::atomic<uint32_t> *done;
  void *host;
  char *memory = nullptr;
  std::shared_ptr<Event> used = std::make_shared<Event>();
};

namespace {

struct Pool {
  std::mutex mutex;
  std::list<std::unique_ptr<PairBuffer>> buffers;
};

Pool &pool() {
  static auto *const all = new Pool;  // never destroyed: CUDA may be gone by then
  return *all;
}

std::unique_ptr<PairBuffer> take(size_t bytes) {
  Pool &all = pool();
  {
    const std::lock_guard lock(all.mutex);
    const auto serves = [&](const std::unique_ptr<PairBuffer> &buffer) {
      return buffer->used->of_current_device() && buffer->bytes >= bytes &&
             buffer->done->load(std::memory_order_acquire) != 0;
    };
    // The one that was used last, which caches know; or else those that have had most time to end.
    auto at = all.buffers.begin();
    if (at != all.buffers.end() && !serves(*at)) {
      at = all.buffers.end();
      for (auto behind = all.buffers.end(); behind != all.buffers.begin() && at == all.buffers.end();) {
        if (serves(*--behind)) at = behind;
      }
    }
    if (at != all.buffers.end()) {
      std::unique_ptr<PairBuffer> found = std::move(*at);
      all.buffers.erase(at);
      return found;
    }
  }
  constexpr size_t kLeastBytes = 64 * 1024;
  return std::make_unique<PairBuffer>(std::max(kLeastBytes, std::bit_ceil(bytes)));
}

// Of the caches, and of the pairs behind them.
size_t bytes_of(const CopyBlocksParams &p) {
  constexpr int64_t kGroupBytes = 16;
  const int64_t pair_bytes = p.num_pairs * 2 * packed_number_bytes(p);
  return static_cast<size_t>(p.num_caches) * sizeof(SwapCache) +
         static_cast<size_t>(ceil_div(pair_bytes, kGroupBytes) * kGroupBytes);
}

void give_back(std::unique_ptr<PairBuffer> buffer) {
  Pool &all = pool();
  const std::lock_guard lock(all.mutex);
  all.buffers.push_front(std::move(buffer));  // the next call's, for caches know it
}

}  // namespace

SwapPairs::SwapPairs(const CopyBlocksParams &params, cudaStream_t stream)
    : stream_(stream), num_caches_(params.num_caches), buffer_(take(bytes_of(params))) {}

SwapPairs::~SwapPairs() {
  try {
    end_of_use();
    give_back(std::move(buffer_));
  } catch (const std::exception &) {
    // A buffer whose use nobody can tell the end of serves no other call.
  }
}

void *SwapPairs::host() const { return static_cast<SwapCache *>(buffer_->host) + num_caches_; }

// The device's half, from now on used by the stream.
void SwapPairs::need_memory() {
  used_ = true;
  if (buffer_->memory != nullptr) return;
  const RelaxedCapture relaxed;
  void *memory = nullptr;
  check_cuda(cudaMalloc(&memory, kHeadBytes + buffer_->bytes), "cudaMalloc");
  const cudaError_t error = cudaMemsetAsync(memory, 0, kHeadBytes, stream_);
  if (error == cudaSuccess) {
    buffer_->memory = static_cast<char *>(memory);
    return;
  }
  cudaFree(memory);
  throw_cuda_error(error, "cudaMemsetAsync");
}

std::shared_ptr<Event> SwapPairs::end_of_use() {
  if (used_) buffer_->used->record(stream_);
  return std::exchange(used_, false) ? buffer_->used : nullptr;
}

SwapTables SwapPairs::to_be_brought(const CopyBlocksParams &p) {
  const auto bytes = static_cast<uint32_t>(checked_int(static_cast<int64_t>(bytes_of(p)), "bytes of block pairs"));
  need_memory();
  auto *const caches = static_cast<SwapCache *>(buffer_->host);
  for (int64_t i = 0; i < num_caches_; ++i) {
    caches[i] = {static_cast<const char *>(p.src[i]), static_cast<char *>(p.dst[i])};
  }
  SwapTables tables = {};
  tables.host = static_cast<const char *>(buffer_->host);
  tables.copy = buffer_->memory + kHeadBytes;
  tables.bytes = bytes;
  tables.pairs_begin = static_cast<uint32_t>(num_caches_ * static_cast<int64_t>(sizeof(SwapCache)));
  tables.number_bytes = packed_number_bytes(p);
  tables.zeros = reinterpret_cast<uint32_t *>(buffer_->memory);
  tables.done = reinterpret_cast<uint32_t *>(buffer_->done);
  buffer_->done->store(0, std::memory_order_relaxed);
  return tables;
}

SwapTables SwapPairs::copied(const CopyBlocksParams &p) {
  const SwapTables tables = to_be_brought(p);
  check_cuda(cudaMemcpyAsync(tables.copy, tables.host, tables.bytes, cudaMemcpyHostToDevice, stream_),
             "cudaMemcpyAsync");
  return tables;
}

}  // namespace pagedattn::cuda
