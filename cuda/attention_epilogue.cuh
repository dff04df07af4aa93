// From unnormalised attention in registers to the output: joins a block's parts, and an item's segments.
//
// SPDX-License-Identifier: Apache-2.0
//
// A state of a row over some keys is (m, l, o): the largest score in units of log 2, the sum of exp2(score - m), and
// the sum of exp2(score - m) V.  Warps that took different keys of a segment hand their states over in shared memory,
// where the block joins these parts.  If the segment is all of its item, the result is normalised and written.
// Otherwise it goes to the segment's place in the workspace, and the block that arrives last joins all segments, always
// in the order of their keys: the bits do not depend on who is last.
//
// Workspace: kMaxGrid arrival counters, zero between launches (the last block to arrive sets its counter back), then
// the places.  The counters keep their size whatever the shapes, so one workspace serves calls of different shapes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention_params.cuh"
#include "ptx.cuh"
#include "row_table.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

__device__ inline float negative_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// exp2(m - largest) where both may be minus infinity: then 0.
__device__ inline float rescale_factor(float m, float largest) {
  return exp2_fast(m - (largest == negative_infinity() ? 0.0f : largest));
}

// How output elements are stored; float8 kernels learn it at run time.
enum class OutputType { kFloat32, kFloat16, kBFloat16, kFromParams };

template <OutputType kType>
__device__ inline void store_output(const AttentionKernelParams &params, int64_t offset, float4 x) {
  if constexpr (kType == OutputType::kFloat32) {
    float *out = static_cast<float *>(params.out.data) + offset;
    if (params.out_wide) {
      *reinterpret_cast<float4 *>(out) = x;
    } else {
      out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
    }
  } else {
    const bool bfloat16 = kType == OutputType::kBFloat16 || (kType == OutputType::kFromParams && params.q_is_bfloat16);
    uint16_t *out = static_cast<uint16_t *>(params.out.data) + offset;
    const uint2 packed = bfloat16 ? uint2{pack<__nv_bfloat16>(x.x, x.y), pack<__nv_bfloat16>(x.z, x.w)}
                                  : uint2{pack<__half>(x.x, x.y), pack<__half>(x.z, x.w)};
    if (params.out_wide) {
      *reinterpret_cast<uint2 *>(out) = packed;
    } else {
      out[0] = static_cast<uint16_t>(packed.x), out[1] = static_cast<uint16_t>(packed.x >> 16);
      out[2] = static_cast<uint16_t>(packed.y), out[3] = static_cast<uint16_t>(packed.y >> 16);
    }
  }
}

// Called by kThreads threads, numbered from zero, that meet at a barrier of their own.
template <class Shape, int kThreads, int kHeadDim, int kMaxParts, int kStates, OutputType kOutputType,
          int kStateColumns_ = kHeadDim, int kJoinedAtOnce = 8>
class Epilogue {
 public:
  static constexpr int kRows = Shape::kRows;
  static constexpr int kStateColumns = kStateColumns_;  // that are handed over at once
  // Eight extra floats put the rows that a quad of lanes writes together on different banks.
  static constexpr int kPitch = kStateColumns + 8;
  static constexpr int kStateFloats = kStates * kPitch;

  // Small arrays beside the states, which in some kernels overlay the tiles.
  struct Shared {
    float m[kStates];
    float l[kStates];
    bool last_to_arrive;
  };

  __device__ Epilogue(const AttentionKernelParams &params, Shared &shared, float *states, int thread, int barrier = 0)
      : params_(params), shared_(shared), states_(states), thread_(thread), barrier_(barrier) {}

  // States are numbered row by row within parts.
  __device__ float *state(int index) const { return states_ + index * kPitch; }
  __device__ void set_row(int index, float m, float l) const {
    shared_.m[index] = m;
    shared_.l[index] = l;
  }

  // Ends a segment whose states are `parts` times `part_rows`, part_rows at least the item's rows.  `store_states(c)`
  // stores the thread's share of the states' columns c ... c + kStateColumns - 1.
  template <class StoreStates>
  __device__ void finish(const WorkItem &item, const SegmentPlan &plan, int parts, int part_rows,
                         StoreStates &&store_states) const {
    const int rows = min(num_rows(params_.batch, item.seq) - item.query_tile * kRows, kRows);
    float *const place = place_of(plan.first_place + plan.segment);
#pragma unroll 1
    for (int first = 0; first < kHeadDim; first += kStateColumns) {
      if (first > 0) meet();  // the columns before have been read
      store_states(first);
      meet();
      for_each_quad(rows, first, kStateColumns, [&](int row, int column) {
        const State joined = join_parts(row, column - first, parts, part_rows);
        if (plan.num_segments == 1) {
          write(item, row, column, joined);
        } else {
          *reinterpret_cast<float4 *>(place + row * kHeadDim + column) = joined.o;
          if (column == 0) *place_row(place, row) = {joined.m, joined.l};
        }
      });
    }
    if (plan.num_segments > 1 && arrive_last(plan)) join_segments(item, plan, rows);
    meet();  // the states and shared_ may be overwritten
  }

 private:
  struct State {  // of a row, four columns
    float m = negative_infinity();
    float l = 0.0f;
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};

    // Brings the state to a larger m.
    __device__ void raise(float largest) {
      const float factor = rescale_factor(m, largest);
      m = largest;
      l *= factor;
      o = {o.x * factor, o.y * factor, o.z * factor, o.w * factor};
    }
    // Adds a state of an m that is at most this one's.
    __device__ void add(float other_m, float other_l, float4 x) {
      const float factor = rescale_factor(other_m, m);
      l += factor * other_l;
      o.x += factor * x.x;
      o.y += factor * x.y;
      o.z += factor * x.z;
      o.w += factor * x.w;
    }
  };

  __device__ void meet() const { named_barrier<kThreads>(barrier_); }

  __device__ float *place_of(int index) const {
    return params_.partials + static_cast<uint32_t>(index * params_.place_floats);
  }
  __device__ float2 *place_row(float *place, int row) const {
    return reinterpret_cast<float2 *>(place + params_.place_floats) - params_.place_rows + row;
  }

  template <class Function>
  __device__ void for_each_quad(int rows, int first, int columns, Function &&function) const {
    const int quads = columns / 4;
    for (int index = thread_; index < rows * quads; index += kThreads) {
      const int row = index / quads, column = first + index % quads * 4;
      if (column < params_.head_dim) function(row, column);
    }
  }

  __device__ State join_parts(int row, int column, int parts, int part_rows) const {
    State sum;
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
      if (part < parts) sum.m = fmaxf(sum.m, shared_.m[part * part_rows + row]);
    }
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
      const int index = part * part_rows + row;
      if (part < parts) {
        sum.add(shared_.m[index], shared_.l[index], *reinterpret_cast<const float4 *>(state(index) + column));
      }
    }
    return sum;
  }

  // Normalises and stores four columns of a row, with the first of them the row's log-sum-exp.
  __device__ void write(const WorkItem &item, int row, int column, const State &state) const {
    const int query = params_.batch.group.divide(item.query_tile * kRows + row);
    const int64_t token = item.seq.first_token + query;
    const int head = item.kv_head * static_cast<int>(params_.batch.group.divisor) + item.query_tile * kRows + row -
                     query * static_cast<int>(params_.batch.group.divisor);
    float largest = state.m, sum = state.l, factor = 1.0f;
    if (params_.sinks != nullptr) {
      // Over the larger of the two, so that a sink far above every score does not overflow.
      const float sink = params_.sinks[head] * kLog2E;
      largest = fmaxf(state.m, sink);
      factor = rescale_factor(state.m, largest);
      sum = state.l * factor + rescale_factor(sink, largest);
    }
    if (params_.lse != nullptr && column == 0) {
      params_.lse[token * params_.lse_token_stride + head * params_.lse_head_stride] =
          sum == 0.0f ? negative_infinity() : (largest + log2f(sum)) * kLn2;
    }
    factor = sum == 0.0f ? 0.0f : factor * params_.v_scale.of_head(item.kv_head) / sum;
    const float4 o = state.o;
    store_output<kOutputType>(params_, token * params_.out.token_stride + head * params_.out.head_stride + column,
                              {o.x * factor, o.y * factor, o.z * factor, o.w * factor});
  }

  // Publishes the block's partial result; true in the block that does so last.  The barriers order the block's stores
  // before one thread's arrival, and what the arrival acquires before the block's loads.
  __device__ bool arrive_last(const SegmentPlan &plan) const {
    meet();
    // Segments that nobody shares come here one after the other, by the caller's doing.
    if (!plan.is_shared) return plan.segment == plan.num_segments - 1;
    if (thread_ == 0) {
      uint32_t *const counter = params_.arrivals + plan.first_owner;
      shared_.last_to_arrive = arrive_and_count(counter) == static_cast<uint32_t>(plan.num_segments);
      if (shared_.last_to_arrive) *counter = 0;  // nobody else will come; ready for the next launch
    }
    meet();
    return shared_.last_to_arrive;
  }

  // A thread four columns, several segments at a time: one after the other, the loads from L2 would take longer than
  // all the rest.
  __device__ void join_segments(const WorkItem &item, const SegmentPlan &plan, int rows) const {
    constexpr int kAtOnce = kJoinedAtOnce;
    for_each_quad(rows, 0, kHeadDim, [&](int row, int column) {
      State sum;
#pragma unroll 1
      for (int first = 0; first < plan.num_segments; first += kAtOnce) {
        float2 state[kAtOnce];
        float4 o[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i < plan.num_segments) {
            float *const place = place_of(plan.first_place + first + i);
            state[i] = load_from_l2(place_row(place, row));
            o[i] = load_from_l2(reinterpret_cast<const float4 *>(place + row * kHeadDim + column));
          } else {
            state[i] = {negative_infinity(), 0.0f};
            o[i] = {0.0f, 0.0f, 0.0f, 0.0f};
          }
        }
        float largest = sum.m;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) largest = fmaxf(largest, state[i].x);
        sum.raise(largest);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sum.add(state[i].x, state[i].y, o[i]);
      }
      write(item, row, column, sum);
    });
  }

  const AttentionKernelParams &params_;
  Shared &shared_;
  float *states_;
  int thread_;
  int barrier_;
};

}  // namespace pagedattn::cuda
