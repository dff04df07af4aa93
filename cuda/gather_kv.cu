// gather_kv: pages back to contiguous rows, dequantised where the output is wider than the cache.
//
// SPDX-License-Identifier: Apache-2.0
//
// A thread block owns a few neighbouring output rows, so work is even however the lengths vary and the host needs to
// know none of them.  It first finds which token each of its rows holds: it walks over the sequences, as many at a time
// as it has threads, finds the first row of each (read from out_start_loc, or summed from the lengths), and the thread
// whose sequence reaches into the block's rows writes its tokens into shared memory.  Then all threads copy: 16-byte
// accesses on the wider side where addresses and strides allow, one key and one value under way a thread.
//
// Bound by memory where rows are many; the walk costs one coalesced pass over seq_lens a thread block, hidden by the
// blocks beside it.  Bound by latency where they are few: three trips to memory (length, table entry, token), of which
// a prefetch of the tables shortens the second.  Few rows of few sequences have a kernel of their own, in which the
// lengths and the tables' beginnings come in one trip.  A row is written only if a token lands there and its table
// entry names a block.
#include "cache_rows.cuh"
#include "cuda_backend.h"
#include "fast_divisor.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "runtime.h"

namespace pagedattn::cuda {
namespace {

constexpr int kRowsPerBlock = 16;  // or as many as are copied at once
constexpr int kWarps = kThreadsPerBlock / 32;
// Up to so many rows a call is bound by latency, and reading entries of tables that are not needed costs nothing.
constexpr int64_t kFewRows = 1024;

struct Args {
  CacheRows k_cache;
  CacheRows v_cache;
  TokenRows k_out;
  TokenRows v_out;
  void *k_cache_data;
  void *v_cache_data;
  void *k_out_data;
  void *v_out_data;
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
  int num_seqs;
  int max_blocks_per_seq;
  FastDivisor block_size;
  FastDivisor accesses_per_head;
  int accesses_per_token;
  int entries_shift;  // few rows: log2 of the table entries that lanes hold of each sequence
  int rows_per_block;
  bool prefetch_tables;
};

// The tokens [first, first + count) of a sequence, whatever the arrays hold within what the block table covers.
struct TokenRange {
  int first;
  int count;
};

__device__ TokenRange tokens_to_gather(const Args &args, int seq) {
  const int length = args.seq_lens[seq];
  const int start = args.seq_starts == nullptr ? 0 : args.seq_starts[seq];
  const int end = static_cast<int>(min(int64_t{max(length, 0)}, args.max_seq_len));
  const int first = min(max(start, 0), end);
  return {first, end - first};
}

// The sum of `value` over the threads before this one; `total` becomes the sum over all.
__device__ int64_t exclusive_sum(int64_t value, int64_t *total) {
  __shared__ int64_t warp_sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  int64_t inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t before = __shfl_up_sync(0xffffffffu, inclusive, distance);
    if (lane >= distance) inclusive += before;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int64_t earlier_warps = 0;
  *total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) earlier_warps = *total;
    *total += warp_sums[w];
  }
  return earlier_warps + inclusive - value;
}

struct RowToken {
  int seq;  // -1: none
  int token;
};

// Fills `rows` for the output rows from `tile_start` on.
__device__ void find_tokens(const Args &args, int64_t tile_start, RowToken *rows) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < args.rows_per_block) rows[thread] = {-1, 0};
  int64_t rows_before = 0;
  for (int seqs_start = 0; seqs_start < args.num_seqs && rows_before < tile_start + args.rows_per_block;
       seqs_start += kThreadsPerBlock) {
    const int seq = seqs_start + thread;
    TokenRange tokens = {0, 0};
    int64_t first_row = 0;
    if (seq < args.num_seqs) {
      if (args.prefetch_tables) prefetch_to_l2(args.block_tables + seq * args.block_table_stride);
      tokens = tokens_to_gather(args, seq);
    }
    // Rows must be marked empty before any is filled, and the sums of one pass read before those of the next.
    __syncthreads();
    if (args.out_start_loc == nullptr) {
      int64_t total = 0;
      first_row = rows_before + exclusive_sum(tokens.count, &total);
      rows_before += total;
    } else if (tokens.count > 0) {
      first_row = args.out_start_loc[seq];
    }
    const int64_t from = max(first_row, tile_start);
    const int64_t to = min(first_row + tokens.count, tile_start + args.rows_per_block);
    for (int64_t row = from; row < to; ++row) {
      rows[row - tile_start] = {seq, tokens.first + static_cast<int>(row - first_row)};
    }
  }
  __syncthreads();
}

// One access of each head in turn, by threads `lane` of `lanes`.
template <class Convert>
__device__ void copy_token(const Args &args, int64_t block, int offset, int64_t row, int lane, int lanes) {
  using From = typename Convert::From;
  using To = typename Convert::To;
  // A row of one pass is the rule, and code that is never run still has to be fetched.
#pragma unroll 1
  for (int i = lane; i < args.accesses_per_token; i += lanes) {
    const int head = args.accesses_per_head.divide(i);
    const int access = i - head * static_cast<int>(args.accesses_per_head.divisor);
    const From key = reinterpret_cast<const From *>(args.k_cache.head(args.k_cache_data, block, offset, head))[access];
    const From value =
        reinterpret_cast<const From *>(args.v_cache.head(args.v_cache_data, block, offset, head))[access];
    const float k_scale = Convert::kScaled ? scale_of(args.k_scale, head) : 1.0f;
    const float v_scale = Convert::kScaled ? scale_of(args.v_scale, head) : 1.0f;
    reinterpret_cast<To *>(args.k_out.head(args.k_out_data, row, head))[access] = Convert::apply(key, k_scale);
    reinterpret_cast<To *>(args.v_out.head(args.v_out_data, row, head))[access] = Convert::apply(value, v_scale);
  }
}

template <class Convert>
__global__ void __launch_bounds__(kThreadsPerBlock)
    gather_kv_kernel(const __grid_constant__ Args args, const __grid_constant__ FastDivisor lanes_per_row) {
  __shared__ RowToken rows[kThreadsPerBlock];
  wait_for_kernels_before();
  const int64_t tile_start = static_cast<int64_t>(blockIdx.x) * args.rows_per_block;
  find_tokens(args, tile_start, rows);

  const int lanes = static_cast<int>(lanes_per_row.divisor);
  const int first_row = lanes_per_row.divide(static_cast<int>(threadIdx.x));
  const int lane = static_cast<int>(threadIdx.x) - first_row * lanes;
  const int rows_at_once = lanes_per_row.divide(kThreadsPerBlock);
  if (first_row >= rows_at_once) return;
#pragma unroll 1
  for (int r = first_row; r < args.rows_per_block; r += rows_at_once) {
    if (rows[r].seq < 0 || tile_start + r >= args.num_rows) continue;
    const int token = rows[r].token, index = args.block_size.divide(token);
    const int64_t block = args.block_tables[rows[r].seq * args.block_table_stride + index];
    if (block < 0 || block >= args.num_blocks) continue;
    copy_token<Convert>(args, block, token - index * static_cast<int>(args.block_size.divisor), tile_start + r, lane,
                        lanes);
  }
}

// A thread block a row, of at most 32 sequences.  Each warp finds the row's token by itself: a lane takes a sequence's
// length, and with it, so that this is no trip of its own, a table entry, which the others ask it for.
template <class Convert>
__global__ void __launch_bounds__(kThreadsPerBlock) gather_few_rows_kernel(const __grid_constant__ Args args) {
  constexpr unsigned kAll = 0xffffffffu;
  wait_for_kernels_before();
  const auto row = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x % 32);
  const int held = 1 << args.entries_shift;  // entries of each sequence
  const int seq_of_entry = lane >> args.entries_shift, index_of_entry = lane & (held - 1);
  int entry = -1;
  if (seq_of_entry < args.num_seqs && index_of_entry < args.max_blocks_per_seq) {
    entry = args.block_tables[seq_of_entry * args.block_table_stride + index_of_entry];
  }
  TokenRange tokens = {0, 0};
  int first_row = 0;
  if (lane < args.num_seqs) {
    if (args.out_start_loc != nullptr) first_row = args.out_start_loc[lane];
    tokens = tokens_to_gather(args, lane);
  }
  if (args.out_start_loc == nullptr) {
    const int count = min(tokens.count, static_cast<int>(args.num_rows));  // the sum is an int then
    int inclusive = count;
#pragma unroll 1
    for (int distance = 1; distance < args.num_seqs; distance *= 2) {
      const int before = __shfl_up_sync(kAll, inclusive, distance);
      if (lane >= distance) inclusive += before;
    }
    first_row = inclusive - count;
  }
  const auto within = static_cast<uint32_t>(row) - static_cast<uint32_t>(first_row);
  const unsigned owners = __ballot_sync(kAll, within < static_cast<uint32_t>(tokens.count));
  if (owners == 0) return;
  const int seq = __ffs(static_cast<int>(owners)) - 1;
  const int token = static_cast<int>(__shfl_sync(kAll, static_cast<uint32_t>(tokens.first) + within, seq));
  const int index = args.block_size.divide(token);
  int block = __shfl_sync(kAll, entry, (seq << args.entries_shift) + (index & (held - 1)));
  if (index >= held) block = args.block_tables[seq * args.block_table_stride + index];
  if (block < 0 || block >= args.num_blocks) return;
  copy_token<Convert>(args, block, token - index * static_cast<int>(args.block_size.divisor), row,
                      static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
}

template <class Convert>
void launch(Args args, int64_t head_bytes, int64_t num_heads, cudaStream_t stream, const char *name) {
  const int64_t accesses_per_head = head_bytes / static_cast<int64_t>(sizeof(typename Convert::From));
  args.accesses_per_head = FastDivisor::of(checked_int(accesses_per_head, "elements a head"));
  args.accesses_per_token = checked_int(accesses_per_head * num_heads, "elements a token");
  const dim3 threads = threads_over_rows(args.accesses_per_token);
  if (args.num_rows <= kFewRows && args.num_seqs <= 32) {
    while (args.num_seqs << (args.entries_shift + 1) <= 32) ++args.entries_shift;
    const dim3 blocks(static_cast<unsigned>(args.num_rows));
    return launch_kernel({name, blocks, dim3(std::max(threads.x, 32u)), 0, stream, EarlyStart::kUnlessCaptured},
                         gather_few_rows_kernel<Convert>, args);
  }
  // Rows that a thread takes one after the other amortise the walk, and there must be enough for all multiprocessors.
  const auto rows_at_once = static_cast<int64_t>(threads.y);
  const int64_t share = ceil_div(args.num_rows, 8 * int64_t{device_facts().num_multiprocessors});
  args.rows_per_block =
      static_cast<int>(std::clamp<int64_t>(share, rows_at_once, std::max<int64_t>(kRowsPerBlock, rows_at_once)));
  const unsigned blocks = blocks_over_rows(args.num_rows, args.rows_per_block);
  launch_kernel({name, dim3(blocks), dim3(kThreadsPerBlock), 0, stream, EarlyStart::kUnlessCaptured},
                gather_kv_kernel<Convert>, args, FastDivisor::of(static_cast<int>(threads.x)));
}

Args launch_arguments(const GatherKvParams &p) {
  Args args = {};
  args.k_cache = cache_rows(p.k_cache, p.kv_dtype);
  args.v_cache = cache_rows(p.v_cache, p.kv_dtype);
  args.k_out = token_rows(p.k_out, p.out_dtype);
  args.v_out = token_rows(p.v_out, p.out_dtype);
  args.k_cache_data = p.k_cache.data;
  args.v_cache_data = p.v_cache.data;
  args.k_out_data = p.k_out.data;
  args.v_out_data = p.v_out.data;
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
  args.max_blocks_per_seq = p.max_blocks_per_seq;
  args.block_size = FastDivisor::of(p.block_size);
  args.prefetch_tables = p.num_rows <= kFewRows && p.max_blocks_per_seq > 0;
  return args;
}

}  // namespace

void gather_kv(const GatherKvParams &p, void *stream_pointer) {
  const bool dequantize = p.kv_dtype != p.out_dtype;
  const char *name = dequantize ? "cuda::gather_kv_dequantize" : "cuda::gather_kv_copy";
  record_kernel("gather_kv", name);
  if (p.num_rows == 0 || p.num_seqs == 0 || p.num_blocks == 0) return;
  auto *stream = static_cast<cudaStream_t>(stream_pointer);
  const Args args = launch_arguments(p);

  const int64_t heads = p.num_kv_heads;
  const int64_t cache_bytes = p.head_dim * dtype_size(p.kv_dtype);
  const int64_t out_bytes = p.head_dim * dtype_size(p.out_dtype);
  AccessWidth cache_access(cache_bytes), out_access(out_bytes);
  for (const CacheView *cache : {&p.k_cache, &p.v_cache}) {
    cache_access.address(cache->data);
    include_strides(&cache_access, cache_rows(*cache, p.kv_dtype), p.num_blocks, p.block_size, heads);
  }
  for (const TokensView *out : {&p.k_out, &p.v_out}) {
    out_access.address(out->data);
    include_strides(&out_access, token_rows(*out, p.out_dtype), p.num_rows, heads);
  }
  const int64_t cache_width = cache_access.bytes(), out_width = out_access.bytes();

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
