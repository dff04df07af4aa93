// gather_kv: pages back to contiguous rows, dequantised where the output is wider than the cache.
//
// SPDX-License-Identifier: Apache-2.0
//
// A thread block owns a few neighbouring output rows, so work is even however the lengths vary and the host needs to
// know none of them.  It first finds which token each of its rows holds: it walks over the sequences, as many at a time
// as it has threads, puts the first row of each into shared memory (read from out_start_loc, or summed from the
// lengths) and lets one thread a row search there.  Then all threads copy: 16-byte accesses on the wider side where
// addresses and strides allow, one key and one value under way a thread.
//
// Bound by memory; the walk costs one coalesced pass over seq_lens a thread block, hidden by the blocks beside it.
// A row is written only if a token lands there and its table entry names a block.
#include "cache_rows.cuh"
#include "cuda_backend.h"
#include "runtime.h"

namespace pagedattn::cuda {
namespace {

constexpr int kRowsPerBlock = 16;
constexpr int kWarps = kThreadsPerBlock / 32;

struct Args {
  CacheRows k_cache;
  CacheRows v_cache;
  TokenRows k_out;
  TokenRows v_out;
  Scale k_scale;
  Scale v_scale;
  const int32_t *block_tables;
  int64_t block_table_stride;
  const int32_t *seq_lens;
  const int32_t *seq_starts;
  const int32_t *out_start_loc;
  int64_t num_rows;
  int64_t num_blocks;
  int64_t max_seq_len;
  int32_t num_seqs;
  int32_t block_size;
  unsigned accesses_per_head;
  unsigned accesses_per_token;
  unsigned lanes_per_row;
};

// The tokens [first, first + count) of a sequence, whatever the arrays hold within what the block table covers.
struct TokenRange {
  int64_t first;
  int64_t count;
};

__device__ TokenRange tokens_to_gather(const Args &args, int64_t seq) {
  const int64_t end = min(max(int64_t{args.seq_lens[seq]}, int64_t{0}), args.max_seq_len);
  const int64_t start = args.seq_starts == nullptr ? 0 : args.seq_starts[seq];
  const int64_t first = min(max(start, int64_t{0}), end);
  return {first, end - first};
}

// The sum of `value` over the threads before this one; `total` becomes the sum over all.
__device__ int64_t exclusive_sum(int64_t value, int64_t *total) {
  __shared__ int64_t warp_sums[kWarps];
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  int64_t inclusive = value;
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const int64_t before = __shfl_up_sync(0xffffffffu, inclusive, distance);
    if (lane >= distance) inclusive += before;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int64_t earlier_warps = 0;
  *total = 0;
#pragma unroll
  for (unsigned w = 0; w < kWarps; ++w) {
    if (w == warp) earlier_warps = *total;
    *total += warp_sums[w];
  }
  __syncthreads();  // warp_sums is free for the next call.
  return earlier_warps + inclusive - value;
}

// The last index whose value is at most `row`, or -1.
__device__ int last_at_most(const int64_t *values, int64_t row) {
  int low = -1;
  int high = kThreadsPerBlock;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (values[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct CacheToken {
  int64_t block;  // -1: none
  int64_t offset;
};

__device__ CacheToken locate(const Args &args, int64_t seq, int64_t row_of_seq) {
  const TokenRange tokens = tokens_to_gather(args, seq);
  if (row_of_seq >= tokens.count) return {-1, 0};
  const int64_t token = tokens.first + row_of_seq;
  const int64_t index = quotient(token, args.block_size);
  const int64_t block = args.block_tables[seq * args.block_table_stride + index];
  if (block < 0 || block >= args.num_blocks) return {-1, 0};
  return {block, token - index * args.block_size};
}

// Fills `sources` for the rows from `tile_start` on.
__device__ void find_sources(const Args &args, int64_t tile_start, CacheToken *sources) {
  __shared__ int64_t first_rows[kThreadsPerBlock];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = tile_start + thread;
  const bool has_row = thread < kRowsPerBlock && row < args.num_rows;
  if (thread < kRowsPerBlock) sources[thread] = {-1, 0};

  int64_t rows_before = 0;
  for (int64_t seqs_start = 0; seqs_start < args.num_seqs; seqs_start += kThreadsPerBlock) {
    const int64_t seq = seqs_start + thread;
    const bool has_seq = seq < args.num_seqs;
    if (args.out_start_loc != nullptr) {
      // Threads past the last sequence stand behind every row.
      first_rows[thread] = has_seq ? int64_t{args.out_start_loc[seq]} : INT64_MAX;
    } else {
      int64_t total = 0;
      const int64_t before = exclusive_sum(has_seq ? tokens_to_gather(args, seq).count : 0, &total);
      first_rows[thread] = has_seq ? rows_before + before : INT64_MAX;
      rows_before += total;
    }
    __syncthreads();
    if (has_row) {
      const int found = last_at_most(first_rows, row);
      if (found >= 0) {
        const CacheToken source = locate(args, seqs_start + found, row - first_rows[found]);
        if (source.block >= 0) sources[thread] = source;
      }
    }
    const bool past_tile = first_rows[kThreadsPerBlock - 1] >= tile_start + kRowsPerBlock;
    __syncthreads();  // first_rows is free for the next sequences, and sources is complete after the last.
    if (past_tile) break;
  }
}

template <class Convert>
__global__ void __launch_bounds__(kThreadsPerBlock) gather_kv_kernel(const __grid_constant__ Args args) {
  using From = typename Convert::From;
  using To = typename Convert::To;
  __shared__ CacheToken sources[kRowsPerBlock];
  const int64_t tile_start = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock;
  find_sources(args, tile_start, sources);

  const unsigned rows_at_once = kThreadsPerBlock / args.lanes_per_row;
  const unsigned lane = threadIdx.x % args.lanes_per_row;
  const unsigned first_row = threadIdx.x / args.lanes_per_row;
  if (first_row >= rows_at_once) return;
  for (unsigned r = first_row; r < kRowsPerBlock; r += rows_at_once) {
    const CacheToken source = sources[r];
    if (source.block < 0) continue;
    for (unsigned i = lane; i < args.accesses_per_token; i += args.lanes_per_row) {
      const unsigned head = i / args.accesses_per_head;
      const unsigned access = i - head * args.accesses_per_head;
      const From key = reinterpret_cast<const From *>(args.k_cache.head(source.block, source.offset, head))[access];
      const From value = reinterpret_cast<const From *>(args.v_cache.head(source.block, source.offset, head))[access];
      const float k_scale = Convert::kScaled ? scale_of(args.k_scale, head) : 1.0f;
      const float v_scale = Convert::kScaled ? scale_of(args.v_scale, head) : 1.0f;
      reinterpret_cast<To *>(args.k_out.head(tile_start + r, head))[access] = Convert::apply(key, k_scale);
      reinterpret_cast<To *>(args.v_out.head(tile_start + r, head))[access] = Convert::apply(value, v_scale);
    }
  }
}

template <class Convert>
void launch(Args args, int64_t head_bytes, int64_t num_heads, cudaStream_t stream, const char *name) {
  const int64_t accesses_per_head = head_bytes / static_cast<int64_t>(sizeof(typename Convert::From));
  args.accesses_per_head = checked_unsigned(accesses_per_head, "elements a head");
  args.accesses_per_token = checked_unsigned(accesses_per_head * num_heads, "elements a token");
  args.lanes_per_row = lanes_for_row(args.accesses_per_token);
  const unsigned blocks = blocks_over_rows(args.num_rows, kRowsPerBlock);
  gather_kv_kernel<Convert><<<blocks, kThreadsPerBlock, 0, stream>>>(args);
  check_launch(name);
  record_kernel("gather_kv", name);
}

Args launch_arguments(const GatherKvParams &p) {
  Args args = {};
  args.k_cache = cache_rows(p.k_cache, p.kv_dtype);
  args.v_cache = cache_rows(p.v_cache, p.kv_dtype);
  args.k_out = token_rows(p.k_out, p.out_dtype);
  args.v_out = token_rows(p.v_out, p.out_dtype);
  args.k_scale = p.k_scale;
  args.v_scale = p.v_scale;
  args.block_tables = p.block_tables;
  args.block_table_stride = p.block_table_stride;
  args.seq_lens = p.seq_lens;
  args.seq_starts = p.seq_starts;
  args.out_start_loc = p.out_start_loc;
  args.num_rows = p.num_rows;
  args.num_blocks = p.num_blocks;
  args.max_seq_len = int64_t{p.max_blocks_per_seq} * p.block_size;
  args.num_seqs = p.num_seqs;
  args.block_size = p.block_size;
  return args;
}

}  // namespace

void gather_kv(const GatherKvParams &p, void *stream_pointer) {
  const bool dequantize = p.kv_dtype != p.out_dtype;
  const char *name = dequantize ? "cuda::gather_kv_dequantize" : "cuda::gather_kv_copy";
  if (p.num_rows == 0 || p.num_seqs == 0 || p.num_blocks == 0) return record_kernel("gather_kv", name);
  auto *stream = static_cast<cudaStream_t>(stream_pointer);
  const Args args = launch_arguments(p);

  const int64_t heads = p.num_kv_heads;
  const int64_t cache_bytes = p.head_dim * dtype_size(p.kv_dtype);
  const int64_t out_bytes = p.head_dim * dtype_size(p.out_dtype);
  const int64_t cache_width = cache_access(args.k_cache, args.v_cache, p.num_blocks, p.block_size, heads, cache_bytes);
  const int64_t out_width = token_access(args.k_out, args.v_out, p.num_rows, heads, out_bytes);

  if (!dequantize) {
    return with_access(std::min(cache_width, out_width), [&](auto access) {
      launch<CopyUnchanged<decltype(access)>>(args, cache_bytes, heads, stream, name);
    });
  }
  with_float8_type(p.kv_dtype, [&](auto source) {
    with_wide_type(p.out_dtype, [&](auto target) {
      using Source = decltype(source);
      using Target = decltype(target);
      constexpr int kWide = 16 / static_cast<int>(sizeof(Target));
      if (out_width == 16 && cache_width >= kWide) {
        launch<Dequantize<Source, Target, kWide>>(args, cache_bytes, heads, stream, name);
      } else {
        launch<Dequantize<Source, Target, 1>>(args, cache_bytes, heads, stream, name);
      }
    });
  });
}

}  // namespace pagedattn::cuda
