// The kernels of one instruction set: attention over one work item, the merge of its partial results, and the table.
//
// SPDX-License-Identifier: Apache-2.0
//
// Flash-style attention.  The keys of the work item are taken in tiles, and inside a tile one KV head after another, so
// that a block is read in one go whatever its layout.  Scores become weights relative to a running maximum of each row;
// what was accumulated under an older maximum is rescaled.  Few rows go the direct way (attention_direct.h), many the
// packed way (attention_packed.h), all in fp32.  With tile registers few rows over bfloat16 go the way of
// attention_tile_rows.h and over float8 that of attention_float8_rows.h, many that of attention_tiles.h; what tiles
// cannot compute goes the way it would go without them.  With vectors of pairs of bfloat16 only many rows over bfloat16
// go the way of attention_tiles.h.
#include "kernels/attention_direct.h"
#include "kernels/attention_finish.h"
#include "kernels/attention_float8_rows.h"
#include "kernels/attention_packed.h"
#include "kernels/attention_tile_rows.h"
#include "kernels/attention_tiles.h"
#include "kernels/pairs.h"
#include "kernels/rows.h"
#include "kernels/stream.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

static size_t attention_scratch_size(const AttentionParams &params) {
  State state;
  return lay_out(state, params, nullptr);
}

// Calls `attend_tile(tile, next)` for all tiles of at most `most` keys.
template <class F>
PA_INLINE void for_tiles(const AttentionParams &params, const AttentionWork &work, State &state, int64_t most,
                         F attend_tile) {
  TileKeys *tile = &state.keys[0];
  TileKeys *next = &state.keys[1];
  locate_keys(params, work, work.kv_begin, most, *tile);
  for (int64_t first = work.kv_begin; first < work.kv_end; first += most) {
    locate_keys(params, work, first + most, most, *next);
    clip_panels(state, *tile);
    attend_tile(*tile, *next);
    TileKeys *const spare = tile;
    tile = next;
    next = spare;
  }
}

// Calls f with the cache's type and the number of parts that keep what the types of queries and cache tell apart.
template <class F>
PA_INLINE void with_parts(const AttentionParams &params, F f) {
  with_dtype(params.kv_dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (kAsTheyLie<T>) {
      f(tag, Count<1>{});
    } else if constexpr (kOnlyAsTheyLie) {
      return;
    } else if constexpr (sizeof(typename T::Storage) == 4) {
      f(tag, Count<3>{});
    } else if (params.q_dtype == DType::kBFloat16) {
      f(tag, Count<1>{});
    } else {
      f(tag, Count<2>{});
    }
  });
}

// Calls f with the type of a float8 cache and the number of parts that keep what queries and results tell apart.
template <class F>
PA_INLINE void with_float8_parts(const AttentionParams &params, F f) {
  const auto with_type = [&](auto tag) {
    if (params.out_dtype == DType::kBFloat16) {
      f(tag, Count<1>{});
    } else {
      f(tag, Count<2>{});
    }
  };
  if (params.kv_dtype == DType::kFloat8E4M3) {
    with_type(Float8E4M3{});
  } else {
    with_type(Float8E5M2{});
  }
}

// Accumulates the rows of an item, up to their maxima and sums.
static State accumulate(const AttentionParams &params, const AttentionWork &work, Way way, void *scratch) {
  State state = make_state(params, work, way, scratch);
  const auto with_type = [&](auto f) {
    if (work.kv_begin < work.kv_end) with_dtype(params.kv_dtype, f);
  };
  if (way == Way::kTileRows && params.kv_dtype != DType::kBFloat16) {
    with_float8_parts(params, [&](auto tag, auto parts) {
      using T = decltype(tag);
      constexpr int kParts = decltype(parts)::value;
      start_float8_rows<kParts>(params, work, state);
      for_tiles(params, work, state, float8_rows_keys(params), [&](const TileKeys &tile, const TileKeys &next) {
        float8_rows_tile<T, kParts>(params, work, state, tile, next);
      });
    });
    finish_tiles();
    state.holds = finish_float8_rows(params, state);
  } else if (way == Way::kTileRows) {
    start_tile_rows(params, work, state);
    for_tiles(params, work, state, tile_rows_keys(params),
              [&](const TileKeys &tile, const TileKeys &next) { tile_rows_tile(params, work, state, tile, next); });
    finish_tiles();
    state.holds = finish_tile_rows(params, state);
  } else if (way == Way::kDirect) {
    start_direct(params, work, state);
    with_type([&](auto tag) {
      using T = decltype(tag);
      const int64_t most = direct_tile_keys(params, static_cast<int64_t>(sizeof(typename T::Storage)));
      for_tiles(params, work, state, most,
                [&](const TileKeys &tile, const TileKeys &next) { direct_tile<T>(params, work, state, tile, next); });
    });
    finish_direct(state);
  } else if (way == Way::kTiles) {
    with_parts(params, [&](auto tag, auto parts) {
      using T = decltype(tag);
      constexpr int kParts = decltype(parts)::value;
      state.holds = start_tiles<T, kParts>(params, work, state);
      for_tiles(params, work, state, tile_chunk_keys<kParts>(state), [&](const TileKeys &chunk, const TileKeys &next) {
        state.holds = state.holds && tiles_chunk<T, kParts>(params, work, state, chunk, next);
      });
    });
    finish_tiles();
    clear_sums_of_no_key(state);
  } else {
    start_packed(params, work, state);
    with_type([&](auto tag) {
      for_tiles(params, work, state, kTileKeys, [&](const TileKeys &tile, const TileKeys &next) {
        packed_tile<decltype(tag)>(params, work, state, tile, next);
      });
    });
  }
  return state;
}

// Heads of an item that tiles could not compute, again, each by itself: how many heads share an item may follow the
// number of threads, which what the others compute must not.
static void attend_heads_again(const AttentionParams &params, const AttentionWork &work, const State &tiles,
                               void *scratch) {
  bool holds[kMaxStateRows];
  const int64_t num_heads = tiles.num_heads;  // `tiles` lies in the scratch
  for (int64_t head = 0; head < num_heads; ++head) holds[head] = head_holds(params, tiles, head);
  for (int64_t head = 0; head < num_heads; ++head) {
    if (holds[head]) continue;
    AttentionWork one = work;
    one.head_begin = work.head_begin + static_cast<int32_t>(head);
    one.head_end = one.head_begin + 1;
    State state = accumulate(params, one, Way::kDirect, scratch);
    gather_rows(state);
    if (work.partial != nullptr) {
      save_rows(params, work, state, head);
    } else {
      finish_rows(params, one, state);
    }
  }
}

static void attend(const AttentionParams &params, const AttentionWork &work, void *scratch) {
  State state = accumulate(params, work, way_of(params, work), scratch);
  if (!state.holds && packs(state.way)) state = accumulate(params, work, Way::kPacked, scratch);
  gather_rows(state);
  if (packs(state.way)) {
    finish_packed(params, work, state);
  } else if (work.partial != nullptr) {
    save_rows(params, work, state, 0);
  } else {
    finish_rows(params, work, state);
  }
  if (!state.holds && state.way == Way::kTileRows) attend_heads_again(params, work, state, scratch);
}

static void merge_partials(const AttentionParams &params, const AttentionWork &work, const float *partials,
                           int64_t num_partials, int64_t stride, void *scratch) {
  State state = make_state(params, work, way_of(params, work), scratch);
  merge_rows(params, partials, num_partials, stride, state);
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
    kMaxStateRows,
    max_head_rows,
    attention_scratch_size,
    attend,
    merge_partials,
    merge_row,
    quantize_row,
    dequantize_row,
    stream_run,
    finish_streaming,
    take_pairs,
};

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
