// Many query rows over bfloat16 (prefill, large groups), on AMX's tile registers.
//
// SPDX-License-Identifier: Apache-2.0
//
// Keys and values of a chunk are packed as tiles once, for all rows of the item: keys as they are, values transposed.
// Then panel after panel of 32 rows goes over them, 64 keys at a time for scores and weights, up to 256 for values: so
// what is written, scores, weights and sums, stays in L1, where storing a tile takes a quarter of the time that it does
// to L2, while keys and values stream from L2.  Queries keep their 8 bits of precision: what multiplies a score is left
// to the softmax.
//
// Of the time at 8192 keys on an Emerald Rapids core about half are the products, with their tiles' loads, and a
// quarter the softmax.  Instructions of the two in turns gain nothing: a product keeps one of the two ports for
// vectors.
#pragma once

#include "kernels/attention_packed.h"
#include "kernels/tile_pack.h"
#include "kernels/tile_products.h"
#include "kernels/tile_weights.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

#if defined(PAGEDATTN_TILES)

// Heads of few rows are padded to panels, the more of them the fewer rows they have.
static_assert(kMaxStateRows / 9 * kMaxLanes <= kMaxTiledHeadRows && max_direct_rows(DType::kBFloat16) == 8);

// Keys that are packed at once.  Those of several heads are read together, so fewer stay in L2.
static int64_t tile_chunk_keys(const State &state) { return state.num_heads == 1 ? kMaxChunkKeys : kTileKeys; }

static void start_tiles(const AttentionParams &params, const AttentionWork &work, State &state) {
  for (int64_t head = 0; head < state.num_heads; ++head) {
    for (int p = 0; p < state.num_panels; ++p) {
      pack_queries(params, work, state, head, state.panels[p]);
      state.online[head * state.num_panels + p].started = false;
    }
  }
  constexpr TileShape kFull{16, 64};
  configure_tiles({kFull, kFull, kFull, kFull, kFull, kFull, kFull, kFull});
}

// Panels that saw no key have no sums yet.
static void clear_sums_of_no_key(const State &state) {
  for (int64_t head = 0; head < state.num_heads; ++head) {
    for (int p = 0; p < state.num_panels; ++p) {
      if (state.online[head * state.num_panels + p].started) continue;
      float *acc = state.acc + (head * state.lanes + state.panels[p].first_lane) * state.lane_dims;
      __builtin_memset(acc, 0, static_cast<size_t>(kMaxLanes * state.lane_dims) * sizeof(float));
    }
  }
}

static void finish_tiles() { release_tiles(); }

// A panel and up to kStepKeys keys of a chunk.
struct Unit {
  int panel;
  int from, to;  // multiples of 32
};
// Keys that have weights for a panel, whose values are yet to be added.
struct Batch {
  int panel;
  int from, to;
};

// Steps to the next unit; false behind the last.
static bool next_unit(const State &state, Unit &unit) {
  int from = unit.from + kStepKeys;
  for (; unit.panel < state.num_panels; ++unit.panel) {
    const Panel &panel = state.panels[unit.panel];
    const int first = panel.any_begin / kStepKeys * kStepKeys;
    if (from < first) from = first;
    if (from < panel.any_end) {
      const int end = static_cast<int>(round_up(panel.any_end, kTileDepth));
      unit.from = from;
      unit.to = end < from + kStepKeys ? end : from + kStepKeys;
      return true;
    }
    from = 0;
  }
  return false;
}

// One head's way over a chunk.
class ChunkOfHead {
 public:
  ChunkOfHead(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &chunk,
              int64_t head, const bool *odd, bool any_odd, Fetch<BFloat16> &keys_ahead, Fetch<BFloat16> &values_ahead,
              int lines)
      : params_(params),
        work_(work),
        state_(state),
        chunk_(chunk),
        head_(head),
        odd_(odd),
        any_odd_(any_odd),
        keys_ahead_(keys_ahead),
        values_ahead_(values_ahead),
        lines_(lines),
        dims_(static_cast<int>(state.lane_dims)),
        scale_(query_factor(params, work.head_begin + head)),
        adjusted_(params.softcap > 0.0f || params.alibi_slopes != nullptr),
        scores_(state.scores),
        pairs_(state.scores + kStepKeys * kMaxLanes) {}

  void run() {
    Batch batch{};
    for (Unit unit{0, -kStepKeys, 0}; next_unit(state_, unit);) {
      if (unit.panel != batch.panel || unit.to - batch.from > kBatchKeys) {
        add_values(batch);
        batch = {unit.panel, unit.from, unit.from};
      }
      keys_ahead_.lines(lines_);
      values_ahead_.lines(lines_);
      score(unit);
      weigh(unit, batch);
    }
    add_values(batch);
  }

 private:
  // What scores are yet to be multiplied by once they are adjusted.
  float factor() const { return adjusted_ ? 1.0f : scale_; }
  Online &online_of(int panel) const { return state_.online[head_ * state_.num_panels + panel]; }
  float *acc_of(int panel) const {
    return state_.acc + (head_ * state_.lanes + state_.panels[panel].first_lane) * dims_;
  }

  // Scores of a unit, with softcap, ALiBi and masks.
  __attribute__((noinline)) void score(const Unit &unit) const {
    const Panel &panel = state_.panels[unit.panel];
    const float *q = queries_of(state_, head_, panel);
    multiply_keys(reinterpret_cast<const char *>(q), state_.key_tiles + unit.from * 2 * dims_, dims_,
                  unit.to - unit.from, reinterpret_cast<char *>(scores_));
    const int count = (unit.to - unit.from) * kMaxLanes;
    if (adjusted_) scale_scores(scores_, count, scale_);
    if (params_.softcap > 0.0f) cap_scores(scores_, count, params_.softcap);
    float *const first = scores_ - unit.from * kMaxLanes;  // where the chunk's first key would have its scores
    if (params_.alibi_slopes != nullptr) {
      bias_scores(params_, work_, state_, chunk_, panel, head_, unit.from, unit.to, first);
    }
    if (panel.all_begin > unit.from || panel.all_end < unit.to) mask_scores(panel, unit.from, unit.to, first);
  }

  // Takes the weights of a unit into a batch.
  void weigh(const Unit &unit, Batch &batch) const {
    Online &online = online_of(unit.panel);
    const int count = unit.to - unit.from;
    const Scores largest = largest_scores(scores_, count);
    if (asks_for_origin(largest, factor(), online)) {
      add_values(batch);
      raise_origin(largest, factor(), online);
      if (online.started) rescale_lanes<kVecsOfPanel>(acc_of(unit.panel), dims_, online.factor);
    }
    weigh_pairs(scores_, count, factor(), online, pairs_ + (unit.from - batch.from) / 2 * kMaxLanes);
    batch.to = unit.to;
    if (any_odd_) {
      add_values(batch);
      add_odd(unit, online);
    }
  }

  // Adds the values of a batch, which is then empty.
  __attribute__((noinline)) void add_values(Batch &batch) const {
    if (batch.from == batch.to) return;
    Online &online = online_of(batch.panel);
    multiply_values(reinterpret_cast<char *>(acc_of(batch.panel)), !online.started,
                    reinterpret_cast<const char *>(pairs_), state_.value_tiles + batch.from * 2 * kTileDepth,
                    kValueStride, dims_, batch.to - batch.from);
    online.started = true;
    batch.from = batch.to;
  }

  // The products of weights and values of odd keys, for the rows that see them.
  void add_odd(const Unit &unit, const Online &online) const {
    float *const acc = acc_of(unit.panel);
    const Panel &panel = state_.panels[unit.panel];
    const auto *v = head_data<BFloat16>(params_.v_cache, work_, head_);
    for (int j = unit.from; j < unit.to && j < panel.any_end; ++j) {
      if (!odd_[j]) continue;
      for (int lane = 0; lane < panel.rows; ++lane) {
        if (j < panel.begin[lane] || j >= panel.end[lane]) continue;
        const float x = scores_[(j - unit.from) * kMaxLanes + lane] * factor() - online.max[lane];
        const float weight = exp2_for_bfloat16(broadcast(x))[0];
        for (int d = 0; d < params_.head_dim; ++d) {
          acc[d * kMaxLanes + lane] += weight * load_partial<BFloat16>(v + chunk_.v[j] + d, 1)[0];
        }
      }
    }
  }

  const AttentionParams &params_;
  const AttentionWork &work_;
  State &state_;
  const TileKeys &chunk_;
  const int64_t head_;
  const bool *odd_;
  const bool any_odd_;
  Fetch<BFloat16> &keys_ahead_, &values_ahead_;
  const int lines_;  // of keys and of values to fetch at each unit
  const int dims_;
  const float scale_;
  const bool adjusted_;
  float *const scores_;  // [kStepKeys][lane]
  float *const pairs_;   // [kBatchKeys / 2][lane]
};

static int num_units(const State &state) {
  int count = 0;
  for (Unit unit{0, -kStepKeys, 0}; next_unit(state, unit);) ++count;
  return count;
}

static void tiles_chunk(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &chunk,
                        const TileKeys &next) {
  const int head_dim = params.head_dim;
  Fetch<BFloat16> keys_ahead(params.k_cache, work, next.k, next.count, head_dim);
  Fetch<BFloat16> values_ahead(params.v_cache, work, next.v, next.count, head_dim);
  const int lines = next.count * keys_ahead.lines_of_row(head_dim) / (num_units(state) + 1) + 1;
  for (int64_t head = 0; head < state.num_heads; ++head) {
    const auto *v = head_data<BFloat16>(params.v_cache, work, head);
    bool odd[kMaxChunkKeys];
    find_odd_keys<BFloat16>(v, state, chunk, head_dim, odd);
    bool any_odd = false;
    for (int j = 0; j < chunk.count; ++j) any_odd |= odd[j];
    pack_keys(head_data<BFloat16>(params.k_cache, work, head), chunk, head_dim, state.key_tiles);
    pack_values(v, chunk, head_dim, odd, state.value_tiles);
    ChunkOfHead(params, work, state, chunk, head, odd, any_odd, keys_ahead, values_ahead, lines).run();
  }
}

#else

// No such registers.
static int64_t tile_chunk_keys(const State &) { return kTileKeys; }
static void start_tiles(const AttentionParams &, const AttentionWork &, State &) {}
static void tiles_chunk(const AttentionParams &, const AttentionWork &, State &, const TileKeys &, const TileKeys &) {}
static void clear_sums_of_no_key(const State &) {}
static void finish_tiles() {}

#endif

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
