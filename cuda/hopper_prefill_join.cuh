// Partial results of prefill: kept in the workspace, and joined by the blocks that have nothing else to do.
//
// SPDX-License-Identifier: Apache-2.0
//
// An item that several blocks have parts of ends when the last part has come.  One group of 64 rows that joined them
// all alone would need as long as ten tiles, most of it waiting for loads.  So the groups that are done with their
// block's work wait for the last part and share the rows, each of which has all its loads on their way at once.  If no
// group waits, the one that brings the last part joins all rows.
//
// Whoever waits holds a multiprocessor, so groups wait only if all of the grid's blocks have started: then all others
// go on, and those that wait are at the end of their work.
//
// Who joins depends on chance, but not the bits: parts are added in the order of the item's keys.
#pragma once

#include "attention_epilogue.cuh"
#include "attention_kernel.h"
#include "hopper_params.cuh"
#include "hopper_ptx.cuh"
#include "prefill_schedule.cuh"

namespace pagedattn::cuda {

// Of the arrival counters, the last but one: it counts the blocks that have started, and is zero when all have.
constexpr int kStartCounter = kMaxGrid - 2;

// By one thread of each block.
__device__ inline void count_start(const HopperParams &params) {
  asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(params.arrivals + kStartCounter), "r"(gridDim.x - 1)
               : "memory");
}
__device__ inline bool all_have_started(const HopperParams &params) {
  uint32_t count;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(params.arrivals + kStartCounter) : "memory");
  return count == 0;
}

// Of an item's parts of 64 rows, in one word, which is zero between launches: the parts that are there, the groups that
// wait, and those of them that have done their share.  A grid has fewer blocks than any of these can hold.
struct JoinCount {
  static constexpr uint32_t kPart = 1, kWaits = 1 << 10, kLeaves = 1 << 20;
  uint32_t word;

  __device__ int parts() const { return word % kWaits; }
  __device__ int waiting() const { return word % kLeaves / kWaits; }
  __device__ int left() const { return word / kLeaves; }
};

// The share of a group of rows in the join of an item's segments, of so many; none if of = 0.
struct JoinShare {
  int number;
  int of;
};

// Of the 64 rows that a warpgroup has of an item.
template <class Traits>
class PartialRows {
  static constexpr int kHeadDim = Traits::kHeadDim, kQuads = kHeadDim / 4, kRowFloats = place_row_floats(kHeadDim);
  static constexpr int kLanes = kHeadDim <= 128 && !Traits::kFloat8Products ? 8 : 16;  // of a row
  static constexpr int kOfLane = (kQuads + kLanes - 1) / kLanes;
  static constexpr int kRowsAtOnce = 128 / kLanes;
  static_assert(kHeadDim % 16 == 0);

 public:
  __device__ PartialRows(const HopperParams &params, typename Traits::Shared &shared, const PrefillSegment &segment,
                         int group, int barrier, int thread)
      : params_(params), shared_(shared), segment_(segment), group_(group), barrier_(barrier), thread_(thread) {}

  // A thread has the row and the eighth after it.  Of each two tiles of 8 columns its four columns lie side by side.
  __device__ void store(int own_row, const float (&o)[kHeadDim / 8][4], const float (&m)[2],
                        const float (&l)[2]) const {
    const int num_rows = tile_rows(params_.batch, segment_.item), lane = thread_ % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own_row + 8 * i;
      if (row >= num_rows) continue;
      float *const to = part_of_row(segment_.plan.segment, row);
#pragma unroll
      for (int tile = 0; tile < kHeadDim / 8; tile += 2) {
        *reinterpret_cast<float4 *>(to + tile * 8 + lane * 4) = {o[tile][2 * i], o[tile][2 * i + 1], o[tile + 1][2 * i],
                                                                 o[tile + 1][2 * i + 1]};
      }
      if (lane == 0) *reinterpret_cast<float2 *>(to + kHeadDim) = {m[i], l[i]};
    }
  }

  // Behind that: joins and writes what falls to the group.  If it has nothing else to do, it waits, and has registers
  // for several parts at once.
  template <bool kWaits>
  __device__ void join() const {
    constexpr int kPartsAtOnce = kWaits ? 4 : 1;
    const JoinShare share = segment_.plan.is_shared ? arrive(kWaits) : share_of_one_block();
    if (share.of == 0) return;
    // The group leaves when it has seen that all parts are there: the answer comes while it joins them.
    uint32_t left = 0;
    if (segment_.plan.is_shared) {
      meet();
      if (thread_ == 0) left = leave();
    }
    // Parts of an item that is all this block's may be overwritten by the block's next such item: between this read and
    // that item's last store lies at least one step, whose turn all warps of the group wait for.
    write<kPartsAtOnce>(share);
    // The last to leave makes the counter ready for the next launch.
    if (thread_ == 0 && left != 0 && JoinCount{left}.left() == share.of) *counter() = 0;
  }

 private:
  // Segments that nobody shares come here one after the other.
  __device__ JoinShare share_of_one_block() const {
    meet();
    return {0, segment_.plan.segment == segment_.plan.num_segments - 1};
  }

  __device__ void meet() const { named_barrier<128>(barrier_); }
  __device__ uint32_t *counter() const {
    return params_.arrivals + segment_.plan.first_owner * Traits::kGroups + group_;
  }

  // The barriers order the group's stores before its leader's arrival, and what that acquires before their loads.
  __device__ JoinShare arrive(bool waits) const {
    const int num_parts = segment_.plan.num_segments;
    const bool may_wait = waits && thread_ == 0 && all_have_started(params_);
    meet();
    if (thread_ == 0) {
      const JoinCount count{
          arrive_and_count(counter(), may_wait ? JoinCount::kPart + JoinCount::kWaits : JoinCount::kPart)};
      const bool alone = count.parts() == num_parts && count.waiting() == 0;
      shared_.join_share[group_] = {may_wait ? count.waiting() - 1 : 0, may_wait || alone};
    }
    meet();
    JoinShare share = shared_.join_share[group_];
    if (waits && share.of != 0) {
      JoinCount count;
      do {
        count.word = count_arrivals(counter());
      } while (!__all_sync(kFullWarp, count.parts() == num_parts));
      share.of = larger(__shfl_sync(kFullWarp, count.waiting(), 0), 1);
    }
    return share;
  }

  // Nothing is ordered by that.
  __device__ uint32_t leave() const {
    uint32_t before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter()), "r"(JoinCount::kLeaves)
                 : "memory");
    return before + JoinCount::kLeaves;
  }

  __device__ float *part_of_row(int number, int row) const {
    const int place = segment_.plan.first_place + number;
    return params_.partials + static_cast<uint32_t>(place * params_.place_floats) + row * kRowFloats;
  }

  // Rows that fall to the share.  Lanes without one join the group's last: the compiler makes the loops yield, and then
  // lanes that stay out of them are not waited for where they end, but run ahead through whatever warps or warpgroups
  // must do together.
  template <int kPartsAtOnce>
  __device__ void write(JoinShare share) const {
    const int last_row = smaller(64 * group_ + 64, tile_rows(params_.batch, segment_.item)) - 1;
#pragma unroll 1
    for (int first = 64 * group_ + share.number * kRowsAtOnce; first <= last_row; first += share.of * kRowsAtOnce) {
      write_row<kPartsAtOnce>(smaller(first + thread_ / kLanes, last_row));
    }
  }

  template <int kPartsAtOnce>
  __device__ void write_row(int row) const {
    const int lane = thread_ % kLanes, num_parts = segment_.plan.num_segments;
    float m = negative_infinity(), l = 0.0f;
    float4 o[kOfLane] = {};
#pragma unroll 1
    for (int first = 0; first < num_parts; first += kPartsAtOnce) {
      float2 state[kPartsAtOnce];
      float4 x[kPartsAtOnce][kOfLane];
#pragma unroll
      for (int k = 0; k < kPartsAtOnce; ++k) {
        const bool exists = first + k < num_parts;
        const float *const part = part_of_row(first + k, row);
        state[k] = {negative_infinity(), -0.0f};  // which leaves a sum as it is, whatever its sign
        if (exists) state[k] = load_from_l2(reinterpret_cast<const float2 *>(part + kHeadDim));
#pragma unroll
        for (int j = 0; j < kOfLane; ++j) {
          const int quad = lane + j * kLanes;
          x[k][j] = {-0.0f, -0.0f, -0.0f, -0.0f};
          if (exists && quad < kQuads) x[k][j] = load_from_l2(reinterpret_cast<const float4 *>(part) + quad);
        }
      }
#pragma unroll
      for (int k = 0; k < kPartsAtOnce; ++k) {
        const float largest = fmaxf(m, state[k].x), factor = rescale_factor(m, largest),
                    weight = rescale_factor(state[k].x, largest);
        // The same roundings however many parts come at once.
        const auto add = [&](float &sum, float other) { sum = __fmaf_rn(other, weight, __fmul_rn(sum, factor)); };
        m = largest;
        add(l, state[k].y);
#pragma unroll
        for (int j = 0; j < kOfLane; ++j) {
          add(o[j].x, x[k][j].x);
          add(o[j].y, x[k][j].y);
          add(o[j].z, x[k][j].z);
          add(o[j].w, x[k][j].w);
        }
      }
    }
    const WorkItem &item = segment_.item;
    const int group = static_cast<int>(params_.batch.group.divisor), query = params_.batch.group.divide(row),
              head = item.kv_head * group + row - query * group;
    const int64_t token = item.seq.first_token + item.query_tile * params_.batch.tile_queries + query;
    const RowSum sum = with_sink(params_, head, m, l);
    if (params_.lse != nullptr && lane == 0) store_lse_of_row(params_, token, head, sum.lse());
    const float factor = output_factor(sum, params_.v_scale.of_head(item.kv_head));
    const int64_t offset = token * params_.out.token_stride + head * params_.out.head_stride;
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      const int quad = lane + j * kLanes, column = quad / 4 * 16 + quad % 4 * 2;
      store_pair(offset, column, o[j].x * factor, o[j].y * factor);
      store_pair(offset, column + 8, o[j].z * factor, o[j].w * factor);
    }
  }

  // Two neighbouring columns of a row from `offset` on.
  __device__ void store_pair(int64_t offset, int column, float first, float second) const {
    if (column >= params_.head_dim) return;
    constexpr bool kFromParams = Traits::kFloat8 || Traits::kFloat8Products;
    constexpr bool kBFloat16 = std::is_same_v<typename Traits::Math, __nv_bfloat16>;
    const bool bfloat16 = kFromParams ? params_.out_is_bfloat16 : kBFloat16;
    const uint32_t pair = bfloat16 ? pack<__nv_bfloat16>(first, second) : pack<__half>(first, second);
    uint16_t *const out = static_cast<uint16_t *>(params_.out.data) + offset + column;
    if (params_.out_bytes >= 4) {
      *reinterpret_cast<uint32_t *>(out) = pair;
    } else {
      out[0] = static_cast<uint16_t>(pair);
      out[1] = static_cast<uint16_t>(pair >> 16);
    }
  }

  const HopperParams &params_;
  typename Traits::Shared &shared_;
  const PrefillSegment &segment_;
  int group_;
  int barrier_;
  int thread_;  // of the group's
};

}  // namespace pagedattn::cuda
