// A tile for few query rows over bfloat16 (decode), on AMX's tile registers.
//
// SPDX-License-Identifier: Apache-2.0
//
// S^T = K Q^T and O += P V for up to 16 rows of a KV head at once, with nothing packed: sixteen keys, or values, are
// the rows of a tile as they lie in the cache, one token stride apart.  A row of keys is a left operand as it is.  A
// row of values, as a right operand, holds pairs of neighbouring dimensions where the product wants pairs of keys; so
// each weight goes in twice, once with a zero behind it, for the even dimensions, and once with a zero before it, for
// the odd ones.  The multiplier then does twice the work, which it has time for, and results are in bfloat16's pair
// order.
//
// Such a zero does not cancel what is not finite in a neighbouring dimension.  An item with such a result is computed
// again without tiles.
//
// Memory is the bound, and rests soon after nothing is asked of it: a core has some 16 lines in flight, which are there
// within 40 to 70 ns.  So lines are fetched in all parts of the work, about as many as are used: during the scores the
// values of the same tile, during weights and values the keys of the next.  The processor's own prefetchers help along
// as long as few pages are in use at once, so scores go block by block.
#pragma once

#include "kernels/attention_direct.h"
#include "kernels/attention_tiles.h"
#include "kernels/tile_row_weights.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

#if defined(PAGEDATTN_TILES)

// Of keys, or of values, in a tile: what is loaded and stored once a tile and head, sums above all, then counts little,
// and what is used and what is fetched fit into half an L2 of 2 MiB.
constexpr int64_t kTileRowsBytes = 128 * 1024;
constexpr int kMaxGroups = kTileKeys / (kTileRows / 2);

// Keys of a tile; a function of the call's shape, as sums follow it.
static int64_t tile_rows_keys(const AttentionParams &params) {
  const int64_t keys = kTileRowsBytes / (params.num_kv_heads * params.head_dim * 2) / kTileRows * kTileRows;
  return keys < kTileRows ? kTileRows : (keys > kTileKeys ? kTileKeys : keys);
}

// Some keys or values of one KV head, as a tile's rows.
struct TileSource {
  const uint16_t *data;
  int64_t stride;  // bytes
};

// Groups of 16 keys of a tile, or of 8 where blocks hold no whole 16, of which those in [begin, end) count.
class Groups {
 public:
  Groups(const AttentionParams &params, const int64_t *offsets, int begin, int end)
      : size_(params.block_size % kTileRows == 0 ? kTileRows : kTileRows / 2),
        offsets_(offsets),
        begin_(begin),
        end_(end) {
    for (int g = first(); g < last(); ++g) {
      const int64_t *at = offsets + g * size_;
      const bool whole = g * size_ >= begin && (g + 1) * size_ <= end;
      stride_[g] = whole ? at[1] - at[0] : kScattered;
      for (int i = 2; whole && i < size_; ++i) {
        if (at[i] - at[i - 1] != stride_[g]) stride_[g] = kScattered;
      }
    }
  }

  int size() const { return size_; }
  int first() const { return begin_ / size_; }
  int last() const { return (end_ + size_ - 1) / size_; }

  // Where a group lies: in the cache, if at equal distances, else in `copy`, with zeros for what does not count.
  TileSource source(const uint16_t *data, int g, int head_dim, uint16_t *copy) const {
    if (stride_[g] != kScattered) return {data + offsets_[g * size_], 2 * stride_[g]};
    for (int i = 0; i < size_; ++i) {
      const int j = g * size_ + i;
      for (int d = 0; d < head_dim; d += kTileDepth) {
        const bool counts = j >= begin_ && j < end_;
        store_as(copy + i * head_dim + d, counts ? load_as<VecU>(data + offsets_[j] + d) : VecU{});
      }
    }
    return {copy, 2 * head_dim};
  }

 private:
  static constexpr int64_t kScattered = INT64_MIN;

  int size_;
  const int64_t *offsets_;
  int begin_, end_;
  int64_t stride_[kMaxGroups];  // elements
};

// Calls f with Count<lanes>.
template <class F>
PA_INLINE void with_lanes(int lanes, F f) {
  if (lanes == 1)
    f(Count<1>{});
  else if (lanes == 2)
    f(Count<2>{});
  else if (lanes == 4)
    f(Count<4>{});
  else if (lanes == 8)
    f(Count<8>{});
  else
    f(Count<16>{});
}

static float *scores_of(const State &state, int64_t head) { return state.scores + head * state.lanes * kTileKeys; }
static uint32_t *weights_of(const State &state, int64_t head) {
  return state.weights + head * 2 * state.lanes * kTileKeys;
}

// Queries as pairs of dimensions, [head][pair][lane], with zeros in lanes behind the last row; sums cleared.
static void start_tile_rows(const AttentionParams &params, const AttentionWork &work, State &state) {
  const int head_dim = params.head_dim;
  const int rows = static_cast<int>(state.rows);
  with_lanes(static_cast<int>(state.lanes), [&](auto count) {
    constexpr int kLanes = decltype(count)::value;
    constexpr int kStages = kLanes == 16 ? 4 : (kLanes == 8 ? 3 : kLanes / 2);
    for (int64_t head = 0; head < state.num_heads; ++head) {
      float *const q = state.q + head * kLanes * (head_dim / 2);
      const uint16_t *src[kLanes];
      for (int r = 0; r < rows; ++r) {
        const QueryRow at = query_row(state, work, head, r);
        src[r] = static_cast<const uint16_t *>(params.q.data) + at.token * params.q.token_stride +
                 at.head * params.q.head_stride;
      }
      for (int d = 0; d < head_dim; d += kTileDepth) {
        Vec pairs[kLanes] = {};
        for (int r = 0; r < rows; ++r) pairs[r] = load_as<Vec>(src[r] + d);
        rotate(pairs, kStages);
        for (int i = 0; i < kLanes; ++i) store(q + d / 2 * kLanes + i * kWidth, pairs[i]);
      }
    }
  });
  const int64_t size = state.num_heads * state.rows * state.row_stride;
  __builtin_memset(state.acc, 0, static_cast<size_t>(size) * sizeof(float));
}

// Scores of a group of keys, [key][lane].
PA_KERNEL void row_scores(const float *q, const TileSource &keys, int size, int head_dim, int lanes, float *s,
                          Fetch<BFloat16> &fetch) {
  const int64_t lane_stride = 4 * lanes;
  tile_zero<0>();
  for (int d = 0; d < head_dim; d += kTileDepth) {
    tile_load<1>(q + d / 2 * lanes, lane_stride);
    tile_load<2>(keys.data + d, keys.stride);
    tile_multiply<0, 2, 1>();
    fetch.lines(size);
  }
  tile_store<0>(s, lane_stride);
}

// acc[row] += weights * values of the groups [from, to), for kBlocks times 32 dimensions from `d` on.
template <int kBlocks>
PA_KERNEL void add_row_values(float *acc, int64_t acc_stride, const uint32_t *weights, int lanes,
                              const TileSource *values, int size, int from, int to, int d, Fetch<BFloat16> &fetch) {
  const int lines = size * kValuesShare / kFetchShares;
  tile_load<0>(acc, acc_stride);
  tile_load<1>(acc + kWidth, acc_stride);
  if constexpr (kBlocks > 1) {
    tile_load<2>(acc + 2 * kWidth, acc_stride);
    tile_load<3>(acc + 3 * kWidth, acc_stride);
  }
  for (int g = from; g < to; ++g) {
    const int first = g * size;
    const uint32_t *const left = weights + first / kTileRows * 2 * lanes * kWidth + first % kTileRows;
    tile_load<4>(left, 64);
    tile_load<5>(left + lanes * kWidth, 64);
    tile_load<6>(values[g].data + d, values[g].stride);
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 5, 6>();
    fetch.lines(lines);
    if constexpr (kBlocks > 1) {
      tile_load<7>(values[g].data + d + kTileDepth, values[g].stride);
      tile_multiply<2, 4, 7>();
      tile_multiply<3, 5, 7>();
      fetch.lines(lines);
    }
  }
  tile_store<0>(acc, acc_stride);
  tile_store<1>(acc + kWidth, acc_stride);
  if constexpr (kBlocks > 1) {
    tile_store<2>(acc + 2 * kWidth, acc_stride);
    tile_store<3>(acc + 3 * kWidth, acc_stride);
  }
}

// acc += weight * value over the keys [begin, end) of the tile, for one row.
static void add_values_alone(const uint16_t *v, const TileKeys &tile, int begin, int end, int head_dim,
                             const float *weights, int lanes, float *acc) {
  for (int j = begin; j < end; ++j) {
    const Vec weight = broadcast(weights[j * lanes]);
    for (int d = 0; d < head_dim; d += 2 * kWidth) {
      Vec even, odd;
      BFloat16::load_pair(v + tile.v[j] + d, even, odd);
      store(acc + d, fma(weight, even, load(acc + d)));
      store(acc + d + kWidth, fma(weight, odd, load(acc + d + kWidth)));
    }
  }
}

static TileShape lane_shape(const Panel &panel, int rows) {
  return {static_cast<uint8_t>(rows), static_cast<uint16_t>(4 * panel.lanes)};
}

static void score_rows(const AttentionParams &params, const AttentionWork &work, const State &state,
                       const TileKeys &tile, Fetch<BFloat16> &fetch) {
  const int head_dim = params.head_dim;
  const Panel &panel = state.panels[0];
  const Groups groups(params, tile.k, panel.any_begin, panel.any_end);
  const TileShape queries = lane_shape(panel, kTileRows), scores = lane_shape(panel, groups.size());
  const TileShape keys{static_cast<uint8_t>(groups.size()), 64}, unused = keys;
  configure_tiles({scores, queries, keys, unused, unused, unused, unused, unused});
  uint16_t *const copy = reinterpret_cast<uint16_t *>(state.key_tiles);
  for (int g = groups.first(); g < groups.last(); ++g) {
    for (int64_t head = 0; head < state.num_heads; ++head) {
      const uint16_t *const k = head_data<BFloat16>(params.k_cache, work, head);
      row_scores(state.q + head * state.lanes * (head_dim / 2), groups.source(k, g, head_dim, copy), groups.size(),
                 head_dim, panel.lanes, scores_of(state, head) + g * groups.size() * panel.lanes, fetch);
    }
  }
}

// Scores of one head to left operands.  What only some rows see is added alone, and becomes zeros.
template <int kLanes>
static void weigh_head(const AttentionParams &params, const AttentionWork &work, const State &state,
                       const TileKeys &tile, int64_t head, Fetch<BFloat16> &fetch) {
  const Panel &panel = state.panels[0];
  float *const s = scores_of(state, head);
  float *const acc = state.acc + head * state.rows * state.row_stride;
  uint32_t *const weights = weights_of(state, head);
  const int from = panel.any_begin / kTileRows * kTileRows;
  const int to = static_cast<int>(round_up(panel.any_end, kTileRows));
  const int keys = keys_of_vec(panel);
  const float scale = finish_scores(params, work, state, tile, panel, head, from / keys, to / keys,
                                    query_factor(params, work.head_begin + head), s);
  Online &online = state.online[head];
  if (weigh_rows<kLanes>(s, from, to, scale, params.head_dim, online, weights, fetch)) {
    rescale_rows(acc, state.row_stride, panel.rows, online.factor);
  }
  if (panel.all_begin == panel.any_begin && panel.all_end == panel.any_end) return;
  const uint16_t *const v = head_data<BFloat16>(params.v_cache, work, head);
  for_visible_keys(
      panel, [](int, int) {},
      [&](int r, int begin, int end) {
        add_values_alone(v, tile, begin, end, params.head_dim, s + r, kLanes, acc + r * state.row_stride);
      });
  keep_weights<kLanes>(s, from, to, panel.all_begin, panel.all_end, weights);
}

// The products of weights and values that all rows see.
static void multiply_values(const AttentionParams &params, const AttentionWork &work, const State &state,
                            const Groups &groups, int64_t head, Fetch<BFloat16> &fetch) {
  const int head_dim = params.head_dim;
  const uint16_t *const v = head_data<BFloat16>(params.v_cache, work, head);
  uint16_t *const copies = reinterpret_cast<uint16_t *>(state.key_tiles);
  TileSource values[kMaxGroups];
  for (int g = groups.first(); g < groups.last(); ++g) {
    values[g] = groups.source(v, g, head_dim, copies + g * groups.size() * head_dim);
  }
  float *const acc = state.acc + head * state.rows * state.row_stride;
  const auto columns = [&](auto count, int d) {
    add_row_values<decltype(count)::value>(acc + d, 4 * state.row_stride, weights_of(state, head),
                                           static_cast<int>(state.lanes), values, groups.size(), groups.first(),
                                           groups.last(), d, fetch);
  };
  int d = 0;
  for (; d + 2 * kTileDepth <= head_dim; d += 2 * kTileDepth) columns(Count<2>{}, d);
  if (d < head_dim) columns(Count<1>{}, d);
}

// Scores of all heads, then their weights, then values: what a head stores is not loaded before others had their turn.
static void tile_rows_tile(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &tile,
                           const TileKeys &next) {
  const Panel &panel = state.panels[0];
  if (panel.any_begin >= panel.any_end) return;
  const int head_dim = params.head_dim;
  Fetch<BFloat16> values_ahead(params.v_cache, work, tile.v, tile.count, head_dim);
  Fetch<BFloat16> keys_ahead(params.k_cache, work, next.k, next.count, head_dim);
  score_rows(params, work, state, tile, values_ahead);
  with_lanes(panel.lanes, [&](auto count) {
    for (int64_t head = 0; head < state.num_heads; ++head) {
      weigh_head<decltype(count)::value>(params, work, state, tile, head, keys_ahead);
    }
  });
  if (panel.all_begin >= panel.all_end) return;
  const Groups groups(params, tile.v, panel.all_begin, panel.all_end);
  const auto num_rows = static_cast<uint8_t>(panel.rows), size = static_cast<uint8_t>(groups.size());
  const TileShape sums{num_rows, 64}, weights{num_rows, static_cast<uint16_t>(4 * size)}, values{size, 64};
  configure_tiles({sums, sums, sums, sums, weights, weights, values, values});
  for (int64_t head = 0; head < state.num_heads; ++head) {
    multiply_values(params, work, state, groups, head, keys_ahead);
  }
}

// Whether no result is NaN.
static bool tile_rows_hold(const State &state) {
  const int64_t size = state.num_heads * state.rows * state.row_stride;
  VecI odd = {};
  for (int64_t i = 0; i < size; i += kWidth) {
    const Vec x = load(state.acc + i);
    odd |= x != x;
  }
  return !any(odd);
}

#else

// No such registers.
static bool tile_rows_hold(const State &) { return true; }
static int64_t tile_rows_keys(const AttentionParams &) { return kTileKeys; }
static void start_tile_rows(const AttentionParams &, const AttentionWork &, State &) {}
static void tile_rows_tile(const AttentionParams &, const AttentionWork &, State &, const TileKeys &,
                           const TileKeys &) {}

#endif

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
