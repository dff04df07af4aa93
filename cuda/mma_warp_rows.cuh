// Attention of 16 or 32 query rows in one warp's registers: scores, online softmax and output by mma.sync.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "mma_traits.cuh"
#include "ptx.cuh"
#include "row_results.cuh"
#include "scores.cuh"

namespace pagedattn::cuda {

template <class Traits>
class WarpRows {
  using Math = typename Traits::Math;
  using Q = typename Traits::QTile;
  using Kv = typename Traits::KvTile;
  static constexpr int kTokens = Traits::kWarpTokens;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kBands = Traits::kWarpBands;  // of 16 rows

 public:
  using Scores = float[kBands][kTokens / 8][4];

  __device__ explicit WarpRows(const AttentionKernelParams &params)
      : params_(params), lane_(static_cast<int>(threadIdx.x) % 32) {}

  // Rows first_row ... first_row + 16 * bands - 1 of the tile; queries and row table must be in shared memory, behind a
  // barrier.
  __device__ void begin(const WorkItem &item, int first_row, const RowTable<Traits::kRows> &table, const char *q_tile,
                        int bands = kBands) {
    table_ = &table;
    keys_ = item.keys;
    row_ = first_row + lane_ / 4;
    const Range first = table_->keys[first_row], last = table_->keys[first_row + 16 * bands - 1];
    const TileRow place = tile_row<typename Traits::Shape>(params_.batch, item, first_row);
    head_ = place.head;
    head_row_ = place.row + lane_ / 4;
    const bool any = item.query_tile * Traits::kRows + place.row < num_rows(params_.batch, item.seq);
    visible_to_any_ = any ? Range{first.begin, last.end} : Range{0, 0};
    visible_to_all_ = {last.begin, first.end};

    float scale = params_.k_scale.of_head(item.kv_head + place.head) * params_.scale;
    if constexpr (Traits::kFloat8) scale *= params_.q_scale.of_head(item.kv_head + place.head);
    if constexpr (Traits::kTileHeads > 1) first_chunk_ = place.head * (Kv::kChunks / Traits::kTileHeads);
    pre_scale_ = params_.softcap > 0.0f ? scale / params_.softcap : scale * kLog2E;
    // The largest score is that of the largest product only if their ratio is positive.
    transform_ = params_.softcap > 0.0f || params_.alibi_slopes != nullptr;
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      if (band >= bands) break;
      transform_ = transform_ || !(row_scale(band, 0) > 0.0f) || !(row_scale(band, 1) > 0.0f);
    }
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        post_scale_[band][i] = transform_ ? 1.0f : row_scale(band, i);
        m_[band][i] = negative_infinity();
        l_[band][i] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) o_[band][i][j] = 0.0f;
      }
    }
    q_fragment_ = shared_address(q_tile + Q::offset(first_row + lane_ % 16, lane_ / 16));
    if constexpr (Traits::kQInRegisters) {
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; ++k) load_q_fragment(q_[band][k], band, k);
      }
    }
  }

  // Does any row see any of kTokens keys from `token` on?
  __device__ bool sees(int token) const {
    return token < visible_to_any_.end && token + kTokens > visible_to_any_.begin;
  }

  // s = Q K^T
  template <int kActive = kBands>
  __device__ void multiply_q_k(Scores &s, const char *k_tile) const {
#pragma unroll
    for (int band = 0; band < kActive; ++band) {
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) s[band][i][j] = 0.0f;
      }
    }
    if constexpr (Traits::kFloat8) {
      // Matrices: 8 tokens x 16 dimensions; two groups of tokens, two of dimensions.
      const SharedAddress k = shared_address(k_tile + Kv::offset(lane_ % 16, lane_ / 16));
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; step += 2) {
        uint32_t q[kActive][2][4];
#pragma unroll
        for (int band = 0; band < kActive; ++band) {
          get_q_fragment(q[band][0], band, step);
          get_q_fragment(q[band][1], band, step + 1);
        }
#pragma unroll
        for (int t = 0; t < kTokens / 16; ++t) {
          uint32_t raw[4];
          load_matrices(raw, Kv::down(Kv::along(k, chunk(step)), t * 16));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t b0, b1;
            widen<typename Traits::CacheElement>(raw[i], b0, b1);
#pragma unroll
            for (int band = 0; band < kActive; ++band)
              multiply_add<Math>(s[band][2 * t + i % 2], q[band][i / 2], b0, b1);
          }
        }
      }
    } else {
      // Matrices: 8 tokens x 8 dimensions; two groups of dimensions, two of tokens.
      const SharedAddress k = shared_address(k_tile + Kv::offset(lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2));
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32_t q[kActive][4];
#pragma unroll
        for (int band = 0; band < kActive; ++band) get_q_fragment(q[band], band, step);
#pragma unroll
        for (int t = 0; t < kTokens / 16; ++t) {
          uint32_t b[4];
          load_matrices(b, Kv::down(Kv::along(k, chunk(2 * step)), t * 16));
#pragma unroll
          for (int band = 0; band < kActive; ++band) {
            multiply_add<Math>(s[band][2 * t], q[band], b[0], b[1]);
            multiply_add<Math>(s[band][2 * t + 1], q[band], b[2], b[3]);
          }
        }
      }
    }
  }

  // Scores of the keys from `token` on become exp2(score - m), the state is brought to the new m.
  template <int kActive = kBands>
  __device__ void softmax(Scores &s, int token) {
    Factors largest, scaled, factor;
    if (find_largest<kActive>(s, token, largest, scaled)) {
      find_factors<kActive>(scaled, factor);
      scale_output<kActive>(factor);
      raise_sums<kActive>(largest, factor);
    }
    weigh<kActive>(s, scaled);
  }

  // O += P V for the keys from `token` on.
  template <int kActive = kBands>
  __device__ void multiply_p_v(const Scores &p, const char *v_tile, int token) {
    const SharedAddress v = shared_address(v_tile + Kv::offset(lane_ % 16, lane_ / 16));
    const bool whole = !Traits::kHasUnseenRows || (token >= keys_.begin && token + kTokens <= keys_.end);
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) {
      uint32_t seen[2] = {~0u, ~0u};
      if (!whole) find_seen(seen, token + 16 * t);
      uint32_t a[kActive][4];
#pragma unroll
      for (int band = 0; band < kActive; ++band) pack_keys<Math>(a[band], p[band], t);
      if constexpr (Traits::kFloat8) {
        // Matrices: 8 tokens x 16 dimensions; two groups of tokens, two of dimensions.
#pragma unroll
        for (int group = 0; group < kHeadDim / 16; group += 2) {
          uint32_t raw[4];
          load_matrices_transposed(raw, Kv::down(Kv::along(v, chunk(group)), t * 16));
          if constexpr (Traits::kHasUnseenRows) clear_unseen(raw, seen);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t even0, odd0, even1, odd1;
            widen<typename Traits::CacheElement>(pick_bytes(raw[2 * i], 0x3120), even0, odd0);
            widen<typename Traits::CacheElement>(pick_bytes(raw[2 * i + 1], 0x3120), even1, odd1);
#pragma unroll
            for (int band = 0; band < kActive; ++band) {
              multiply_add<Math>(o_[band][2 * (group + i)], a[band], even0, even1);
              multiply_add<Math>(o_[band][2 * (group + i) + 1], a[band], odd0, odd1);
            }
          }
        }
      } else {
        // Matrices: 8 tokens x 8 dimensions; two groups of tokens, two of dimensions.
#pragma unroll
        for (int group = 0; group < kHeadDim / 16; ++group) {
          uint32_t b[4];
          load_matrices_transposed(b, Kv::down(Kv::along(v, chunk(2 * group)), t * 16));
          if constexpr (Traits::kHasUnseenRows) clear_unseen(b, seen);
#pragma unroll
          for (int band = 0; band < kActive; ++band) {
            multiply_add<Math>(o_[band][2 * group], a[band], b[0], b[1]);
            multiply_add<Math>(o_[band][2 * group + 1], a[band], b[2], b[3]);
          }
        }
      }
    }
  }

  // Hands the state's columns from `first_column` on to the epilogue as its states from `first_state` on, behind a
  // barrier after the last use of what they overlay; of the first `rows` rows alone.
  template <class Epilogue>
  __device__ void store_state(const Epilogue &epilogue, int first_state, int first_column, int bands = kBands,
                              int rows = 16 * kBands) const {
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      if (band >= bands) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int state = first_state + 16 * band + lane_ / 4 + 8 * i;
        float l = l_[band][i] + __shfl_xor_sync(kFullWarp, l_[band][i], 1);
        l += __shfl_xor_sync(kFullWarp, l, 2);
        if (rows < 16 * kBands && 16 * band + lane_ / 4 + 8 * i >= rows) continue;
        if (lane_ % 4 == 0) epilogue.set_row(state, m_[band][i] * post_scale_[band][i], l);
        float *const o = epilogue.state(state) - first_column;
#pragma unroll
        for (int group = 0; group < kHeadDim / 16; ++group) {
          if (group * 16 < first_column || group * 16 >= first_column + Epilogue::kStateColumns) continue;
          const float (&even)[4] = o_[band][2 * group];
          const float (&odd)[4] = o_[band][2 * group + 1];
          if constexpr (Traits::kFloat8) {
            *reinterpret_cast<float4 *>(o + group * 16 + lane_ % 4 * 4) = {even[2 * i], odd[2 * i], even[2 * i + 1],
                                                                           odd[2 * i + 1]};
          } else {
            *reinterpret_cast<float2 *>(o + group * 16 + lane_ % 4 * 2) = {even[2 * i], even[2 * i + 1]};
            *reinterpret_cast<float2 *>(o + group * 16 + 8 + lane_ % 4 * 2) = {odd[2 * i], odd[2 * i + 1]};
          }
        }
      }
    }
  }

  // Ends a segment of an item whose tile's rows are held by one warp each: writes their results, or a partial result,
  // and where that is done last the sum of all, in the order of the keys.  Called by threads that meet by `meet`, one
  // of which leads.  `other_came`: there is one other segment, whose partial result is there already.  Then this one
  // goes no way through memory, and the sum of two has the same bits in either order.
  // `Rows` sums up more than two.
  template <class Rows = WarpRows, class Meet>
  __device__ void finish(const WorkItem &item, const SegmentPlan &plan, bool other_came, bool &last_to_arrive,
                         bool leads, Meet &&meet, int bands = kBands) {
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        m_[band][i] *= post_scale_[band][i];
        l_[band][i] += __shfl_xor_sync(kFullWarp, l_[band][i], 1);
        l_[band][i] += __shfl_xor_sync(kFullWarp, l_[band][i], 2);
      }
    }
    const auto partial = [&](int number, int band, int i) {
      return partial_row(item, plan.first_place + number, band, i);
    };
    if (other_came) {
      if (leads) params_.arrivals[plan.first_owner] = 0;  // as the last to arrive would
    } else if (plan.num_segments > 1) {
      for_each_row(item, bands, [&](int band, int i, bool exists) {
        if (exists) store_partial_row(partial(plan.segment, band, i), o_[band], i, m_[band][i], l_[band][i]);
      });
      if (!arrive_last(plan, params_.arrivals + plan.first_owner, last_to_arrive, leads, meet)) return;
    }
    if (plan.num_segments == 2) {
      for_each_row(item, bands, [&](int band, int i, bool exists) {
        if (exists) add_partial_row(partial(1 - plan.segment, band, i), o_[band], i, m_[band][i], l_[band][i]);
      });
    } else if (plan.num_segments > 2) {
      static_cast<Rows *>(this)->add_parts(item, plan, bands);
    }
    for_each_row(item, bands, [&](int band, int i, bool exists) { write(item, band, i, exists); });
  }

  __device__ void add_parts(const WorkItem &item, const SegmentPlan &plan, int bands) {
    for_each_row(item, bands, [&](int band, int i, bool exists) {
      m_[band][i] = negative_infinity();
      l_[band][i] = 0.0f;
#pragma unroll
      for (int tile = 0; tile < kHeadDim / 8; ++tile) o_[band][tile][2 * i] = o_[band][tile][2 * i + 1] = 0.0f;
#pragma unroll 1
      for (int number = 0; exists && number < plan.num_segments; ++number) {
        add_partial_row(partial_row(item, plan.first_place + number, band, i), o_[band], i, m_[band][i], l_[band][i]);
      }
    });
  }

 protected:
  // One of each of a lane's rows.
  using Factors = float[kBands][2];

  // The steps of softmax.  Products of the keys from `token` on become scores.  Is any of a row larger than those
  // before? `scaled`: the largest in units of log 2, or 0 where there is none.
  template <int kActive>
  __device__ bool find_largest(Scores &s, int token, Factors &largest, Factors &scaled) const {
    if (transform_) {
#pragma unroll
      for (int band = 0; band < kActive; ++band) {
        const int row = row_ + 16 * band;
        const float scale[2] = {row_scale(band, 0), row_scale(band, 1)};
        const float slope[2] = {table_->slope[row], table_->slope[row + 8]};
        const int position[2] = {table_->position[row], table_->position[row + 8]};
        transform_scores(s[band], params_, scale, slope, position, token);
      }
    }
    if (token < visible_to_all_.begin || token + kTokens > visible_to_all_.end) {
#pragma unroll
      for (int band = 0; band < kActive; ++band) {
        const int row = row_ + 16 * band;
        const Range keys[2] = {table_->keys[row], table_->keys[row + 8]};
        mask_scores(s[band], keys, token);
      }
    }

    bool rises = false;
#pragma unroll
    for (int band = 0; band < kActive; ++band) {
      largest[band][0] = m_[band][0];
      largest[band][1] = m_[band][1];
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        largest[band][0] = fmaxf(largest[band][0], fmaxf(s[band][i][0], s[band][i][1]));
        largest[band][1] = fmaxf(largest[band][1], fmaxf(s[band][i][2], s[band][i][3]));
      }
    }
#pragma unroll
    for (int band = 0; band < kActive; ++band) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float &most = largest[band][i];
        most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
        if constexpr (Traits::kLargestStep > 0.0f) {
          if ((most - m_[band][i]) * post_scale_[band][i] <= Traits::kLargestStep) most = m_[band][i];
        }
        scaled[band][i] = most == negative_infinity() ? 0.0f : most * post_scale_[band][i];
        rises |= most != m_[band][i];
      }
    }
    return __any_sync(kFullWarp, rises);
  }

  template <int kActive>
  __device__ void find_factors(const Factors &scaled, Factors &factor) const {
#pragma unroll
    for (int band = 0; band < kActive; ++band) {
#pragma unroll
      for (int i = 0; i < 2; ++i) factor[band][i] = exp2_fast(m_[band][i] * post_scale_[band][i] - scaled[band][i]);
    }
  }

  template <int kActive>
  __device__ void scale_output(const Factors &factor) {
#pragma unroll
    for (int band = 0; band < kActive; ++band) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) o_[band][i][j] *= factor[band][j / 2];
      }
    }
  }

  template <int kActive>
  __device__ void raise_sums(const Factors &largest, const Factors &factor) {
#pragma unroll
    for (int band = 0; band < kActive; ++band) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        l_[band][i] *= factor[band][i];
        m_[band][i] = largest[band][i];
      }
    }
  }

  template <int kActive>
  __device__ void weigh(Scores &s, const Factors &scaled) {
#pragma unroll
    for (int band = 0; band < kActive; ++band) {
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[band][i][j] = exp2_fast(s[band][i][j] * post_scale_[band][j / 2] - scaled[band][j / 2]);
          l_[band][j / 2] += s[band][i][j];
        }
      }
    }
  }

  // The lane's rows of the tile, and do they exist?
  template <class Function>
  __device__ void for_each_row(const WorkItem &item, int bands, Function &&function) const {
    const int rows = num_rows(params_.batch, item.seq) - item.query_tile * Traits::kRows;
#pragma unroll
    for (int band = 0; band < kBands; ++band) {
      if (band >= bands) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) function(band, i, head_row_ + 16 * band + 8 * i < rows);
    }
  }

  // Rows that exist follow each other, head after head.
  __device__ float *partial_row(const WorkItem &item, int place, int band, int i) const {
    const int row = head_ * num_rows(params_.batch, item.seq) + head_row_ + 16 * band + 8 * i;
    return params_.partials + static_cast<uint32_t>(place * params_.place_floats) + row * place_row_floats(kHeadDim);
  }

  __device__ void write(const WorkItem &item, int band, int i, bool exists) const {
    const int row = item.query_tile * Traits::kRows + head_row_ + 16 * band + 8 * i, kv_head = item.kv_head + head_;
    float factor = 0.0f;
    int64_t offset = -1;
    if (exists) {
      const int group = static_cast<int>(params_.batch.group.divisor), query = params_.batch.group.divide(row);
      const int64_t token = item.seq.first_token + query;
      const int head = kv_head * group + row - query * group;
      factor = end_row(params_, token, head, kv_head, m_[band][i], l_[band][i], lane_ % 4 == 0);
      offset = token * params_.out.token_stride + head * params_.out.head_stride;
    }
    if constexpr (Traits::kFloat8) {
#pragma unroll
      for (int group = 0; group < kHeadDim / 16; ++group) {
        const float (&even)[4] = o_[band][2 * group];
        const float (&odd)[4] = o_[band][2 * group + 1];
        const int column = group * 16 + lane_ % 4 * 4;
        if (exists && column < params_.head_dim) {
          store_output<Traits::kOutput>(
              params_, offset + column,
              {even[2 * i] * factor, odd[2 * i] * factor, even[2 * i + 1] * factor, odd[2 * i + 1] * factor});
        }
      }
    } else {
      write_row<Math>(params_, o_[band], i, offset, factor);
    }
  }

  // Where an even chunk of the warp's head is in a row of a KV tile.
  __device__ int chunk(int index) const {
    if constexpr (Traits::kTileHeads == 1) return index;
    return first_chunk_ + index;
  }

  // Which of the lane's 16-bit values of V belong to keys that some row sees: those of keys 2c and 2c + 1 from `token`
  // on, c = lane % 4, and those of 2c + 8 and 2c + 9.
  __device__ void find_seen(uint32_t (&seen)[2], int token) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = token + lane_ % 4 * 2 + 8 * i;
      seen[i] = (key >= keys_.begin && key < keys_.end ? 0x0000ffffu : 0u) |
                (key + 1 >= keys_.begin && key + 1 < keys_.end ? 0xffff0000u : 0u);
    }
  }
  __device__ static void clear_unseen(uint32_t (&b)[4], const uint32_t (&seen)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] &= seen[i % 2];
  }

  __device__ void load_q_fragment(uint32_t (&fragment)[4], int band, int step) const {
    load_matrices(fragment, Q::down(Q::along(q_fragment_, 2 * step), 16 * band));
  }

  __device__ void get_q_fragment(uint32_t (&fragment)[4], int band, int step) const {
    if constexpr (Traits::kQInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = q_[band][step][i];
    } else {
      load_q_fragment(fragment, band, step);
    }
  }

  __device__ float row_scale(int band, int i) const {
    if constexpr (Traits::kFloat8) return pre_scale_ * table_->q_scale[row_ + 16 * band + 8 * i];
    return pre_scale_;
  }

  const AttentionKernelParams &params_;
  int lane_;
  const RowTable<Traits::kRows> *table_;
  int row_;       // the lane's rows of the tile are this and each eighth after it
  int head_;      // of the item's, which the warp's rows are of,
  int head_row_;  // and the first of the lane's among the rows of that head
  SharedAddress q_fragment_;
  int first_chunk_;       // of the warp's head in a row of a KV tile
  Range keys_;            // that any row of the tile sees
  Range visible_to_any_;  // of the warp's rows
  Range visible_to_all_;
  bool transform_;               // scores are not just products times a positive number
  float pre_scale_;              // what `transform_scores` multiplies products by
  float post_scale_[kBands][2];  // what turns its results, or else the products, into units of log 2
  float m_[kBands][2];           // before post_scale
  float l_[kBands][2];           // of the lane's own columns until store_state
  uint32_t q_[kBands][Traits::kQInRegisters ? kHeadDim / 16 : 1][4];
  float o_[kBands][kHeadDim / 8][4];
};

}  // namespace pagedattn::cuda
