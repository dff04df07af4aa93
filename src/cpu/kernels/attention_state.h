// The state of one work item: queries, online-softmax rows, and where the keys of a tile lie.
//
// SPDX-License-Identifier: Apache-2.0
//
// Scores of a KV head stand as [key][row]: the query rows that share the head's keys lie side by side in the lanes of
// vectors, so that a maximum over keys, a sum, a mask and a rescaling are plain vector operations.  A panel is as many
// rows as one pass of a kernel takes.  Scores are kept in base 2, so that exponentials are 2**x: log2(e) is folded into
// the queries, or into the factor behind tanh where a softcap is on.
#pragma once

#include "kernels/convert.h"
#include "kernels/kernels.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

#if defined(PAGEDATTN_TILES)
constexpr int kTileKeys = 128;      // keys whose scores are in flight, at most
constexpr int kMaxChunkKeys = 512;  // keys located at once: those that tile registers go over, panel by panel
constexpr int kPackedVecs = 2;      // vectors of rows of a panel on packed tiles
constexpr int64_t kMaxStateRows = 288;
// Rows of one KV head, which share what is unpacked: in fp32 and, on tile registers, bfloat16.  Processors with tiles
// have an L2 of 2 MiB.
constexpr int64_t kMaxHeadRows = 2 * kMaxStateRows;
constexpr int64_t kMaxTiledHeadRows = 2048;
#else
constexpr int kTileKeys = 64;
#if defined(PAGEDATTN_BFLOAT16_PRODUCTS)
constexpr int kMaxChunkKeys = 512;
#else
constexpr int kMaxChunkKeys = kTileKeys;
#endif
constexpr int kPackedVecs = 3;
constexpr int64_t kMaxStateRows =
    144;  // queries and accumulators of 128 dimensions then take 144 KiB, a part of any L2
constexpr int64_t kMaxHeadRows = kMaxStateRows;
#if defined(PAGEDATTN_BFLOAT16_PRODUCTS)
// Queries and accumulators of 128 dimensions then take 432 KiB, a chunk of keys and values 256, of an L2 of 1 MiB.
constexpr int64_t kMaxTiledHeadRows = 4 * kMaxStateRows;
#else
constexpr int64_t kMaxTiledHeadRows = kMaxStateRows;
#endif
#endif
// Rows of a panel that reads the cache directly: the sums of two keys with them fill 16 registers.
constexpr int kDirectRows = kWidth == 8 ? 6 : 4;
constexpr int kMaxLanes = kPackedVecs * kWidth;
// Up to here converting K and V again for each panel costs less than packing them.  float8_e4m3 takes longest.
constexpr int64_t max_direct_rows(DType kv_dtype) {
  if (kWidth != 8) return 8;
  return kv_dtype == DType::kFloat8E4M3 ? 12 : 16;
}
// How the rows of an item go: straight from the cache with vectors (attention_direct.h) or with tile registers
// (attention_tile_rows.h), or over copies of keys and values, with vectors (attention_packed.h) or with products of
// bfloat16 (attention_tiles.h).
enum class Way { kDirect, kTileRows, kPacked, kTiles };

// Rows that fit into one tile register, and the shortest sequence for which tiles are faster for up to 4 rows.
constexpr int kMaxTileRows = 16;
constexpr int64_t min_tile_keys(DType kv_dtype) { return kv_dtype == DType::kBFloat16 ? 32 : 24; }
// The fewest rows for which vectors of pairs are faster: their panels have all lanes, of which half would be idle.
[[maybe_unused]] constexpr int64_t kMinPairRows = 17;
// The fewest rows for which tiles are faster where keys and values are to be converted first.
constexpr int64_t min_converted_rows(DType kv_dtype) { return kv_dtype == DType::kFloat32 ? 64 : 24; }

constexpr float kLog2e = 1.4426950408889634f;

static float scale_of(const Scale &scale, int64_t kv_head) {
  return scale.ptr == nullptr ? scale.value : scale.ptr[scale.per_head ? kv_head : 0];
}

// What multiplies a row of queries, so that products are scores in base 2 (or, with a softcap, arguments of tanh).
static float query_factor(const AttentionParams &params, int64_t kv_head) {
  const float factor = params.scale * scale_of(params.q_scale, kv_head) * scale_of(params.k_scale, kv_head);
  return params.softcap > 0.0f ? factor / params.softcap : factor * kLog2e;
}

#if defined(PAGEDATTN_BFLOAT16_PRODUCTS)
static bool factors_are_positive(const AttentionParams &params) {
  for (int64_t head = 0; head < params.num_kv_heads; ++head) {
    if (!(query_factor(params, head) > 0.0f)) return false;
  }
  return true;
}
#endif

// Whether many rows may take the way of attention_tiles.h.  Scales wait for the softmax there, which takes only
// positive ones; those of float32 are folded into queries.
static bool tiles_serve([[maybe_unused]] const AttentionParams &params) {
#if defined(PAGEDATTN_TILES)
  if (params.kv_dtype == DType::kFloat32) return true;
  if (params.q_dtype != DType::kFloat16 && params.q_dtype != DType::kBFloat16) return false;
  return factors_are_positive(params);
#elif defined(PAGEDATTN_BFLOAT16_PRODUCTS)
  return params.kv_dtype == DType::kBFloat16 && params.q_dtype == DType::kBFloat16 && factors_are_positive(params);
#else
  return false;
#endif
}

// Whether so many rows do.
static bool tiles_pay(const AttentionParams &params, int64_t rows) {
  if (!tiles_serve(params)) return false;
#if !defined(PAGEDATTN_TILES)
  if (rows < kMinPairRows) return false;
#endif
  if (params.kv_dtype == DType::kBFloat16) return true;
  // What tiles cannot compute makes a whole item fall back.  Of how many heads it is may follow the number of threads,
  // which bits must not.
  const bool falls_back = params.q_dtype != DType::kBFloat16;
  if (params.deterministic && falls_back && 2 * rows <= kMaxStateRows) return false;
  return rows >= min_converted_rows(params.kv_dtype);
}

// Whether few rows may take the way of attention_tile_rows.h or attention_float8_rows.h.  Scales wait for the softmax
// there, too.
static bool tile_rows_serve([[maybe_unused]] const AttentionParams &params) {
#if defined(PAGEDATTN_TILES)
  if (params.head_dim % 32 != 0 || !(params.scale > 0.0f)) return false;
  if (params.kv_dtype == DType::kBFloat16) return params.q_dtype == DType::kBFloat16;
  if (params.kv_dtype != DType::kFloat8E4M3 && params.kv_dtype != DType::kFloat8E5M2) return false;
  return factors_are_positive(params);
#else
  return false;
#endif
}

static Way way_of(const AttentionParams &params, const AttentionWork &work) {
  const int64_t rows = work.row_end - work.row_begin;
  if (rows <= kMaxTileRows && (rows > 4 || work.seq_len >= min_tile_keys(params.kv_dtype)) && tile_rows_serve(params)) {
    return Way::kTileRows;
  }
  if (rows <= max_direct_rows(params.kv_dtype)) return Way::kDirect;
  return tiles_pay(params, rows) ? Way::kTiles : Way::kPacked;
}
static_assert(kMaxStateRows % kMaxLanes == 0);

constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = __builtin_inff();

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Offsets (elements) of the keys and values of one tile, for the first KV head of the item.
struct TileKeys {
  int64_t first = 0;  // number of the first key
  int count = 0;
  int64_t k[kMaxChunkKeys];
  int64_t v[kMaxChunkKeys];
};

// Lanes of so many rows that read the cache directly.
constexpr int direct_lanes(int rows) { return rows > 4 ? kWidth : (rows == 3 ? 4 : rows); }
// Lanes of so many rows on tile registers: the next power of two.
constexpr int tile_lanes(int rows) { return rows > 8 ? 16 : (rows > 4 ? 8 : (rows == 3 ? 4 : rows)); }

// Rows whose scores lie side by side, the same for each KV head.  Behind the last row, lanes repeat it.
struct Panel {
  int64_t first;       // row
  int64_t first_lane;  // before it in a head, lanes of other panels
  int rows;
  int lanes;  // 1, 2, 4, or a multiple of kWidth; fewer than kWidth stand for several keys in one vector
  alignas(64) int begin[kMaxLanes];  // the keys of the tile at hand that a lane sees
  int end[kMaxLanes];
  int any_begin, any_end;  // those that some lane sees
  int all_begin, all_end;  // those that all lanes see; may be none
};

// The running softmax of one panel and head, lane by lane.
struct Online {
  alignas(64) float max[kMaxLanes];
  float sum[kMaxLanes];
  float factor[kMaxLanes];  // what the last tile rescaled by
  bool started;             // whether sums hold anything, on tile registers
};

struct State {
  int64_t rows;       // packed rows
  int64_t num_heads;  // KV heads
  int64_t group;
  int64_t row_stride;  // of q, acc and key_rows
  int64_t lane_dims;   // packed: dimensions of q and acc, on tiles with those that they are padded by
  int num_panels;
  int64_t lanes;  // of all panels
  Way way;
  bool holds = true;     // whether the way could be gone to its end
  bool near = false;     // few rows: whether what is read comes fast by itself
  bool pair_order;       // whether rows of q and acc are in the cache type's pair order
  float *q;              // direct: [num_heads * rows, row_stride]; packed: [num_heads][panel][head_dim][lanes]
  float *acc;            // likewise; tile rows: as direct
  float *row_max;        // [num_heads * rows], at the end
  float *row_sum;        // [num_heads * rows], at the end
  float *scores;         // direct: [num_heads][panel][kTileKeys][lanes]; packed: one head's
  float *key_rows;       // packed: [kTileKeys, row_stride], keys in fp32
  float *value_columns;  // packed: [head_dim / kMicro][kTileKeys][kMicro], padded, values in fp32
  char *key_tiles;       // operands of products of bfloat16, as tile_pack.h or pair_products.h lays them out;
                         // tile rows: copies
  char *value_tiles;
  uint32_t *weights;       // tile rows: [num_heads][2 * lanes * kTileKeys], operands of products with values
  int64_t *visible_begin;  // [rows] keys that a row sees
  int64_t *visible_end;
  Panel *panels;
  Online *online;  // [num_heads][num_panels]
  TileKeys *keys;  // two tiles: the one at hand and the next
};

// Rows of an item with one KV head, at most.
static int64_t max_head_rows(const AttentionParams &params) {
  return tiles_serve(params) ? kMaxTiledHeadRows : kMaxHeadRows;
}

// Lays the arrays out from `base` on; with a null base only the size counts.
static size_t lay_out(State &state, const AttentionParams &params, void *base) {
  size_t used = 0;
  const auto take = [&](auto *&array, int64_t count) {
    array = reinterpret_cast<decltype(+array)>(reinterpret_cast<uintptr_t>(base) + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(*array)), 64));
  };
  const bool tiles = tiles_serve(params) || tile_rows_serve(params);
  const int64_t rows = max_head_rows(params);
  // Rows padded to vectors, over all heads: at worst one row more than a vector, or than half a vector.  Tiles pad to
  // whole panels, which are the more the fewer rows a head has.
  const int64_t lanes = tiles ? kMaxTiledHeadRows : 2 * kMaxStateRows;
  state.row_stride = round_up(params.head_dim, kWidth);
  const int64_t tile_dims = round_up(params.head_dim, 32);
  take(state.q, lanes * tile_dims * 3 / 2);  // three parts of 2 bytes
  take(state.acc, lanes * tile_dims);
  take(state.row_max, rows);
  take(state.row_sum, rows);
  take(state.scores, 2 * kMaxStateRows * kTileKeys);
  if (tiles) {
    // All of 2 bytes, or half of them in three parts.
    take(state.key_tiles, kMaxChunkKeys * tile_dims * 3);
    take(state.value_tiles, kMaxChunkKeys * tile_dims * 3);
    take(state.weights, 2 * 2 * kMaxStateRows * kTileKeys);
  }
  take(state.key_rows, kTileKeys * state.row_stride);
  take(state.value_columns, (kTileKeys + 4) * state.row_stride);
  take(state.visible_begin, rows);
  take(state.visible_end, rows);
  take(state.panels, rows / kMaxLanes + 1);
  take(state.online, rows);
  take(state.keys, 2);
  return used;
}

struct QueryRow {
  int64_t token;  // in the whole batch
  int64_t head;   // query head
};

static QueryRow query_row(const State &state, const AttentionWork &work, int64_t head, int64_t row) {
  const int64_t packed = work.row_begin + row;
  return {work.query_start + packed / state.group, (work.head_begin + head) * state.group + packed % state.group};
}

static int64_t panel_lanes(Way way, int rows) {
  if (way == Way::kDirect) return direct_lanes(rows);
  if (way == Way::kTileRows) return tile_lanes(rows);
  return way == Way::kTiles ? kMaxLanes : round_up(rows, kWidth);
}

// Whether keys and values are copied for the rows.
constexpr bool packs(Way way) { return way == Way::kPacked || way == Way::kTiles; }

// Rows in panels of about equal size, of at most kDirectRows, kMaxTileRows or kMaxLanes.  Tiles have all of those
// lanes.
static void make_panels(State &state) {
  const int64_t most =
      state.way == Way::kDirect ? kDirectRows : (state.way == Way::kTileRows ? kMaxTileRows : kMaxLanes);
  const int64_t count = (state.rows + most - 1) / most;
  int64_t even = (state.rows + count - 1) / count;
  if (packs(state.way)) even = round_up(even, kWidth);
  state.num_panels = 0;
  state.lanes = 0;
  for (int64_t row = 0; row < state.rows; row += even) {
    Panel &panel = state.panels[state.num_panels++];
    panel.first = row;
    panel.first_lane = state.lanes;
    panel.rows = static_cast<int>(state.rows - row < even ? state.rows - row : even);
    panel.lanes = static_cast<int>(panel_lanes(state.way, panel.rows));
    state.lanes += panel.lanes;
  }
}

static State make_state(const AttentionParams &params, const AttentionWork &work, Way way, void *scratch) {
  State state;
  lay_out(state, params, scratch);
  state.rows = work.row_end - work.row_begin;
  state.num_heads = work.head_end - work.head_begin;
  state.group = params.num_q_heads / params.num_kv_heads;
  state.way = way;
  state.pair_order = !packs(way) && params.kv_dtype == DType::kBFloat16;
  // Rows of one token see the same keys.
  int64_t position = work.seq_len - work.query_len + work.row_begin / state.group;
  int64_t left = state.group - work.row_begin % state.group;
  for (int64_t row = 0; row < state.rows; ++row, --left) {
    if (left == 0) {
      ++position;
      left = state.group;
    }
    int64_t end = params.causal ? position + 1 : work.seq_len;
    if (end < 0) end = 0;
    state.visible_begin[row] = params.window > 0 && end > params.window ? end - params.window : 0;
    state.visible_end[row] = end;
  }
  state.lane_dims = way == Way::kTiles ? round_up(params.head_dim, 32) : params.head_dim;
  make_panels(state);
  for (int64_t i = 0; i < state.num_heads * state.num_panels; ++i) {
    for (int lane = 0; lane < (packs(way) ? kMaxLanes : kWidth); lane += kWidth) {
      store(state.online[i].max + lane, broadcast(-kInfinity));
      store(state.online[i].sum + lane, zero());
    }
  }
  return state;
}

// A cache's data from one KV head of the item on.
template <class T>
static const typename T::Storage *head_data(const CacheView &cache, const AttentionWork &work, int64_t head) {
  return static_cast<const typename T::Storage *>(cache.data) + (work.head_begin + head) * cache.head_stride;
}

// Finds the keys [first, first + most) of the item, or how many there are, through the block table, of which it reads
// only their entries.
static void locate_keys(const AttentionParams &params, const AttentionWork &work, int64_t first, int64_t most,
                        TileKeys &tile) {
  const int64_t left = work.kv_end - first;
  tile.first = first;
  tile.count = static_cast<int>(left < 0 ? 0 : (left < most ? left : most));
  const int32_t *table = params.block_tables + work.seq * params.block_table_stride;
  int64_t block = first / params.block_size;
  int64_t slot = first % params.block_size;
  for (int i = 0; i < tile.count;) {
    const int64_t physical = table[block];
    const int64_t k = physical * params.k_cache.block_stride;
    const int64_t v = physical * params.v_cache.block_stride;
    for (; slot < params.block_size && i < tile.count; ++slot, ++i) {
      tile.k[i] = k + slot * params.k_cache.token_stride;
      tile.v[i] = v + slot * params.v_cache.token_stride;
    }
    ++block;
    slot = 0;
  }
}

// The visible keys of each lane within the tile.  Both bounds grow with the row.
static void clip_panels(State &state, const TileKeys &tile) {
  const auto clip = [&](int64_t key) {
    const int64_t i = key - tile.first;
    return static_cast<int>(i < 0 ? 0 : (i > tile.count ? tile.count : i));
  };
  for (int p = 0; p < state.num_panels; ++p) {
    Panel &panel = state.panels[p];
    const int width = panel.lanes < kWidth ? kWidth : panel.lanes;
    for (int lane = 0; lane < width; ++lane) {
      const int row = lane % panel.lanes;
      const int64_t at = panel.first + (row < panel.rows ? row : panel.rows - 1);
      panel.begin[lane] = clip(state.visible_begin[at]);
      panel.end[lane] = clip(state.visible_end[at]);
    }
    panel.any_begin = panel.begin[0];
    panel.all_end = panel.end[0];
    panel.all_begin = panel.begin[panel.rows - 1];
    panel.any_end = panel.end[panel.rows - 1];
  }
}

// A count known at compile time, as an argument.
template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f with Count<0> to Count<kCount - 1>, in turn.
template <int kCount, class F>
PA_INLINE void each(F f) {
  if constexpr (kCount > 0) {
    each<kCount - 1>(f);
    f(Count<kCount - 1>{});
  }
}

// Calls f with Count<n>, 1 <= n <= kMax.
template <int kMax, class F>
PA_INLINE void with_count(int64_t n, F f) {
  if constexpr (kMax > 1) {
    if (n < kMax) {
      with_count<kMax - 1>(n, f);
      return;
    }
  }
  f(Count<kMax>{});
}

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
