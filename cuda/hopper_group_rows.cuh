// Attention of 64 query rows in the registers of a warpgroup: products by wgmma.
//
// SPDX-License-Identifier: Apache-2.0
//
// A warp has 16 of the rows, as in WarpRows, but what these are multiplied with does not come through registers: the
// tensor cores read a tile of keys and values once for all four warps, as the copy engine has laid it into the ring.
// Rows that do not exist are computed with the others.
#pragma once

#include "hopper_ptx.cuh"
#include "hopper_wgmma.cuh"
#include "mma_warp_rows.cuh"

namespace pagedattn::cuda {

template <class Traits>
class GroupRows : public WarpRows<Traits> {
  using Base = WarpRows<Traits>;
  using Math = typename Traits::Math;
  using Kv = typename Traits::KvTile;
  static constexpr int kTokens = Traits::kTokens;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static_assert(Traits::kWarpBands == 1 && Traits::kRows == 64);

 public:
  using Base::Base;

  // As WarpRows; queries must have been published.
  __device__ void begin(const WorkItem &item, int first_row, const RowTable<Traits::kRows> &table, const char *q_tile) {
    Base::begin(item, first_row, table, q_tile);
    q_ = operand<typename Traits::QTile>(shared_address(q_tile));
  }

  // Tiles of keys and values, the first key of the first being `token`.  `take` waits for a tile, of a number, and
  // returns where it lies; `release` says that the warp needs it no more.  The group's threads, of which this has the
  // number `thread`, meet by `meet`.
  //
  // The products of a tile's weights and values are under way beside those of the next tile's keys.
  template <class Take, class Release, class Meet>
  __device__ void attend(int token, int num_tiles, int thread, Take &&take, Release &&release, Meet &&meet) {
    if (num_tiles <= 0) return;
    const auto take_whole = [&](int tile) {
      char *const k = take(tile);
      prepare(k + Kv::kBytes, token + tile * kTokens, thread, meet);
      return k;
    };
    const auto end_p_v = [&](int tile) {
      wait_products<0>();
      pin(this->o_[0]);
      pin(p_);
      release(tile);
    };
    const char *k = take_whole(0);
    multiply_q_k(k);
    wait_products<0>();
    pin(s_[0]);
    Base::softmax(s_, token);
    pack_weights();
#pragma unroll 1
    for (int tile = 1; tile < num_tiles; ++tile) {
      const char *const v = k + Kv::kBytes;
      k = take_whole(tile);
      multiply_q_k(k);
      multiply_p_v(v);
      wait_products<1>();
      pin(s_[0]);
      typename Base::Factors largest, scaled, factor;
      const bool rises = Base::template find_largest<1>(s_, token + tile * kTokens, largest, scaled);
      end_p_v(tile - 1);
      if (rises) {
        Base::template find_factors<1>(scaled, factor);
        Base::template raise_sums<1>(largest, factor);
        Base::template scale_output<1>(factor);
      }
      Base::template weigh<1>(s_, scaled);
      pack_weights();
    }
    multiply_p_v(k + Kv::kBytes);
    end_p_v(num_tiles - 1);
  }

  template <class Meet>
  __device__ void finish(const WorkItem &item, const SegmentPlan &plan, bool other_came, bool &last_to_arrive,
                         bool leads, Meet &&meet) {
    Base::template finish<GroupRows>(item, plan, other_came, last_to_arrive, leads, meet);
  }

  // A lane's two rows do not wait for each other, unless they have too many columns.  A row that does not exist takes
  // the last one's.
  __device__ void add_parts(const WorkItem &item, const SegmentPlan &plan, int bands) {
    if constexpr (kHeadDim > 128) {
      Base::add_parts(item, plan, bands);
    } else {
      const int last = num_rows(this->params_.batch, item.seq) - 1, row = this->head_row_;
      if (row - this->lane_ / 4 > last) return;
      const float *part = this->params_.partials + static_cast<uint32_t>(plan.first_place * this->params_.place_floats);
      const int places[2] = {min(row, last) * place_row_floats(kHeadDim),
                             min(row + 8, last) * place_row_floats(kHeadDim)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        this->m_[0][i] = negative_infinity();
        this->l_[0][i] = 0.0f;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) this->o_[0][j][2 * i] = this->o_[0][j][2 * i + 1] = 0.0f;
      }
#pragma unroll 1
      for (int number = 0; number < plan.num_segments; ++number, part += this->params_.place_floats) {
#pragma unroll
        for (int i = 0; i < 2; ++i) add_partial_row(part + places[i], this->o_[0], i, this->m_[0][i], this->l_[0][i]);
      }
    }
  }

 private:
  // Before the first product of a tile.
  template <class Meet>
  __device__ void prepare(char *v_tile, int token, int thread, Meet &&meet) const {
    if (token >= this->keys_.begin && token + kTokens <= this->keys_.end) return;
    clear_unseen(v_tile, token, thread);
    publish_shared_writes();
    meet();
  }

  // Starts S = Q K^T.
  __device__ void multiply_q_k(const char *k_tile) {
    start_q_k<Math, typename Traits::QTile, Kv, kHeadDim / 16>(s_[0], q_, operand<Kv>(shared_address(k_tile)));
  }

  // Starts O += P V.
  __device__ void multiply_p_v(const char *v_tile) {
    const Operand v = operand<Kv>(shared_address(v_tile));
    fence_products();
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) {
      Products<Math, kHeadDim>::p_v(this->o_[0], p_[t], further(v, 2 * t * Kv::kEightRows), true);
    }
    commit_products();
  }

  // Values of keys that no row sees have the weight zero, but may be anything.
  __device__ void clear_unseen(char *v_tile, int token, int thread) const {
#pragma unroll 1
    for (int i = thread; i < kTokens * Kv::kChunks; i += Traits::kGroupThreads) {
      const int row = i / Kv::kChunks, key = token + row;
      if (key >= this->keys_.begin && key < this->keys_.end) continue;
      *reinterpret_cast<uint4 *>(v_tile + Kv::offset(row, i % Kv::kChunks)) = {0, 0, 0, 0};
    }
  }

  // P, of S that holds weights.
  __device__ void pack_weights() {
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) pack_keys<Math>(p_[t], s_[0], t);
  }

  Operand q_;
  typename Base::Scores s_;
  uint32_t p_[kTokens / 16][4];
};

}  // namespace pagedattn::cuda
