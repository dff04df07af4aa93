// Many query rows (prefill, large groups), by products of bfloat16: on AMX's tile registers, or in vectors of pairs.
//
// SPDX-License-Identifier: Apache-2.0
//
// Keys and values of a chunk are packed as tiles once, for all rows of the item: keys as they are, values transposed.
// Then panel after panel of 32 rows goes over them, 64 keys at a time for scores and weights, up to 256 for values: so
// what is written, scores, weights and sums, stays in L1, where storing a tile takes a quarter of the time that it does
// to L2, while keys and values stream from L2.  Queries of 8 and 16 bits keep their precision: what multiplies a score
// is left to the softmax.
//
// Other types are sums of parts in bfloat16 (tile_parts.h); what multiplies a score is folded into queries of float32
// alone, as it is in their kernels without tiles.  Where parts are not exact, or several of something not finite, the
// item is computed again without tiles.
//
// Of the time at 8192 keys of bfloat16 on an Emerald Rapids core about half are the products, with their tiles' loads,
// and a quarter the softmax.  Instructions of the two in turns gain nothing there: a product keeps one of the two ports
// for vectors.  The products of parts are many enough to hide the softmax.
//
// Without tile registers (avx512_bf16) panels are 48 rows, the products those of pair_products.h, and of bfloat16
// alone.
#pragma once

#include "kernels/attention_packed.h"
#include "kernels/pair_products.h"
#include "kernels/tile_pack.h"
#include "kernels/tile_products.h"
#include "kernels/tile_weights.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

// Whether queries and keys stay in the order in which they lie, one part each.
template <class T>
constexpr bool kAsTheyLie = false;
template <>
constexpr bool kAsTheyLie<BFloat16> = true;
// Whether there are products of those alone.
#if defined(PAGEDATTN_BFLOAT16_PRODUCTS) && !defined(PAGEDATTN_TILES)
constexpr bool kOnlyAsTheyLie = true;
#else
constexpr bool kOnlyAsTheyLie = false;
#endif

#if defined(PAGEDATTN_BFLOAT16_PRODUCTS)

// Heads of few rows are padded to panels, the more of them the fewer rows they have.
#if defined(PAGEDATTN_TILES)
static_assert(kMaxStateRows / 9 * kMaxLanes <= kMaxTiledHeadRows && max_direct_rows(DType::kBFloat16) == 8);
#else
static_assert(kMaxStateRows / kMinPairRows * kMaxLanes <= kMaxTiledHeadRows);
#endif

// Keys that are packed at once.  Those of several heads are read together, so fewer stay in L2.
template <int kParts>
static int64_t tile_chunk_keys(const State &state) {
  return state.num_heads == 1 ? kChunkKeys<kParts> : kTileKeys;
}

// Whether tiles can go on.
template <class T, int kParts>
static bool start_tiles(const AttentionParams &params, const AttentionWork &work, State &state) {
  Range range;
  for (int64_t head = 0; head < state.num_heads; ++head) {
    const float factor = query_factor(params, work.head_begin + head);
    for (int p = 0; p < state.num_panels; ++p) {
      if constexpr (kAsTheyLie<T>) {
        pack_queries<T, kParts, true>(params, work, state, head, state.panels[p], factor, range);
      } else {
        with_dtype(params.q_dtype, [&](auto tag) {
          pack_queries<decltype(tag), kParts, false>(params, work, state, head, state.panels[p], factor, range);
        });
      }
      state.online[head * state.num_panels + p].started = false;
    }
  }
#if defined(PAGEDATTN_TILES)
  constexpr TileShape kFull{16, 64};
  configure_tiles({kFull, kFull, kFull, kFull, kFull, kFull, kFull, kFull});
#endif
  return range.holds();
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

static void finish_tiles() {
#if defined(PAGEDATTN_TILES)
  release_tiles();
#endif
}

// A panel and up to kStepKeys keys of a chunk.
struct Unit {
  int panel;
  int from, to;  // multiples of kUnitKeys
  int number = 0;
  bool multiplied = false;  // scores by their factor
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
      const int end = static_cast<int>(round_up(panel.any_end, kUnitKeys));
      ++unit.number;
      unit.multiplied = false;
      unit.from = from;
      unit.to = end < from + kStepKeys ? end : from + kStepKeys;
      return true;
    }
    from = 0;
  }
  return false;
}

// One head's way over a chunk.
template <class T, int kParts>
class ChunkOfHead {
  // Whether weights are computed beside the next scores: those of one part have too few products to hide them.
  static constexpr bool kBeside = kParts > 1;
  // Keys whose weights are multiplied with values at once: L1 holds them beside a panel's sums.
  static constexpr int kBatchKeys = kParts == 1 && kMaxLanes == 32 ? 256 : 128;

 public:
  ChunkOfHead(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &chunk,
              int64_t head, const bool *odd, bool any_odd, Fetch<T> &keys_ahead, Fetch<T> &values_ahead, int lines)
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
        scale_(kParts > 2 ? 1.0f : query_factor(params, work.head_begin + head)),
        adjusted_(params.softcap > 0.0f || params.alibi_slopes != nullptr),
        scores_(state.scores),
        pairs_(reinterpret_cast<char *>(state.scores + 2 * kStepKeys * kMaxLanes)) {}

  void run() {
    Unit unit{0, -kStepKeys, 0};
    if (!next_unit(state_, unit)) return;
    Batch batch{unit.panel, unit.from, unit.from};
    score(unit);
    adjust(unit);
    for (bool more = true; more;) {
      Unit next = unit;
      more = next_unit(state_, next);
      keys_ahead_.lines(lines_);
      values_ahead_.lines(lines_);
      set_origin(unit, batch);
      if (kBeside && more) {
        score_and_weigh(next, unit, batch);
      } else {
        weigh(unit, batch);
      }
      if (any_odd_) {
        add_values(batch);
        add_odd(unit, online_of(unit.panel));
      }
      if (!more) break;
      if (next.panel != batch.panel || next.to - batch.from > kBatchKeys) {
        add_values(batch);
        batch = {next.panel, next.from, next.from};
      }
      if (!kBeside) score(next);
      adjust(next);
      unit = next;
    }
    add_values(batch);
  }

 private:
  // What scores are yet to be multiplied by once they are adjusted.
  float factor(const Unit &unit) const { return adjusted_ || unit.multiplied ? 1.0f : scale_; }
  Online &online_of(int panel) const { return state_.online[head_ * state_.num_panels + panel]; }
  float *acc_of(int panel) const {
    return state_.acc + (head_ * state_.lanes + state_.panels[panel].first_lane) * dims_;
  }

  // Where a unit's scores stand; those of the next one beside them.
  float *scores_of(const Unit &unit) const { return scores_ + (kBeside ? unit.number % 2 * kStepKeys * kMaxLanes : 0); }
  char *weights_of(const Unit &unit, const Batch &batch) const {
    return pairs_ + (unit.from - batch.from) / kTileDepth * kParts * kRightBytes;
  }

  template <class Beside>
  __attribute__((always_inline)) void score(const Unit &unit, Beside beside) const {
    multiply_keys<kParts>(queries_of<kParts>(state_, head_, state_.panels[unit.panel]),
                          state_.key_tiles + unit.from * 2 * kParts * dims_, dims_, unit.to - unit.from,
                          reinterpret_cast<char *>(scores_of(unit)), beside);
  }
  __attribute__((noinline)) void score(const Unit &unit) const {
    score(unit, [] {});
  }

  // Softcap, ALiBi and masks.
  void adjust(const Unit &unit) const {
    const Panel &panel = state_.panels[unit.panel];
    float *const scores = scores_of(unit);
    const int count = (unit.to - unit.from) * kMaxLanes;
    if (adjusted_ && kParts <= 2) scale_scores(scores, count, scale_);
    if (params_.softcap > 0.0f) cap_scores(scores, count, params_.softcap);
    float *const first = scores - unit.from * kMaxLanes;  // where the chunk's first key would have its scores
    if (params_.alibi_slopes != nullptr) {
      bias_scores(params_, work_, state_, chunk_, panel, head_, unit.from, unit.to, first);
    }
    if (panel.all_begin > unit.from || panel.all_end < unit.to) mask_scores(panel, unit.from, unit.to, first);
  }

  // Finds what the weights of a unit are relative to.
  void set_origin(Unit &unit, Batch &batch) const {
    Online &online = online_of(unit.panel);
    Scores largest = largest_scores(scores_of(unit), unit.to - unit.from);
    if (factor(unit) != 1.0f && are_far(largest, factor(unit))) {
      scale_scores(scores_of(unit), (unit.to - unit.from) * kMaxLanes, factor(unit));
      unit.multiplied = true;
      largest = largest_scores(scores_of(unit), unit.to - unit.from);
    }
    if (!asks_for_origin(largest, factor(unit), online)) return;
    add_values(batch);
    raise_origin(largest, factor(unit), online);
    if (online.started) rescale_lanes<kVecsOfPanel>(acc_of(unit.panel), dims_, online.factor);
  }

  // Takes the weights of a unit into a batch.
  __attribute__((noinline)) void weigh(const Unit &unit, Batch &batch) const {
    Online &online = online_of(unit.panel);
    Weighing<kParts>(scores_of(unit), unit.to - unit.from, factor(unit), online, weights_of(unit, batch))
        .finish(online);
    batch.to = unit.to;
  }

  // The same, beside the products of the next unit.
  __attribute__((noinline)) void score_and_weigh(const Unit &next, const Unit &unit, Batch &batch) const {
    Online &online = online_of(unit.panel);
    Weighing<kParts> weighing(scores_of(unit), unit.to - unit.from, factor(unit), online, weights_of(unit, batch));
    score(next, [&]() __attribute__((always_inline)) { weighing.next_pair(); });
    weighing.finish(online);
    batch.to = unit.to;
  }

  // Adds the values of a batch, which is then empty.
  __attribute__((noinline)) void add_values(Batch &batch) const {
    if (batch.from == batch.to) return;
    Online &online = online_of(batch.panel);
    multiply_values<kParts>(reinterpret_cast<char *>(acc_of(batch.panel)), !online.started, pairs_,
                            values_from<kParts>(state_.value_tiles, batch.from), kValueStride<kParts>, dims_,
                            batch.to - batch.from);
    online.started = true;
    batch.from = batch.to;
  }

  // The products of weights and values of odd keys, for the rows that see them.
  void add_odd(const Unit &unit, const Online &online) const {
    float *const acc = acc_of(unit.panel);
    const Panel &panel = state_.panels[unit.panel];
    const auto *v = head_data<T>(params_.v_cache, work_, head_);
    for (int j = unit.from; j < unit.to && j < panel.any_end; ++j) {
      if (!odd_[j]) continue;
      for (int lane = 0; lane < panel.rows; ++lane) {
        if (j < panel.begin[lane] || j >= panel.end[lane]) continue;
        const float x = scores_of(unit)[(j - unit.from) * kMaxLanes + lane] * factor(unit) - online.max[lane];
        const float weight = exp2_for_parts<kParts>(broadcast(x))[0];
        for (int d = 0; d < params_.head_dim; ++d) {
          acc[d * kMaxLanes + lane] += weight * load_partial<T>(v + chunk_.v[j] + d, 1)[0];
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
  Fetch<T> &keys_ahead_, &values_ahead_;
  const int lines_;  // of keys and of values to fetch at each unit
  const int dims_;
  const float scale_;
  const bool adjusted_;
  float *const scores_;  // two times [kStepKeys][lane]
  char *const pairs_;    // weights of up to kBatchKeys
};

static int num_units(const State &state) {
  int count = 0;
  for (Unit unit{0, -kStepKeys, 0}; next_unit(state, unit);) ++count;
  return count;
}

// Whether tiles can go on.
template <class T, int kParts>
static bool tiles_chunk(const AttentionParams &params, const AttentionWork &work, State &state, const TileKeys &chunk,
                        const TileKeys &next) {
  const int head_dim = params.head_dim;
  Fetch<T> keys_ahead(params.k_cache, work, next.k, next.count, head_dim);
  Fetch<T> values_ahead(params.v_cache, work, next.v, next.count, head_dim);
  const int lines = next.count * keys_ahead.lines_of_row(head_dim) / (num_units(state) + 1) + 1;
  for (int64_t head = 0; head < state.num_heads; ++head) {
    const auto *v = head_data<T>(params.v_cache, work, head);
    bool odd[kMaxChunkKeys] = {};
    bool any_odd = false;
    if constexpr (kParts == 1) {
      find_odd_keys<T>(v, state, chunk, head_dim, odd);
      for (int j = 0; j < chunk.count; ++j) any_odd |= odd[j];
    }
    Range range;
    pack_keys<T, kParts, kAsTheyLie<T>>(head_data<T>(params.k_cache, work, head), chunk, head_dim, state.key_tiles,
                                        range);
    pack_values<T, kParts>(v, chunk, head_dim, odd, state.value_tiles, range);
    if (!range.holds()) return false;
    ChunkOfHead<T, kParts>(params, work, state, chunk, head, odd, any_odd, keys_ahead, values_ahead, lines).run();
  }
  return true;
}

#else

// No such registers.
template <int kParts>
static int64_t tile_chunk_keys(const State &) {
  return kTileKeys;
}
template <class T, int kParts>
static bool start_tiles(const AttentionParams &, const AttentionWork &, State &) {
  return true;
}
template <class T, int kParts>
static bool tiles_chunk(const AttentionParams &, const AttentionWork &, State &, const TileKeys &, const TileKeys &) {
  return true;
}
static void clear_sums_of_no_key(const State &) {}
static void finish_tiles() {}

#endif

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
