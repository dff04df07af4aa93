// What a kernel unit offers: a table of functions, one table for each compiled instruction set.
//
// SPDX-License-Identifier: Apache-2.0
//
// Both sides include this: the kernel units, which may use nothing that needs code outside their namespace (so only
// plain structs and constants are here, and units call no inline function of params.h), and the drivers beside it,
// which divide the work among threads and call through the table.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "params.h"

namespace pagedattn::cpu {

// Rows of attention are numbered as the packed grouped-query rows of a sequence: row = token * group + g, where group =
// Hq / Hkv, so that the query heads which share a KV head share each load and conversion of its keys.

// One item of work: a tile of packed rows, for a range of KV heads, over a range of keys.
struct AttentionWork {
  int64_t query_start = 0;  // q's first token of the sequence
  int64_t query_len = 0;
  int64_t seq_len = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  int64_t kv_begin = 0;
  int64_t kv_end = 0;
  int32_t seq = 0;
  int32_t head_begin = 0;  // KV heads
  int32_t head_end = 0;
  // Where the unnormalised result goes, or null if the range holds every visible key and `out` is final.
  float *partial = nullptr;
};

// A partial result holds, for each (KV head, row) of its work item in this order, the accumulator of head_dim floats;
// behind all of those the row maxima (of base-2 scores), and behind those the sums.
constexpr int64_t kPartialExtra = 2;  // floats of a row beside the accumulator

struct Kernels {
  const char *isa;
  const char *attention_name;
  const char *merge_states_name;
  const char *reshape_and_cache_name;
  const char *rope_and_cache_name;
  const char *copy_blocks_name;
  const char *gather_kv_name;

  // Rows times KV heads of one work item, at most, and rows of one with a single KV head: they bound the scratch
  // memory.
  int64_t max_rows;
  int64_t (*max_head_rows)(const AttentionParams &params);
  // Bytes of 64-byte aligned scratch memory of one thread.
  size_t (*attention_scratch_size)(const AttentionParams &params);
  void (*attend)(const AttentionParams &params, const AttentionWork &work, void *scratch);
  // Joins the partial results of the same rows and heads, `stride` floats apart, in order, and writes `out`.
  void (*merge_partials)(const AttentionParams &params, const AttentionWork &work, const float *partials,
                         int64_t num_partials, int64_t stride, void *scratch);

  // out[i] = sum over parts of weights[p] * parts[p][i]; parts of weight 0 are not read.
  void (*merge_row)(DType dtype, void *out, const void *const *parts, const float *weights, int64_t num_parts,
                    int64_t n);
  // dst[i] = src[i] / scale, and dst[i] = src[i] * scale, in fp32, rounded to dst's type.
  void (*quantize_row)(DType dst_dtype, void *dst, DType src_dtype, const void *src, float scale, int64_t n);
  void (*dequantize_row)(DType dst_dtype, void *dst, DType src_dtype, const void *src, float scale, int64_t n);

  // Copies a run past the caches, for amounts that they could not keep, and fetches the beginning of `next`, the source
  // of the run behind it, meanwhile.  To be ended by finish_streaming, once for many runs.
  void (*stream_run)(void *dst, const void *src, const void *next, int64_t bytes);
  void (*finish_streaming)();

  // Whether all firsts of [num_pairs, 2] are in 0 ... num_first - 1, all seconds in 0 ... num_second - 1, and no second
  // stands twice; this last where there are `marks`, a zero byte each, of which those of the seconds are then 1. Unless
  // `packed` is null it has room for the pairs in numbers of 2 or 4 bytes, and gets them in groups of 16 bytes: the
  // firsts of some pairs, then their seconds.  Which pairs share a group is open, but none is left out.
  bool (*take_pairs)(const int64_t *pairs, int64_t num_pairs, int64_t num_first, int64_t num_second, void *packed,
                     int number_bytes, uint8_t *marks);
};

namespace generic {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
namespace amx {
extern const Kernels kKernels;
}

}  // namespace pagedattn::cpu
