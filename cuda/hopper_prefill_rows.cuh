// Attention of 64 query rows in one warpgroup's registers: scores, online softmax and output by wgmma.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_epilogue.cuh"
#include "hopper_ptx.cuh"
#include "hopper_wgmma.cuh"
#include "prefill_schedule.cuh"
#include "row_results.cuh"
#include "scores.cuh"

namespace pagedattn::cuda {

template <class Traits>
class WarpgroupRows {
  using Math = typename Traits::Math;
  using Q = typename Traits::QTile;
  using Kv = typename Traits::KvTile;
  static constexpr int kTokens = Traits::kTokens;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kRowFloats = place_row_floats(kHeadDim);
  // Log 2 of the weight that a key may have before sums are brought to a larger m: far from what a float16 holds.
  static constexpr float kLargestStep = 8.0f;
  // And that a float32 holds, which the weights are until then.
  static constexpr float kFarthestStep = 100.0f;

 public:
  using Scores = float[kTokens / 8][4];

  // Of the two rows of a thread: the largest score in units of log 2, and the sum of exp2(score - m) over the thread's
  // own keys.
  struct Sums {
    float m[2];
    float l[2];
  };

  __device__ WarpgroupRows(const AttentionKernelParams &params, typename Traits::Shared &shared, int group, int barrier)
      : params_(params), shared_(shared), group_(group), barrier_(barrier) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    row_ = 64 * group + thread / 32 * 16 + thread % 32 / 4;
    take_sums();
  }

  // The next scores are of this item's queries, its first.
  __device__ void begin(const WorkItem &item, const char *q) {
    item_ = &item;
    q_tile_ = q;
    q_ = operand(shared_address(q + Q::offset(64 * group_, 0)), Q::kColumnBytes, Q::kEightRows);
    visible_to_all_ = {keys_of(64 * group_ + 63).begin, keys_of(64 * group_).end};
    const float scale = params_.k_scale.of_head(item.kv_head) * params_.scale;
    pre_scale_ = params_.softcap > 0.0f ? scale / params_.softcap : scale * kLog2E;
    // The largest score is that of the largest product only if their ratio is positive.
    transform_ = params_.softcap > 0.0f || params_.alibi_slopes != nullptr || !(pre_scale_ > 0.0f);
    post_scale_ = transform_ ? 1.0f : pre_scale_;
  }

  // Starts s = Q K^T.
  __device__ void multiply_q_k(Scores &s, const char *k_tile) const {
    const Operand k = operand(shared_address(k_tile), Kv::kColumnBytes, Kv::kEightRows);
    fence_products();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      Products<Math, kTokens>::q_k(s, further(q_, Q::step_offset(step)), further(k, Kv::step_offset(step)), step > 0);
    }
    commit_products();
  }

  // Do all rows see all keys of the tile from `token` on, and are scores just products times a positive number?
  __device__ bool is_plain(int token) const {
    return token >= visible_to_all_.begin && token + kTokens <= visible_to_all_.end && !transform_;
  }

  // Scores of the keys from `token` on become exp2(score - m) for the new m.
  __device__ void softmax(Scores &s, int token) {
    if (transform_) {
      const float scale[2] = {pre_scale_, pre_scale_}, slope[2] = {slope_of(row_), slope_of(row_ + 8)};
      const int position[2] = {position_of(row_), position_of(row_ + 8)};
      transform_scores(s, params_, scale, slope, position, token);
    }
    if (token < visible_to_all_.begin || token + kTokens > visible_to_all_.end) {
      const Range keys[2] = {keys_of(row_), keys_of(row_ + 8)};
      mask_scores(s, keys, token);
    }
    softmax_of_plain_scores(s);
  }

  // The same of a plain tile that is not a segment's first.  It guesses that m stays, since to know the largest score
  // takes as long as all exponentials, and is right but for few tiles.
  __device__ void guess_softmax(Scores &s, const char *k_tile) {
    const float scaled[2] = {m_[0] * post_scale_, m_[1] * post_scale_};
    float largest[2][2], sum[2][2] = {};
#pragma unroll
    for (int tile = 0; tile < kTokens / 8; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float &most = largest[j / 2][j % 2];
        most = tile == 0 ? s[tile][j] : fmaxf(most, s[tile][j]);
        s[tile][j] = exp2_fast(s[tile][j] * post_scale_ - scaled[j / 2]);
        sum[j / 2][j % 2] += s[tile][j];
      }
    }
    float most[2], excess[2];
    bool is_wrong = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = quad_max(fmaxf(largest[i][0], largest[i][1]));
      excess[i] = most[i] * post_scale_ - scaled[i];
      is_wrong |= excess[i] > kLargestStep || m_[i] == negative_infinity();  // no key before
      factor_[i] = 1.0f;
    }
    if (__any_sync(kFullWarp, is_wrong)) [[unlikely]] {
      // Rows that no token has hold others' queries, or what was there before: they must not decide.
      const bool redo =
          (is_far(excess[0], m_[0]) && exists(*item_, row_)) || (is_far(excess[1], m_[1]) && exists(*item_, row_ + 8));
      if (__any_sync(kFullWarp, redo)) {
        multiply_q_k_again(s, k_tile);
        softmax_of_plain_scores(s);
        return;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (excess[i] > kLargestStep) {
          factor_[i] = exp2_fast(-excess[i]);
          m_[i] = most[i];
        }
        sum[i][0] *= factor_[i];
        sum[i][1] *= factor_[i];
#pragma unroll
        for (int tile = 0; tile < kTokens / 8; ++tile) {
          s[tile][2 * i] *= factor_[i];
          s[tile][2 * i + 1] *= factor_[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) l_[i] = l_[i] * factor_[i] + (sum[i][0] + sum[i][1]);
  }

  // What softmax has made of the scores becomes the left operand of P V.
  __device__ void pack_weights(const Scores &s) {
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p_[t][i] = pack<Math>(s[2 * t + i / 2][i % 2 * 2], s[2 * t + i / 2][i % 2 * 2 + 1]);
      }
    }
  }

  // Starts O += P V, or O = P V of an item's first keys.
  __device__ void multiply_p_v(const char *v_tile, bool first) {
    const Operand v = operand(shared_address(v_tile), Kv::kColumnBytes, Kv::kEightRows);
    fence_products();
#pragma unroll
    for (int step = 0; step < kTokens / 16; ++step) {
      Products<Math, kHeadDim>::p_v(o_, p_[step], further(v, step * 2 * Kv::kEightRows), step > 0 || !first);
    }
    commit_products();
  }

  // Behind a wait for P V.  The weights stay in their registers until then, or the compiler waits where it wants these
  // for something else.
  __device__ void pin_output() {
    pin(o_);
    pin(p_);
  }
  // Brings O to the m of the latest scores, which are of the same item.
  __device__ void rescale() {
    if (!__any_sync(kFullWarp, factor_[0] != 1.0f || factor_[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) o_[i][j] *= factor_[j / 2];
    }
  }

  // What the item's rows have come to; the next scores are another's first.
  __device__ Sums take_sums() {
    Sums sums;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums.m[i] = m_[i] * post_scale_;
      sums.l[i] = l_[i];
      m_[i] = negative_infinity();
      l_[i] = 0.0f;
    }
    return sums;
  }

  // Rows of V that no query sees may hold anything: zeros take their place.  All groups write them, since none waits
  // for another.
  __device__ void clear_unseen(char *v_tile, Range keys, int token) const {
    if (keys.begin <= token && token + kTokens <= keys.end) return;
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const auto clear = [&](int first, int end) {
      constexpr int kChunks = Kv::kColumns * 8;
      for (int i = thread; i < (end - first) * kChunks; i += 128) {
        *reinterpret_cast<uint4 *>(v_tile + Kv::offset(first + i / kChunks, i % kChunks)) = {};
      }
    };
    clear(0, clamp_to(keys.begin - token, 0, kTokens));
    clear(clamp_to(keys.end - token, 0, kTokens), kTokens);
    publish_shared_writes();
    named_barrier<128>(barrier_);
  }

  // Ends a segment: writes the rows' results, or a partial result, and in the group that does so last the join of all.
  __device__ void finish(const PrefillSegment &segment, Sums sums) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums.l[i] += __shfl_xor_sync(kFullWarp, sums.l[i], 1);
      sums.l[i] += __shfl_xor_sync(kFullWarp, sums.l[i], 2);
    }
    const SegmentPlan &plan = segment.plan;
    if (plan.num_segments > 1) {
      store_partial(segment, sums);
      if (!arrives_last(plan)) return;
      join(segment, sums);
    }
    write(segment.item, sums);
  }

 private:
  __device__ static bool is_far(float excess, float m) { return excess > kFarthestStep || m == negative_infinity(); }

  __device__ static float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
    return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
  }

  __device__ void softmax_of_plain_scores(Scores &s) {
    // Both rows at once, in several chains, since a warp has few others to hide its latencies.
    float largest[2][2];
#pragma unroll
    for (int tile = 0; tile < kTokens / 8; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float &most = largest[j / 2][j % 2];
        most = tile == 0 ? s[tile][j] : fmaxf(most, s[tile][j]);
      }
    }
    float scaled[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = quad_max(fmaxf(largest[i][0], largest[i][1]));
      // Small steps are not worth the rescaling.
      if (most * post_scale_ - m_[i] * post_scale_ <= kLargestStep) most = m_[i];
      scaled[i] = most == negative_infinity() ? 0.0f : most * post_scale_;
      factor_[i] = exp2_fast(m_[i] * post_scale_ - scaled[i]);
      m_[i] = most;
    }
    float sum[2][2] = {};
#pragma unroll
    for (int tile = 0; tile < kTokens / 8; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[tile][j] = exp2_fast(s[tile][j] * post_scale_ - scaled[j / 2]);
        sum[j / 2][j % 2] += s[tile][j];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) l_[i] = l_[i] * factor_[i] + (sum[i][0] + sum[i][1]);
  }

  // By one warp alone, for its 16 rows.
  __device__ void multiply_q_k_again(Scores &s, const char *k_tile) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, first_row = row_ - lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTokens / 8; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[tile][j] = 0.0f;
    }
#pragma unroll 1
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t q[4];
      load_matrices(q, shared_address(q_tile_ + Q::offset(first_row + lane % 16, 2 * step + lane / 16)));
#pragma unroll
      for (int t = 0; t < kTokens / 16; ++t) {
        uint32_t k[4];
        load_matrices(k,
                      shared_address(k_tile + Kv::offset(16 * t + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2)));
        multiply_add<Math>(s[2 * t], q, k[0], k[1]);
        multiply_add<Math>(s[2 * t + 1], q, k[2], k[3]);
      }
    }
  }

  // Of a row of the current item's tile: its query token, of those of the sequence, and the query head.  Rows that no
  // token has are given the last one's.
  __device__ int query_of(int row) const {
    const int queries = params_.batch.tile_queries;
    const int query = item_->query_tile * queries + min(params_.batch.group.divide(row), queries - 1);
    return min(query, item_->seq.num_queries - 1);
  }
  __device__ Range keys_of(int row) const { return visible_keys(params_.batch, item_->seq, query_of(row)); }
  __device__ int position_of(int row) const { return item_->seq.length - item_->seq.num_queries + query_of(row); }
  __device__ float slope_of(int row) const {
    return params_.alibi_slopes == nullptr ? 0.0f : params_.alibi_slopes[head_of(*item_, row)] * kLog2E;
  }
  __device__ int head_of(const WorkItem &item, int row) const {
    const int group = static_cast<int>(params_.batch.group.divisor);
    return item.kv_head * group + row - params_.batch.group.divide(row) * group;
  }

  __device__ bool exists(const WorkItem &item, int row) const {
    const int query = params_.batch.group.divide(row), queries = params_.batch.tile_queries;
    return query < min(queries, item.seq.num_queries - item.query_tile * queries);
  }

  __device__ void write(const WorkItem &item, const Sums &sums) const {
    const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float factor = 0.0f;
      int64_t offset = -1;
      const int row = row_ + 8 * i;
      if (exists(item, row)) {
        const int query = item.query_tile * params_.batch.tile_queries + params_.batch.group.divide(row);
        const int64_t token = item.seq.first_token + query;
        const int head = head_of(item, row);
        factor = end_row(params_, token, head, item.kv_head, sums.m[i], sums.l[i], lane == 0);
        offset = token * params_.out.token_stride + head * params_.out.head_stride;
      }
      write_row<Math>(params_, o_, i, offset, factor);
    }
  }

  // A row of a partial result.
  __device__ float *partial_row(int place, int i) const {
    return params_.partials + static_cast<uint32_t>(place * params_.place_floats) + (row_ + 8 * i) * kRowFloats;
  }

  __device__ void store_partial(const PrefillSegment &segment, const Sums &sums) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!exists(segment.item, row_ + 8 * i)) continue;
      store_partial_row(partial_row(segment.plan.first_place + segment.plan.segment, i), o_, i, sums.m[i], sums.l[i]);
    }
  }

  // Each group counts for itself.
  __device__ bool arrives_last(const SegmentPlan &plan) const {
    return arrive_last(plan, params_.arrivals + plan.first_owner * Traits::kGroups + group_,
                       shared_.last_to_arrive[group_], threadIdx.x % 128 == 0, [&] { named_barrier<128>(barrier_); });
  }

  // Always in the order of the segments, so that the bits do not depend on who does it.
  __device__ void join(const PrefillSegment &segment, Sums &sums) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums.m[i] = negative_infinity();
      sums.l[i] = 0.0f;
#pragma unroll
      for (int tile = 0; tile < kHeadDim / 8; ++tile) o_[tile][2 * i] = o_[tile][2 * i + 1] = 0.0f;
      if (!exists(segment.item, row_ + 8 * i)) continue;
#pragma unroll 1
      for (int number = 0; number < segment.plan.num_segments; ++number) {
        add_partial_row(partial_row(segment.plan.first_place + number, i), o_, i, sums.m[i], sums.l[i]);
      }
    }
  }

  const AttentionKernelParams &params_;
  typename Traits::Shared &shared_;
  int group_;
  int barrier_;
  int row_;  // of the item's tile; the thread's other is the eighth after it
  const WorkItem *item_;
  const char *q_tile_;
  Operand q_;
  Range visible_to_all_;  // of the group's rows
  bool transform_;        // scores are not just products times a positive number
  float pre_scale_;       // what `transform_scores` multiplies products by
  float post_scale_;      // what turns its results, or else the products, into units of log 2
  float m_[2];            // before post_scale
  float l_[2];
  float factor_[2];  // from the m before to this
  uint32_t p_[kTokens / 16][4];
  float o_[kHeadDim / 8][4];
};

}  // namespace pagedattn::cuda
