// From unnormalised attention in shared memory to the output: joins a block's parts, and an item's segments.
//
// SPDX-License-Identifier: Apache-2.0
//
// A state of a row over some keys is (m, l, o): the largest score in units of log 2, the sum of exp2(score - m), and
// the sum of exp2(score - m) V.  A block ends a segment with kParts states a row (few-row kernels: one a warp) and
// joins them.  If the segment is all of its item, the result is normalised and written.  Otherwise it goes to the
// segment's place in the workspace, and the block that arrives last joins all segments, always in the order of their
// keys: the bits do not depend on who is last.
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

// Floats of one place: O, m, l.
template <int kRows, int kHeadDim>
constexpr int kPlaceFloats = kRows * kHeadDim + 2 * kRows;

template <class Shape, int kThreads, int kHeadDim, int kParts_, OutputType kOutputType>
class Epilogue {
 public:
  static constexpr int kRows = Shape::kRows;
  static constexpr int kParts = kParts_;
  // Eight extra floats put the rows that a quad of lanes writes together on different banks.
  static constexpr int kPitch = kHeadDim + 8;
  static constexpr int kStateFloats = kParts * kRows * kPitch;
  static constexpr int kListed = kStateFloats / (kRows + 1);  // segments that a list where the states were can hold

  // Small arrays beside the states themselves, which overlay the tiles.
  struct Shared {
    float m[kParts][kRows];
    float l[kParts][kRows];
    float factor[kParts][kRows];
    float largest[kRows];
    bool last_to_arrive;
  };

  __device__ Epilogue(const AttentionKernelParams &params, Shared &shared, float *states)
      : params_(params), shared_(shared), states_(states) {}

  __device__ static int state_offset(int part, int row, int column) { return (part * kRows + row) * kPitch + column; }
  __device__ float *states() const { return states_; }

  __device__ void set_row(int part, int row, float m, float l) const {
    shared_.m[part][row] = m;
    shared_.l[part][row] = l;
  }

  // Called by the whole block behind a barrier after the states have been written; ends with a barrier.
  __device__ void finish(const WorkItem &item, const WorkCut<Shape> &cut, int segment) const {
    const int num_segments = cut.num_segments(item);
    const int rows_left = num_rows(params_.batch, item.seq) - item.query_tile * kRows;
    const int rows = rows_left < kRows ? rows_left : kRows;
    const int thread = static_cast<int>(threadIdx.x);
    float *place = params_.partials + cut.places(item).of(segment) * kPlaceFloats<kRows, kHeadDim>;

    for (int row = thread; row < rows; row += kThreads) {
      float m = shared_.m[0][row], l = 0.0f;
      for (int part = 1; part < kParts; ++part) m = fmaxf(m, shared_.m[part][row]);
      for (int part = 0; part < kParts; ++part) {
        shared_.factor[part][row] = rescale_factor(shared_.m[part][row], m);
        l += shared_.factor[part][row] * shared_.l[part][row];
      }
      if (num_segments == 1) {
        const float factor = finish_row(item, row, m, l);
        for (int part = 0; part < kParts; ++part) shared_.factor[part][row] *= factor;
      } else {
        place[kRows * kHeadDim + row] = m;
        place[kRows * kHeadDim + kRows + row] = l;
      }
    }
    __syncthreads();

    for_each_quad(rows, [&](int row, int column) {
      const float4 x = join_parts(row, column);
      if (num_segments == 1) {
        store(item, row, column, x);
      } else {
        *reinterpret_cast<float4 *>(place + row * kHeadDim + column) = x;
      }
    });
    if (num_segments > 1 && arrive_last(item, cut, segment, num_segments)) {
      join_segments(item, cut, rows, num_segments);
    }
    __syncthreads();  // the states and shared_ may be overwritten
  }

 private:
  template <class Function>
  __device__ void for_each_quad(int rows, Function &&function) const {
    constexpr int kQuads = kHeadDim / 4;
    for (int index = static_cast<int>(threadIdx.x); index < rows * kQuads; index += kThreads) {
      const int row = index / kQuads, column = index % kQuads * 4;
      if (column < params_.head_dim) function(row, column);
    }
  }

  __device__ float4 join_parts(int row, int column) const {
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float4 x = *reinterpret_cast<const float4 *>(states_ + state_offset(part, row, column));
      add_scaled(sum, shared_.factor[part][row], x);
    }
    return sum;
  }

  __device__ static void add_scaled(float4 &sum, float factor, float4 x) {
    sum.x += factor * x.x;
    sum.y += factor * x.y;
    sum.z += factor * x.z;
    sum.w += factor * x.w;
  }

  // Stores the row's log-sum-exp and returns what its sum over V is to be multiplied by.
  __device__ float finish_row(const WorkItem &item, int row, float m, float l) const {
    const int query = params_.batch.group.divide(item.query_tile * kRows + row);
    const int head = q_head(item, row, query);
    float largest = m, sum = l, factor = 1.0f;
    if (params_.sinks != nullptr) {
      // Over the larger of the two, so that a sink far above every score does not overflow.
      const float sink = params_.sinks[head] * kLog2E;
      largest = fmaxf(m, sink);
      factor = rescale_factor(m, largest);
      sum = l * factor + rescale_factor(sink, largest);
    }
    if (params_.lse != nullptr) {
      const int64_t token = item.seq.first_token + query;
      params_.lse[token * params_.lse_token_stride + head * params_.lse_head_stride] =
          sum == 0.0f ? negative_infinity() : (largest + log2f(sum)) * kLn2;
    }
    return sum == 0.0f ? 0.0f : factor * params_.v_scale.of_head(item.kv_head) / sum;
  }

  __device__ int q_head(const WorkItem &item, int row, int query) const {
    const int group = static_cast<int>(params_.batch.group.divisor);
    return item.kv_head * group + item.query_tile * kRows + row - query * group;
  }

  __device__ void store(const WorkItem &item, int row, int column, float4 x) const {
    const int query = params_.batch.group.divide(item.query_tile * kRows + row);
    const int64_t token = item.seq.first_token + query;
    const int64_t head = q_head(item, row, query);
    store_output<kOutputType>(params_, token * params_.out.token_stride + head * params_.out.head_stride + column, x);
  }

  // Publishes the block's partial result; true in the block that does so last.  The barriers order the block's stores
  // before one thread's arrival, and what the arrival acquires before the block's loads.
  __device__ bool arrive_last(const WorkItem &item, const WorkCut<Shape> &cut, int segment, int num_segments) const {
    if (!cut.is_shared(item)) {
      __syncthreads();
      return segment == num_segments - 1;
    }
    const int counter = cut.first_owner(item);
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t arrived = arrive_and_count(params_.arrivals + counter);
      shared_.last_to_arrive = arrived == static_cast<uint32_t>(num_segments);
      if (shared_.last_to_arrive) params_.arrivals[counter] = 0;  // nobody else will come; ready for the next launch
    }
    __syncthreads();
    return shared_.last_to_arrive;
  }

  __device__ void join_segments(const WorkItem &item, const WorkCut<Shape> &cut, int rows, int num_segments) const {
    const auto places = cut.places(item);
    const auto place = [&](int segment) {
      return params_.partials + places.of(segment) * kPlaceFloats<kRows, kHeadDim>;
    };
    // Everything is waited for together: one after the other, the loads from L2 would take longer than all the rest.
    // First a warp a row and a lane a segment: what each segment weighs, and where it lies.
    float *const weights = states_;  // [kListed][kRows]; the states have been used
    int *const listed = reinterpret_cast<int *>(states_ + kListed * kRows);
    const int num_listed = min(num_segments, kListed);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    for (int s = thread; s < num_listed; s += kThreads) listed[s] = static_cast<int>(places.of(s));
    for (int row = thread / 32; row < rows; row += kThreads / 32) {
      float m = negative_infinity(), l = 0.0f;
#pragma unroll 1
      for (int s = lane; s < num_segments; s += 32) {
        const float *state = place(s) + kRows * kHeadDim + row;
        const float segment_m = load_from_l2(state), segment_l = load_from_l2(state + kRows);
        const float largest = fmaxf(m, segment_m);
        l = l * rescale_factor(m, largest) + segment_l * rescale_factor(segment_m, largest);
        m = largest;
        if (s < kListed) weights[s * kRows + row] = segment_m;
      }
      const float largest = warp_max(m);
      l = warp_sum(l * rescale_factor(m, largest));
      for (int s = lane; s < num_listed; s += 32) {
        weights[s * kRows + row] = rescale_factor(weights[s * kRows + row], largest);
      }
      if (lane == 0) {
        shared_.largest[row] = largest;
        shared_.factor[0][row] = finish_row(item, row, largest, l);
      }
    }
    __syncthreads();
    // Then a thread four columns, several segments at a time.
    for_each_quad(rows, [&](int row, int column) {
      const float *const first = params_.partials + row * kHeadDim + column;
      float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
      for (int s = 0; s < num_listed; ++s) {
        const float *x = first + static_cast<int64_t>(listed[s]) * kPlaceFloats<kRows, kHeadDim>;
        add_scaled(sum, weights[s * kRows + row], load_from_l2(reinterpret_cast<const float4 *>(x)));
      }
#pragma unroll 1
      for (int s = num_listed; s < num_segments; ++s) {
        const float *x = place(s);
        const float weight = rescale_factor(load_from_l2(x + kRows * kHeadDim + row), shared_.largest[row]);
        add_scaled(sum, weight, load_from_l2(reinterpret_cast<const float4 *>(x + row * kHeadDim + column)));
      }
      const float factor = shared_.factor[0][row];
      store(item, row, column, {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor});
    });
  }

  const AttentionKernelParams &params_;
  Shared &shared_;
  float *states_;
};

}  // namespace pagedattn::cuda
