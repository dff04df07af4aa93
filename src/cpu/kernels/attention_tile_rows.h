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
// Of so many keys each, or fewer where blocks hold no whole 16.
static int keys_of_group(const AttentionParams &params) {
  return params.block_size % kTileRows == 0 ? kTileRows : kTileRows / 2;
}
constexpr int kGroupsAtOnce = 2;  // of keys, that queries are loaded for

// What lies in L2 already is not fetched: that would take a fifth of the time.  How long the scores of a tile take
// tells it, in ticks of the processor's clock (about 0.4 ns) for 1024 bytes of keys: from L2 60 to 75 in the first
// tile, whose code and queries are cold, and 25 to 40 later; from L3 150 and 80 at least; where L2 holds most, 90 to
// 140 and 40 to
// 70.  In the wrong the one costs a twentieth, the other a fifth.
constexpr uint64_t kNearTicksAtFirst = 150;
constexpr uint64_t kNearTicks = 85;
// What the thread's last item found: the next one's first tile is likely to find the same.
static thread_local bool near_at_last = false;

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
      : size_(keys_of_group(params)), offsets_(offsets), begin_(begin), end_(end) {
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

// Operands that the next head but one takes the place of.
static uint32_t *latest_weights_of(const State &state, int64_t head) { return weights_of(state, head % 2); }
// Whether all rows see the same keys of the tile.
static bool rows_agree(const Panel &panel) {
  return panel.all_begin == panel.any_begin && panel.all_end == panel.any_end;
}

// Sums of one head, [32 dimensions][even, odd][lane][16]: where both halves fit into one tile register, a product of
// weights with and without zeros before them makes both.
constexpr bool joined(int lanes) { return 2 * lanes <= kTileRows; }
// Calls f with Count<registers that both halves take>.
template <class F>
PA_INLINE void with_halves(int lanes, F f) {
  if (joined(lanes))
    f(Count<1>{});
  else
    f(Count<2>{});
}
constexpr int64_t sums_of_block(int lanes) { return 2 * lanes * kWidth; }
static float *sums_of(const State &state, int64_t head, int head_dim) {
  return state.acc + head * state.lanes * head_dim;
}

// Tile registers.  Taking them into use takes as long as 20 products, so an item does it once, for scores and for
// values alike; keys and values share theirs.
constexpr int kScores = 0, kQueries = kScores + kGroupsAtOnce, kKeysOrValues = kQueries + 1;
constexpr int kMostSums = 2;  // in registers
// By the number of registers that the halves of a weight take.
constexpr int first_sum(int halves) { return 8 - halves - kMostSums; }
constexpr int first_weights(int halves) { return 8 - halves; }
constexpr int keys_or_values(int halves) { return first_sum(halves) - kKeysOrValues; }

static TileShape lane_shape(const Panel &panel, int rows) {
  return {static_cast<uint8_t>(rows), static_cast<uint16_t>(4 * panel.lanes)};
}

static void configure_tile_rows(const AttentionParams &params, const Panel &panel) {
  const auto size = static_cast<uint8_t>(keys_of_group(params));
  const TileShape scores = lane_shape(panel, size), queries = lane_shape(panel, kTileRows), keys{size, 64};
  // Of a weight's halves the second may end with the last row.
  const auto left_rows = static_cast<uint8_t>(joined(panel.lanes) ? panel.lanes + panel.rows : panel.rows);
  const TileShape sums{left_rows, 64}, weights{left_rows, static_cast<uint16_t>(4 * size)};
  static_assert(kScores == 0 && kGroupsAtOnce == 2 && kMostSums == 2);
  if (joined(panel.lanes))
    configure_tiles({scores, scores, queries, keys, keys, sums, sums, weights});
  else
    configure_tiles({scores, scores, queries, keys, sums, sums, weights, weights});
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
  configure_tile_rows(params, state.panels[0]);
  state.near = near_at_last;
  const int64_t size = state.num_heads * state.lanes * head_dim;
  __builtin_memset(state.acc, 0, static_cast<size_t>(size) * sizeof(float));
}

// Scores of kGroups groups of keys, [key][lane].
template <int kGroups, int kHalves>
PA_KERNEL void row_scores(const float *q, const TileSource *keys, int size, int head_dim, int lanes, float *s,
                          Fetch<BFloat16> &fetch) {
  const int64_t lane_stride = 4 * lanes;
  each<kGroups>([&](auto g) { tile_zero<kScores + g.value>(); });
  for (int d = 0; d < head_dim; d += kTileDepth) {
    tile_load<kQueries>(q + d / 2 * lanes, lane_stride);
    each<kGroups>([&](auto g) {
      constexpr int kKey = kKeysOrValues + g.value % keys_or_values(kHalves);
      tile_load<kKey>(keys[g.value].data + d, keys[g.value].stride);
      tile_multiply<kScores + g.value, kKey, kQueries>();
      fetch.lines(size);
    });
  }
  each<kGroups>([&](auto g) { tile_store<kScores + g.value>(s + g.value * size * lanes, lane_stride); });
}

// sums += weights * values of the groups [from, to), for kBlocks times 32 dimensions from `d` on; kHalves tiles hold
// the sums of 32 dimensions.
template <int kHalves, int kBlocks>
PA_KERNEL void add_row_values(float *sums, const uint32_t *weights, int lanes, const TileSource *values, int size,
                              int from, int to, int d, Fetch<BFloat16> &fetch) {
  constexpr int kSums = kHalves * kBlocks, kSum = first_sum(kHalves), kWeights = first_weights(kHalves);
  static_assert(kSums <= kMostSums);
  const int lines = size * kValuesShare / kFetchShares;
  const int64_t size_of_sums = sums_of_block(lanes) / kHalves;
  each<kSums>([&](auto i) { tile_load<kSum + i.value>(sums + i.value * size_of_sums, 64); });
  for (int g = from; g < to; ++g) {
    const int first = g * size;
    const uint32_t *const left = weights + first / kTileRows * 2 * lanes * kWidth + first % kTileRows;
    each<kHalves>([&](auto i) { tile_load<kWeights + i.value>(left + i.value * lanes * kWidth, 64); });
    each<kBlocks>([&](auto b) {
      constexpr int kValue = kKeysOrValues + b.value % keys_or_values(kHalves);
      tile_load<kValue>(values[g].data + d + b.value * kTileDepth, values[g].stride);
      each<kHalves>([&](auto i) { tile_multiply<kSum + kHalves * b.value + i.value, kWeights + i.value, kValue>(); });
      fetch.lines(lines);
    });
  }
  each<kSums>([&](auto i) { tile_store<kSum + i.value>(sums + i.value * size_of_sums, 64); });
}

// acc += weight * value over the keys [begin, end) of the tile, for one row.
static void add_values_alone(const uint16_t *v, const TileKeys &tile, int begin, int end, int head_dim,
                             const float *weights, int lanes, float *sums) {
  for (int j = begin; j < end; ++j) {
    const Vec weight = broadcast(weights[j * lanes]);
    float *even_sums = sums, *odd_sums = sums + lanes * kWidth;
    for (int d = 0; d < head_dim; d += 2 * kWidth) {
      Vec even, odd;
      BFloat16::load_pair(v + tile.v[j] + d, even, odd);
      store(even_sums, fma(weight, even, load(even_sums)));
      store(odd_sums, fma(weight, odd, load(odd_sums)));
      even_sums += sums_of_block(lanes);
      odd_sums += sums_of_block(lanes);
    }
  }
}

static void score_rows(const AttentionParams &params, const AttentionWork &work, const State &state,
                       const TileKeys &tile, Fetch<BFloat16> &fetch) {
  const int head_dim = params.head_dim;
  const Panel &panel = state.panels[0];
  const Groups groups(params, tile.k, panel.any_begin, panel.any_end);
  uint16_t *const copies = reinterpret_cast<uint16_t *>(state.key_tiles);
  const auto score = [&](auto count, int g) {
    constexpr int kGroups = decltype(count)::value;
    for (int64_t head = 0; head < state.num_heads; ++head) {
      const uint16_t *const k = head_data<BFloat16>(params.k_cache, work, head);
      TileSource sources[kGroups];
      for (int i = 0; i < kGroups; ++i) {
        sources[i] = groups.source(k, g + i, head_dim, copies + i * groups.size() * head_dim);
      }
      with_halves(panel.lanes, [&](auto halves) {
        row_scores<kGroups, decltype(halves)::value>(state.q + head * state.lanes * (head_dim / 2), sources,
                                                     groups.size(), head_dim, panel.lanes,
                                                     scores_of(state, head) + g * groups.size() * panel.lanes, fetch);
      });
    }
  };
  int g = groups.first();
  for (; g + kGroupsAtOnce <= groups.last(); g += kGroupsAtOnce) score(Count<kGroupsAtOnce>{}, g);
  for (; g < groups.last(); ++g) score(Count<1>{}, g);
}

// Scores of one head to left operands.  What only some rows see is added alone, and becomes zeros.
template <int kLanes>
static void weigh_head(const AttentionParams &params, const AttentionWork &work, const State &state,
                       const TileKeys &tile, int64_t head, Fetch<BFloat16> &fetch) {
  const Panel &panel = state.panels[0];
  float *const s = scores_of(state, head);
  float *const sums = sums_of(state, head, params.head_dim);
  uint32_t *const weights = latest_weights_of(state, head);
  const int from = panel.any_begin / kTileRows * kTileRows;
  const int to = static_cast<int>(round_up(panel.any_end, kTileRows));
  const int keys = keys_of_vec(panel);
  const float scale = finish_scores(params, work, state, tile, panel, head, from / keys, to / keys,
                                    query_factor(params, work.head_begin + head), s);
  Online &online = state.online[head];
  const bool agree = rows_agree(panel);
  if (weigh_rows<SpreadWeights, kLanes>(s, from, to, scale, params.head_dim, online, weights, !agree, fetch)) {
    rescale_rows(sums, params.head_dim, kLanes, online.factor);
  }
  if (agree) return;
  const uint16_t *const v = head_data<BFloat16>(params.v_cache, work, head);
  for_visible_keys(
      panel, [](int, int) {},
      [&](int r, int begin, int end) {
        add_values_alone(v, tile, begin, end, params.head_dim, s + r, kLanes, sums + r * kWidth);
      });
  keep_weights<SpreadWeights, kLanes>(s, from, to, panel.all_begin, panel.all_end, weights);
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
  float *const sums = sums_of(state, head, head_dim);
  const auto lanes = static_cast<int>(state.lanes);
  const auto columns = [&](auto halves, auto blocks, int d) {
    add_row_values<decltype(halves)::value, decltype(blocks)::value>(
        sums + d / kTileDepth * sums_of_block(lanes), latest_weights_of(state, head), lanes, values, groups.size(),
        groups.first(), groups.last(), d, fetch);
  };
  const auto all_columns = [&](auto halves) {
    constexpr int kBlocks = 2 / decltype(halves)::value;
    int d = 0;
    for (; d + kBlocks * kTileDepth <= head_dim; d += kBlocks * kTileDepth) columns(halves, Count<kBlocks>{}, d);
    for (; d < head_dim; d += kTileDepth) columns(halves, Count<1>{}, d);
  };
  with_halves(lanes, all_columns);
}

// Scores of all heads, then the weights of each head and after them the values of the head before: what a head stores
// is not loaded before another had its turn, and operands stay in L1.
static void tile_rows_tile(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &tile,
                           const TileKeys &next) {
  const Panel &panel = state.panels[0];
  if (panel.any_begin >= panel.any_end) return;
  const int head_dim = params.head_dim;
  Fetch<BFloat16> values_ahead, keys_ahead;
  if (!state.near) values_ahead = {params.v_cache, work, tile.v, tile.count, head_dim};
  const uint64_t start = __builtin_ia32_rdtsc();
  score_rows(params, work, state, tile, values_ahead);
  const uint64_t ticks = __builtin_ia32_rdtsc() - start;
  const bool first = tile.first == work.kv_begin;
  const auto bytes = static_cast<uint64_t>(tile.count * state.num_heads * head_dim * 2);
  if (first || state.near) state.near = ticks * 1024 < (first ? kNearTicksAtFirst : kNearTicks) * bytes;
  if (!state.near) keys_ahead = {params.k_cache, work, next.k, next.count, head_dim};
  const bool common = panel.all_begin < panel.all_end;
  const Groups groups(params, tile.v, common ? panel.all_begin : 0, common ? panel.all_end : 0);
  for (int64_t head = 0; head <= state.num_heads; ++head) {
    if (head < state.num_heads) {
      with_lanes(panel.lanes,
                 [&](auto count) { weigh_head<decltype(count)::value>(params, work, state, tile, head, keys_ahead); });
    }
    if (head > 0 && common) multiply_values(params, work, state, groups, head - 1, keys_ahead);
  }
}

// Sums to rows in pair order, as other ways leave them, which take the queries' place.  Returns whether none is NaN.
static bool finish_tile_rows(const AttentionParams &params, State &state) {
  const auto lanes = static_cast<int>(state.lanes);
  VecI odd = {};
  for (int64_t head = 0; head < state.num_heads; ++head) {
    for (int64_t row = 0; row < state.rows; ++row) {
      const float *src = sums_of(state, head, params.head_dim) + row * kWidth;
      float *const dst = state.q + (head * state.rows + row) * state.row_stride;
      for (int d = 0; d < params.head_dim; d += kWidth, src += lanes * kWidth) {
        const Vec x = load(src);
        odd |= x != x;
        store(dst + d, x);
      }
    }
  }
  state.acc = state.q;
  near_at_last = state.near;
  return !any(odd);
}

#else

// No such registers.
static bool finish_tile_rows(const AttentionParams &, State &) { return true; }
static int64_t tile_rows_keys(const AttentionParams &) { return kTileKeys; }
static void start_tile_rows(const AttentionParams &, const AttentionWork &, State &) {}
static void tile_rows_tile(const AttentionParams &, const AttentionWork &, State &, const TileKeys &,
                           const TileKeys &) {}

#endif

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
