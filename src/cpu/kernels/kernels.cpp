// The kernels of one instruction set: attention over one work item, the merge of its partial results, and the table.
//
// SPDX-License-Identifier: Apache-2.0
//
// Flash-style attention.  The keys of the work item are taken in tiles, and inside a tile one KV head after another, so
// that a block is read in one go whatever its layout.  Scores become weights relative to a running maximum of each row;
// what was accumulated under an older maximum is rescaled.  Few rows go the direct way (attention_direct.h), many the
// packed way (attention_packed.h).  Everything is computed in fp32.
#include "kernels/attention_packed.h"
#include "kernels/rows.h"
#include "kernels/stream.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

// Up to here converting K and V again for every four rows costs less than packing them.
constexpr int64_t kMaxDirectRows = 8;

// A tile of all heads up to this size leaves room for the next one in an L2 of 1 MiB.
constexpr int64_t kMaxFarBytes = 384 * 1024;

static size_t attention_scratch_size(const AttentionParams &params) {
  State state;
  return lay_out(state, params, nullptr);
}

template <class T>
static void attend_keys(const AttentionParams &params, const AttentionWork &work, State &state) {
  const bool direct = state.rows <= kMaxDirectRows && params.head_dim % kWidth == 0;
  const int64_t tile_bytes =
      2 * kTileKeys * state.num_heads * params.head_dim * static_cast<int64_t>(sizeof(typename T::Storage));
  TileKeys *tile = &state.keys[0];
  TileKeys *next = &state.keys[1];
  locate_keys(params, work, work.kv_begin, *tile);
  for (int64_t first = work.kv_begin; first < work.kv_end; first += kTileKeys) {
    next->count = 0;
    if (first + kTileKeys < work.kv_end) locate_keys(params, work, first + kTileKeys, *next);
    clip_rows(state, *tile);
    for (int64_t head = 0; head < state.num_heads; ++head) {
      const bool last = head + 1 == state.num_heads;
      const Ahead<T> ahead = {head_data<T>(params.k_cache, work, last ? 0 : head + 1), last ? next : tile, next,
                              tile_bytes <= kMaxFarBytes ? next->count : 0};
      if (direct) {
        direct_tile<T>(params, work, state, *tile, head, ahead);
      } else {
        packed_tile<T>(params, work, state, *tile, head, ahead);
      }
    }
    TileKeys *const spare = tile;
    tile = next;
    next = spare;
  }
}

static void save_partial(const AttentionParams &params, const AttentionWork &work, const State &state) {
  const int64_t rows = state.num_heads * state.rows;
  for (int64_t i = 0; i < rows; ++i) {
    __builtin_memcpy(work.partial + i * params.head_dim, state.acc + i * state.row_stride,
                     static_cast<size_t>(params.head_dim) * sizeof(float));
  }
  float *extra = work.partial + rows * params.head_dim;
  __builtin_memcpy(extra, state.row_max, static_cast<size_t>(rows) * sizeof(float));
  __builtin_memcpy(extra + rows, state.row_sum, static_cast<size_t>(rows) * sizeof(float));
}

static void attend(const AttentionParams &params, const AttentionWork &work, void *scratch) {
  State state = make_state(params, work, scratch);
  start_rows(params, work, state);
  if (work.kv_begin < work.kv_end) {
    with_dtype(params.kv_dtype, [&](auto tag) { attend_keys<decltype(tag)>(params, work, state); });
  }
  if (work.partial != nullptr) {
    save_partial(params, work, state);
  } else {
    finish_rows(params, work, state);
  }
}

static void merge_partials(const AttentionParams &params, const AttentionWork &work, const float *partials,
                           int64_t num_partials, int64_t stride, void *scratch) {
  State state = make_state(params, work, scratch);
  const int64_t rows = state.num_heads * state.rows;
  for (int64_t i = 0; i < rows; ++i) {
    const float *maxima = partials + rows * params.head_dim + i;
    const float *sums = maxima + rows;
    float largest = -kInfinity;
    for (int64_t p = 0; p < num_partials; ++p) {
      largest = maxima[p * stride] > largest ? maxima[p * stride] : largest;
    }
    float *acc = state.acc + i * state.row_stride;
    __builtin_memset(acc, 0, static_cast<size_t>(state.row_stride) * sizeof(float));
    float sum = 0.0f;
    for (int64_t p = 0; p < num_partials; ++p) {
      if (maxima[p * stride] == -kInfinity) continue;
      const float weight = exp2_nonpositive(broadcast(maxima[p * stride] - largest))[0];
      sum += weight * sums[p * stride];
      const float *part = partials + p * stride + i * params.head_dim;
      int64_t d = 0;
      for (; d + kWidth <= params.head_dim; d += kWidth) {
        store(acc + d, fma(broadcast(weight), load(part + d), load(acc + d)));
      }
      for (; d < params.head_dim; ++d) acc[d] += weight * part[d];
    }
    state.row_max[i] = largest;
    state.row_sum[i] = sum;
  }
  finish_rows(params, work, state);
}

#define PA_STRING(x) PA_STRING_OF(x)
#define PA_STRING_OF(x) #x
#define PA_ISA_NAME PA_STRING(PAGEDATTN_ISA)

extern const Kernels kKernels = {
    PA_ISA_NAME,
    "cpu_" PA_ISA_NAME "_attention",
    "cpu_" PA_ISA_NAME "_merge_states",
    "cpu_" PA_ISA_NAME "_reshape_and_cache",
    "cpu_" PA_ISA_NAME "_rope_and_cache",
    "cpu_copy_blocks",
    "cpu_" PA_ISA_NAME "_gather_kv",
    attention_scratch_size,
    attend,
    merge_partials,
    merge_row,
    quantize_row,
    dequantize_row,
    stream_run,
    finish_streaming,
};

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
