// Checked mode: index values of a CUDA call, judged on the host before anything is launched.
//
// SPDX-License-Identifier: Apache-2.0
//
// The index arrays are copied to the host, a copy of the call's parameters is pointed at them, and the functions that
// serve the CPU backend look at them.  This waits for the stream, which is what checked mode costs anyway: the error
// must be known before the call returns.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda_backend.h"
#include "host_memory.h"
#include "index_checks.h"
#include "runtime.h"
#include "status.h"

namespace pagedattn::cuda {
namespace {

// Copies index arrays from the device.  The pointers it gives out are good for its lifetime, once it has waited.
class IndexReader {
 public:
  IndexReader(const char *operation, void *stream) : stream_(static_cast<cudaStream_t>(stream)) {
    if (!is_capturing(stream_)) return;
    throw_invalid(
        std::string(operation) +
        ": checked mode cannot run while the stream is being captured; pass `check` = 0 (False) for calls that "
        "are captured");
  }

  IndexReader(const IndexReader &) = delete;
  IndexReader &operator=(const IndexReader &) = delete;

  // `count` numbers; null stays null.
  const int32_t *read(const int32_t *device, int64_t count) { return read_rows(device, 1, count, count); }

  const int64_t *read(const int64_t *device, int64_t count) {
    auto &host = arrays64_.emplace_back(static_cast<size_t>(count));
    copy(host.data(), device, host.size() * sizeof(int64_t));
    return host.data();
  }

  // Rows that lie `row_stride` apart on the device and come to lie `row_length` apart.
  const int32_t *read_rows(const int32_t *device, int64_t num_rows, int64_t row_length, int64_t row_stride) {
    if (device == nullptr) return nullptr;
    auto &host = arrays32_.emplace_back(static_cast<size_t>(num_rows * row_length));
    const size_t row_bytes = static_cast<size_t>(row_length) * sizeof(int32_t);
    if (num_rows == 1 || row_stride == row_length) {
      copy(host.data(), device, host.size() * sizeof(int32_t));
    } else if (row_stride > row_length && !host.empty()) {
      check_cuda(cudaMemcpy2DAsync(host.data(), row_bytes, device, static_cast<size_t>(row_stride) * sizeof(int32_t),
                                   row_bytes, static_cast<size_t>(num_rows), cudaMemcpyDeviceToHost, stream_),
                 "cudaMemcpy2DAsync");
    } else {
      // Broadcast or reversed rows, which no pitch describes.
      for (int64_t row = 0; row < num_rows; ++row) {
        copy(host.data() + row * row_length, device + row * row_stride, row_bytes);
      }
    }
    return host.data();
  }

  void wait() { check_cuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  void copy(void *host, const void *device, size_t bytes) {
    if (bytes == 0) return;
    check_cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
  }

  cudaStream_t stream_;
  // A vector that is moved keeps its memory, so these may grow.
  std::vector<std::vector<int32_t>> arrays32_;
  std::vector<std::vector<int64_t>> arrays64_;
};

}  // namespace

std::string check_attention(const AttentionParams &params, void *stream) {
  IndexReader reader("paged_attention", stream);
  AttentionParams host = params;
  host.seq_lens = reader.read(params.seq_lens, params.num_seqs);
  host.query_start_loc = reader.read(params.query_start_loc, int64_t{params.num_seqs} + 1);
  host.block_tables =
      reader.read_rows(params.block_tables, params.num_seqs, params.max_blocks_per_seq, params.block_table_stride);
  host.block_table_stride = params.max_blocks_per_seq;
  reader.wait();
  return attention_index_error(host);
}

std::string check_reshape_and_cache(const ReshapeAndCacheParams &params, void *stream) {
  IndexReader reader("reshape_and_cache", stream);
  ReshapeAndCacheParams host = params;
  host.slot_mapping = reader.read(params.slot_mapping, params.num_tokens);
  reader.wait();
  return reshape_and_cache_index_error(host);
}

std::string check_rope_and_cache(const RopeAndCacheParams &params, void *stream) {
  IndexReader reader("rope_and_cache", stream);
  RopeAndCacheParams host = params;
  host.write.slot_mapping = reader.read(params.write.slot_mapping, params.write.num_tokens);
  if (params.long_positions) {
    host.positions = reader.read(static_cast<const int64_t *>(params.positions), params.write.num_tokens);
  } else {
    host.positions = reader.read(static_cast<const int32_t *>(params.positions), params.write.num_tokens);
  }
  reader.wait();
  return rope_and_cache_index_error(host);
}

std::string check_copy_blocks(const CopyBlocksParams &params, void *stream) {
  IndexReader reader("copy_blocks", stream);
  CopyBlocksParams host = params;
  host.mapping = reader.read(params.mapping, 2 * params.num_pairs);
  reader.wait();
  return copy_blocks_index_error(host);
}

std::string check_gather_kv(const GatherKvParams &params, void *stream) {
  IndexReader reader("gather_kv", stream);
  GatherKvParams host = params;
  host.seq_lens = reader.read(params.seq_lens, params.num_seqs);
  host.seq_starts = reader.read(params.seq_starts, params.num_seqs);
  host.out_start_loc = reader.read(params.out_start_loc, int64_t{params.num_seqs} + 1);
  host.block_tables =
      reader.read_rows(params.block_tables, params.num_seqs, params.max_blocks_per_seq, params.block_table_stride);
  host.block_table_stride = params.max_blocks_per_seq;
  reader.wait();
  return gather_kv_index_error(host);
}

}  // namespace pagedattn::cuda
