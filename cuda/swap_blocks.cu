// swap_blocks: blocks copied between host and device, or within a device, by the way that suits them.
//
// SPDX-License-Identifier: Apache-2.0
//
// The pairs are known on the host.  Where a few large copies do, the copy engines get them, and no multiprocessor has
// to do with it: pairs that step by one block in source and destination alike make one copy, plain where their blocks
// touch, two-dimensional where a gap follows each block.  Scattered blocks would take a copy each, a microsecond or two
// of the host's time and of the engine's; those go to a kernel that reads and writes page-locked memory by itself, by
// bulk copies (swap_bulk.cu) or plain accesses (swap_kernel.cu).  Staging them in contiguous memory would leave it to
// the host to scatter them there, block by block.  What a kernel cannot reach, pageable memory, takes a copy a run,
// through the driver's own buffers, and so does a swap that is being captured, because a graph keeps the addresses of
// its copies but not a buffer of pairs.
//
// PAGEDATTN_SWAP = bulk, kernel, memcpy or batch (cudaMemcpyBatchAsync) takes the choice away where the memory is
// page-locked, to compare them; bulk:N and kernel:N have N warps.  What bulk copies cannot serve goes to the kernel.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <string>
#include <vector>

#include "access.cuh"
#include "block_runs.h"
#include "cuda_backend.h"
#include "host_memory.h"
#include "index_checks.h"
#include "runtime.h"
#include "status.h"
#include "swap_kernel.h"
#include "swap_pairs.h"

namespace pagedattn::cuda {
namespace {

constexpr int64_t kMaxPitch = 0x7fffffff;  // cudaDevAttrMaxPitch of every device so far
// So many copies are enqueued in less time than preparing the kernel takes: 2.5 us each, of some 15.
constexpr int64_t kFewCopies = 5;
// Warps of the kernel that copies by plain accesses.  Within the device nothing is to be left to others.  To and from
// the host, more would be little faster alone, and decode beside them slower: on an H100 it keeps 89 to 92 % of its
// speed beside 66 warps that read from the host, 89 beside 132.  Writes to the host are not waited for, so that too
// many fill queues which all others stand in too: 91 to 98 % beside 24 warps, 90 to 93 beside 33, 76 beside 66, 23
// beside 132.
int64_t kernel_warps(const CopyBlocksParams &p) {
  const int64_t multiprocessors = device_facts().num_multiprocessors;
  if (p.src_on_host) return std::max<int64_t>(multiprocessors / 2, 1);
  if (p.dst_on_host) return std::max<int64_t>(multiprocessors * 3 / 16, 1);
  return 24 * multiprocessors;
}
// And of the one that copies in bulk, which paces itself: as many as the bus needs for both directions at once.
int64_t bulk_warps() { return std::max<int64_t>(device_facts().num_multiprocessors / 4, 1); }

// ---- by copies ------------------------------------------------------------------------------------------------------

struct Copy {
  char *dst;
  const char *src;
  int64_t bytes;
};

void enqueue(const Copy &copy, cudaStream_t stream) {
  check_cuda(cudaMemcpyAsync(copy.dst, copy.src, static_cast<size_t>(copy.bytes), cudaMemcpyDefault, stream),
             "cudaMemcpyAsync");
}

// `dim.extent` copies, the strides of `dim` apart.
void enqueue(Copy copy, const RunDim &dim, cudaStream_t stream) {
  if (dim.extent == 1) return enqueue(copy, stream);
  if (dim.src_stride == copy.bytes && dim.dst_stride == copy.bytes) {
    copy.bytes *= dim.extent;
    return enqueue(copy, stream);
  }
  const auto fits_pitch = [&copy](int64_t stride) { return stride >= copy.bytes && stride <= kMaxPitch; };
  if (fits_pitch(dim.src_stride) && fits_pitch(dim.dst_stride)) {
    return check_cuda(
        cudaMemcpy2DAsync(copy.dst, static_cast<size_t>(dim.dst_stride), copy.src, static_cast<size_t>(dim.src_stride),
                          static_cast<size_t>(copy.bytes), static_cast<size_t>(dim.extent), cudaMemcpyDefault, stream),
        "cudaMemcpy2DAsync");
  }
  for (int64_t i = 0; i < dim.extent; ++i) {
    enqueue({copy.dst + i * dim.dst_stride, copy.src + i * dim.src_stride, copy.bytes}, stream);
  }
}

// One block, run by run.
template <class Visit>
void visit_strided_block(char *dst, const char *src, const BlockRuns &runs, Visit visit) {
  const RunDim &inner = runs.dims[0];
  for (int64_t i = 0; i < runs.dims[3].extent; ++i) {
    for (int64_t j = 0; j < runs.dims[2].extent; ++j) {
      for (int64_t k = 0; k < runs.dims[1].extent; ++k) {
        const int64_t dst_offset =
            i * runs.dims[3].dst_stride + j * runs.dims[2].dst_stride + k * runs.dims[1].dst_stride;
        const int64_t src_offset =
            i * runs.dims[3].src_stride + j * runs.dims[2].src_stride + k * runs.dims[1].src_stride;
        visit(Copy{dst + dst_offset, src + src_offset, runs.run_bytes}, inner);
      }
    }
  }
}

// How many pairs from `first` on step by one block in source and destination.
int64_t consecutive_pairs(const CopyBlocksParams &p, int64_t first) {
  int64_t count = 1;
  while (first + count < p.num_pairs && p.mapping[2 * (first + count)] == p.mapping[2 * first] + count &&
         p.mapping[2 * (first + count) + 1] == p.mapping[2 * first + 1] + count) {
    ++count;
  }
  return count;
}

// Calls visit(copy, dim) for copies that make up the swap, each of which is repeated along `dim`.
template <class Visit>
void visit_copies(const CopyBlocksParams &p, const BlockRuns &runs, Visit visit) {
  const int64_t src_block_bytes = p.src_block_stride * p.block.element_size;
  const int64_t dst_block_bytes = p.dst_block_stride * p.block.element_size;
  for (int64_t cache = 0; cache < p.num_caches; ++cache) {
    const auto *src_base = static_cast<const char *>(p.src[cache]);
    auto *dst_base = static_cast<char *>(p.dst[cache]);
    for (int64_t pair = 0; pair < p.num_pairs;) {
      const int64_t count = consecutive_pairs(p, pair);
      const char *src = src_base + p.mapping[2 * pair] * src_block_bytes;
      char *dst = dst_base + p.mapping[2 * pair + 1] * dst_block_bytes;
      if (runs.num_dims == 0) {
        visit(Copy{dst, src, runs.run_bytes}, RunDim{count, src_block_bytes, dst_block_bytes});
      } else {
        for (int64_t i = 0; i < count; ++i) {
          visit_strided_block(dst + i * dst_block_bytes, src + i * src_block_bytes, runs, visit);
        }
      }
      pair += count;
    }
  }
}

// Whether the copies number at most kFewCopies, found out by looking at no more pairs than that takes.
bool takes_few_copies(const CopyBlocksParams &p, const BlockRuns &runs) {
  if (p.num_caches > kFewCopies || runs.num_dims > 0) return false;
  int64_t copies = 0;
  for (int64_t pair = 0; pair < p.num_pairs; pair += consecutive_pairs(p, pair)) {
    copies += p.num_caches;
    if (copies > kFewCopies) return false;
  }
  return true;
}

void swap_by_memcpy(const CopyBlocksParams &p, const BlockRuns &runs, cudaStream_t stream) {
  visit_copies(p, runs, [stream](const Copy &copy, const RunDim &dim) { enqueue(copy, dim, stream); });
}

#if CUDART_VERSION >= 12080
void swap_by_batch(const CopyBlocksParams &p, const BlockRuns &runs, cudaStream_t stream) {
  std::vector<void *> dst;
  std::vector<const void *> src;
  std::vector<size_t> bytes;
  visit_copies(p, runs, [&](const Copy &copy, const RunDim &dim) {
    const bool touch = dim.src_stride == copy.bytes && dim.dst_stride == copy.bytes;
    for (int64_t i = 0; i < (touch ? 1 : dim.extent); ++i) {
      dst.push_back(copy.dst + i * dim.dst_stride);
      src.push_back(copy.src + i * dim.src_stride);
      bytes.push_back(static_cast<size_t>(touch ? copy.bytes * dim.extent : copy.bytes));
    }
  });
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  size_t first = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaMemcpyBatchAsync(dst.data(), src.data(), bytes.data(), bytes.size(), &attributes, &first, 1, stream);
#else
  size_t failed = 0;
  const cudaError_t error = cudaMemcpyBatchAsync(dst.data(), const_cast<void **>(src.data()), bytes.data(),
                                                 bytes.size(), &attributes, &first, 1, &failed, stream);
#endif
  check_cuda(error, "cudaMemcpyBatchAsync");
}
#else
void swap_by_batch(const CopyBlocksParams &, const BlockRuns &, cudaStream_t) {
  throw Error(PA_ERROR_UNSUPPORTED, "PAGEDATTN_SWAP=batch needs a build with CUDA 12.8 or later");
}
#endif

// ---- what is to be swapped ------------------------------------------------------------------------------------------

// The caches of one side in host memory: whether the device reaches them, and the allocations that hold them.
class HostSide {
 public:
  HostSide(const CopyBlocksParams &p, void *const *caches, const int64_t *strides, int64_t block_stride,
           int64_t num_blocks) {
    int64_t last = (num_blocks - 1) * block_stride;
    for (int d = 0; d < p.block.ndim; ++d) last += (p.block.shape[d] - 1) * strides[d];
    const int64_t last_byte = (last + 1) * p.block.element_size - 1;
    for (int64_t i = 0; i < p.num_caches; ++i) {
      auto *const data = static_cast<char *>(caches[i]);
      void *mapped = data;
      const bool known = !allocations_.empty() && allocations_.back()->holds(data);
      if (auto allocation = known ? nullptr : find_host_allocation(data)) {
        allocations_.push_back(std::move(allocation));
      } else if (!known) {
        // Memory that others have locked may be so in part.
        mapped = device_address(data);
        if (device_address(data + last_byte) == nullptr) mapped = nullptr;
      }
      mapped_.push_back(mapped);
      reachable_ = reachable_ && mapped != nullptr;
    }
  }

  bool reachable() const { return reachable_; }
  void *const *mapped() const { return mapped_.data(); }
  // By the call of `pairs`, on `stream`.
  void used(SwapPairs *pairs, cudaStream_t stream) const {
    const std::shared_ptr<Event> end = pairs->end_of_use();
    for (const auto &allocation : allocations_) {
      end != nullptr ? allocation->used_until(end) : allocation->used_on(stream);
    }
  }

 private:
  // Null for memory that is not page-locked.
  static void *device_address(const void *host) {
    cudaPointerAttributes attributes;
    check_cuda(cudaPointerGetAttributes(&attributes, host), "cudaPointerGetAttributes");
    return attributes.devicePointer;
  }

  std::vector<void *> mapped_;
  std::vector<std::shared_ptr<HostAllocation>> allocations_;
  bool reachable_ = true;
};

// Tells the host's allocations at the end of a call, even one that fails half way, that the stream uses them.
class UseOnStream {
 public:
  UseOnStream(const std::vector<HostSide> &sides, SwapPairs *pairs, cudaStream_t stream, bool capturing)
      : sides_(sides), pairs_(pairs), stream_(stream), capturing_(capturing) {}
  ~UseOnStream() {
    if (capturing_) return;  // nothing runs yet, and when a graph will is its owner's to know
    try {
      for (const HostSide &side : sides_) side.used(pairs_, stream_);
    } catch (const std::exception &) {
      const RelaxedCapture relaxed;
      cudaStreamSynchronize(stream_);
    }
  }
  UseOnStream(const UseOnStream &) = delete;
  UseOnStream &operator=(const UseOnStream &) = delete;

 private:
  const std::vector<HostSide> &sides_;
  SwapPairs *pairs_;
  cudaStream_t stream_;
  bool capturing_;
};

// ---- the choice -----------------------------------------------------------------------------------------------------

enum class Way { kBulk, kKernel, kMemcpy, kBatch };

struct Choice {
  Way way;
  int64_t num_warps;
};

// Of the way's kernel, as many warps as `value` asks for behind `name`: "name" or "name:N".  0 if it is another's.
int64_t warps_of(const std::string &value, const std::string &name, int64_t otherwise) {
  if (value == name) return otherwise;
  if (!value.starts_with(name + ":")) return 0;
  int count = 0;
  const char *const first = value.data() + name.size() + 1, *const last = value.data() + value.size();
  const auto [end, error] = std::from_chars(first, last, count);
  return error == std::errc() && end == last && count >= 1 && count <= 0xffff ? count : 0;
}

Choice choose(const CopyBlocksParams &p, const BlockRuns &runs) {
  const char *const value = std::getenv("PAGEDATTN_SWAP");
  const std::string forced = value == nullptr ? "" : value;
  if (forced == "memcpy" || (forced.empty() && takes_few_copies(p, runs))) return {Way::kMemcpy, 0};
  if (forced == "batch") return {Way::kBatch, 0};
  checked_int(std::max(p.num_src_blocks, p.num_dst_blocks), "blocks");  // as the kernels' pairs have them
  if (const int64_t count = warps_of(forced, "kernel", kernel_warps(p))) return {Way::kKernel, count};
  if (const int64_t count = forced.empty() ? bulk_warps() : warps_of(forced, "bulk", bulk_warps())) {
    return bulk_kernel_serves(p, runs) ? Choice{Way::kBulk, count} : Choice{Way::kKernel, kernel_warps(p)};
  }
  throw_invalid(
      "PAGEDATTN_SWAP: must be bulk, kernel, memcpy or batch, or bulk:N or kernel:N with 1 <= N <= 65535; got `" +
      forced + "`");
}

const char *swap(const CopyBlocksParams &p, const BlockRuns &runs, SwapPairs *pairs, bool reachable, bool capturing,
                 cudaStream_t stream) {
  if (!reachable) {
    swap_by_memcpy(p, runs, stream);
    return "cuda::swap_blocks_pageable";
  }
  const Choice choice = capturing ? Choice{Way::kMemcpy, 0} : choose(p, runs);
  switch (choice.way) {
    case Way::kBulk:
      swap_by_bulk_kernel(p, runs, pairs, choice.num_warps, stream);
      return "cuda::swap_blocks_bulk";
    case Way::kKernel:
      swap_by_kernel(p, runs, pairs, choice.num_warps, stream);
      return "cuda::swap_blocks_kernel";
    case Way::kBatch:
      swap_by_batch(p, runs, stream);
      return "cuda::swap_blocks_batch";
    case Way::kMemcpy:
      break;
  }
  swap_by_memcpy(p, runs, stream);
  return "cuda::swap_blocks_memcpy";
}

}  // namespace

void swap_blocks(const CopyBlocksParams &params, void *stream_pointer) {
  const BlockRuns runs = runs_of(params.block);
  auto *stream = static_cast<cudaStream_t>(stream_pointer);
  CopyBlocksParams p = params;
  const char *name = "cuda::swap_blocks_memcpy";
  if (p.num_pairs > 0) {
    SwapPairs pairs(p, stream);
    if (const std::string fault = swap_blocks_index_error(p, pairs.host()); !fault.empty()) {
      throw_invalid("swap_blocks: " + fault);
    }
    if (runs.run_bytes > 0) {
      std::vector<HostSide> sides;
      if (p.src_on_host) {
        sides.emplace_back(p, p.src, p.block.src_strides, p.src_block_stride, p.num_src_blocks);
        p.src = sides.back().mapped();
      } else if (p.dst_on_host) {
        sides.emplace_back(p, p.dst, p.block.dst_strides, p.dst_block_stride, p.num_dst_blocks);
        p.dst = sides.back().mapped();
      }
      const bool reachable = sides.empty() || sides.back().reachable();
      const bool capturing = is_capturing(stream);
      const UseOnStream use(sides, &pairs, stream, capturing);
      name = swap(reachable ? p : params, runs, &pairs, reachable, capturing, stream);
    }
  }
  if (p.event != nullptr) check_cuda(cudaEventRecord(static_cast<cudaEvent_t>(p.event), stream), "cudaEventRecord");
  record_kernel("swap_blocks", name);
}

}  // namespace pagedattn::cuda
