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
// Workspace: kMaxGrid arrival counters, zero between launches (whoever comes last to one sets it back), then
// the places.  The counters keep their size whatever the shapes, so one workspace serves calls of different shapes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention_params.cuh"
#include "ptx.cuh"
#include "row_table.cuh"
#include "scores.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// exp2(m - largest) where both may be minus infinity: then 0.
__device__ inline float rescale_factor(float m, float largest) {
  return exp2_fast(m - (largest == negative_infinity() ? 0.0f : largest));
}

// What a row has accumulated, in four columns.
struct RowState {
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

// Of a query row's scores in units of log 2, with the sink that its head may have: the largest, and the sum of
// exp2(score - largest).  Sums over keys alone are to be multiplied by `factor`.
struct RowSum {
  float largest;
  float sum;
  float factor;

  __device__ float lse() const {
    const float log_sum = (largest + log2f(sum)) * kLn2;
    return sum == 0.0f ? negative_infinity() : log_sum;
  }
};

__device__ inline RowSum with_sink(const AttentionKernelParams &params, int head, float m, float l) {
  if (params.sinks == nullptr) return {m, l, 1.0f};
  // Over the larger of the two, so that a sink far above every score does not overflow.
  const float sink = params.sinks[head] * kLog2E, largest = fmaxf(m, sink), factor = rescale_factor(m, largest);
  return {largest, l * factor + rescale_factor(sink, largest), factor};
}

__device__ inline void store_lse_of_row(const AttentionKernelParams &params, int64_t token, int head, float lse) {
  params.lse[token * params.lse_token_stride + head * params.lse_head_stride] = lse;
}

// What the sum of exp2(score - m) V of a query row is to be multiplied by; with `store_lse`, stores the row's
// log-sum-exp where the call wants it.
__device__ inline float end_row(const AttentionKernelParams &params, int64_t token, int head, int kv_head, float m,
                                float l, bool store_lse) {
  const RowSum row = with_sink(params, head, m, l);
  if (params.lse != nullptr && store_lse) store_lse_of_row(params, token, head, row.lse());
  return row.sum == 0.0f ? 0.0f : row.factor * params.v_scale.of_head(kv_head) / row.sum;
}

// That factor by a division without branches, behind which ptxas does not believe that warps part.
__device__ inline float output_factor(const RowSum &row, float v_scale) {
  return row.sum == 0.0f ? 0.0f : __fdividef(row.factor * v_scale, row.sum);
}

// The same of two rows of a KV head that may not exist: together, since one after the other each would wait for itself.
__device__ inline void end_rows(const AttentionKernelParams &params, const int64_t (&tokens)[2], const int (&heads)[2],
                                int kv_head, const float (&m)[2], const float (&l)[2], const bool (&exist)[2],
                                bool store_lse, float (&factors)[2]) {
  const RowSum rows[2] = {with_sink(params, heads[0], m[0], l[0]), with_sink(params, heads[1], m[1], l[1])};
  if (params.lse != nullptr && store_lse) {
    const float lse[2] = {rows[0].lse(), rows[1].lse()};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (exist[i]) store_lse_of_row(params, tokens[i], heads[i], lse[i]);
    }
  }
  const float v_scale = params.v_scale.of_head(kv_head);
#pragma unroll
  for (int i = 0; i < 2; ++i) factors[i] = output_factor(rows[i], v_scale);
}

// Publishes a partial result of threads that meet by `meet`; true in those that do so last of the item's.  The barriers
// order their stores before one thread's arrival, and what the arrival acquires before their loads.
template <class Meet>
__device__ bool arrive_last(const SegmentPlan &plan, uint32_t *counter, bool &last_to_arrive, bool leads, Meet &&meet) {
  meet();
  // Segments that nobody shares come here one after the other, by the caller's doing.
  if (!plan.is_shared) return plan.segment == plan.num_segments - 1;
  if (leads) {
    const bool last = arrive_and_count(counter) == static_cast<uint32_t>(plan.num_segments);
    if (last) *counter = 0;  // nobody else will come; ready for the next launch
    last_to_arrive = last;
  }
  meet();
  return last_to_arrive;
}

// How output elements are stored; float8 kernels learn it at run time.
enum class OutputType { kFloat32, kFloat16, kBFloat16, kFromParams };

template <OutputType kType>
__device__ inline void store_output(const AttentionKernelParams &params, int64_t offset, float4 x) {
  if constexpr (kType == OutputType::kFloat32) {
    float *out = static_cast<float *>(params.out.data) + offset;
    if (params.out_bytes >= 16) {
      *reinterpret_cast<float4 *>(out) = x;
    } else {
      out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w;
    }
  } else {
    const bool bfloat16 =
        kType == OutputType::kBFloat16 || (kType == OutputType::kFromParams && params.out_is_bfloat16);
    uint16_t *out = static_cast<uint16_t *>(params.out.data) + offset;
    const uint2 packed = bfloat16 ? uint2{pack<__nv_bfloat16>(x.x, x.y), pack<__nv_bfloat16>(x.z, x.w)}
                                  : uint2{pack<__half>(x.x, x.y), pack<__half>(x.z, x.w)};
    if (params.out_bytes >= 8) {
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
  static constexpr int kPlaceFloats = place_row_floats(kHeadDim);

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

  // Ends a segment whose states are `parts` times the `part_rows` first rows of the item's tile.  `store_states(c)`
  // stores the thread's share of the states' columns c ... c + kStateColumns - 1.
  template <class StoreStates>
  __device__ void finish(const WorkItem &item, const SegmentPlan &plan, int parts, int part_rows,
                         StoreStates &&store_states) const {
    const Rows rows = rows_of(item);
    float *const place = place_of(plan.first_place + plan.segment);
#pragma unroll 1
    for (int first = 0; first < kHeadDim; first += kStateColumns) {
      if (first > 0) meet();  // the columns before have been read
      store_states(first);
      meet();
      for_each_quad(rows, first, kStateColumns, [&](int index, int column) {
        const TileRow row = rows.tile_row(index);
        const RowState joined = join_parts((row.head << rows.tile_shift) + row.row, column - first, parts, part_rows);
        if (plan.num_segments == 1) {
          write(item, row, column, joined);
        } else {
          float *const partial = place + index * kPlaceFloats;
          *reinterpret_cast<float4 *>(partial + column) = joined.o;
          if (column == 0) *reinterpret_cast<float2 *>(partial + kHeadDim) = {joined.m, joined.l};
        }
      });
    }
    if (plan.num_segments > 1 && arrives_last(plan)) join_segments(item, plan, rows);
    meet();  // the states and shared_ may be overwritten
  }

 private:
  __device__ void meet() const {
    if (barrier_ == 0) {  // the whole block
      __syncthreads();
    } else {
      named_barrier<kThreads>(barrier_);
    }
  }

  __device__ float *place_of(int index) const {
    return params_.partials + static_cast<uint32_t>(index * params_.place_floats);
  }

  // The rows of an item that have a result, head after head.
  struct Rows {
    int of_head;
    int heads;
    int tile_shift;  // log 2 of the rows of the tile that a head has

    __device__ TileRow tile_row(int index) const {
      if constexpr (Shape::kMaxHeadShift == 0) return {0, index};
      static_assert(Shape::kMaxHeadShift <= 2);
      const int head = (index >= of_head) + (index >= 2 * of_head) + (index >= 3 * of_head);
      return {heads == 1 ? 0 : head, heads == 1 ? index : index - head * of_head};
    }
  };
  __device__ Rows rows_of(const WorkItem &item) const {
    const int rows = num_rows(params_.batch, item.seq);
    if constexpr (Shape::kMaxHeadShift == 0) return {min(rows - item.query_tile * kRows, kRows), 1, 0};
    return {rows, 1 << item.head_shift, head_rows_shift(rows)};
  }

  template <class Function>
  __device__ void for_each_quad(const Rows &rows, int first, int columns, Function &&function) const {
    const int quads = columns / 4, count = rows.heads * rows.of_head * quads;
    for (int index = thread_; index < count; index += kThreads) {
      const int column = first + index % quads * 4;
      if (column < params_.head_dim) function(index / quads, column);
    }
  }

  __device__ RowState join_parts(int row, int column, int parts, int part_rows) const {
    RowState sum;
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
  __device__ void write(const WorkItem &item, TileRow place, int column, const RowState &state) const {
    const int row = item.query_tile * kRows + place.row, group = static_cast<int>(params_.batch.group.divisor);
    const int query = params_.batch.group.divide(row), kv_head = item.kv_head + place.head;
    const int64_t token = item.seq.first_token + query;
    const int head = kv_head * group + row - query * group;
    const float factor = end_row(params_, token, head, kv_head, state.m, state.l, column == 0);
    const float4 o = state.o;
    store_output<kOutputType>(params_, token * params_.out.token_stride + head * params_.out.head_stride + column,
                              {o.x * factor, o.y * factor, o.z * factor, o.w * factor});
  }

  __device__ bool arrives_last(const SegmentPlan &plan) const {
    return arrive_last(plan, params_.arrivals + plan.first_owner, shared_.last_to_arrive, thread_ == 0,
                       [&] { meet(); });
  }

  // A thread has kJoinedAtOnce partial results of four columns of a row on their way at once, since loads from L2 one
  // after the other would take longer than all the rest: of one row, or where segments are few of kQuads of its rows.
  __device__ void join_segments(const WorkItem &item, const SegmentPlan &plan, const Rows &rows) const {
    constexpr int kQuads = 4, kSegments = kJoinedAtOnce / kQuads, kQuadsOfRow = kHeadDim / 4;
    const bool few = plan.num_segments <= kSegments;
    const int count = rows.heads * rows.of_head * kQuadsOfRow, quads = few ? kQuads : 1;
#pragma unroll 1
    for (int begin = thread_; begin < count; begin += quads * kThreads) {
      RowState sums[kQuads];  // of a quad each, or of some segments of one
#pragma unroll 1
      for (int first = 0; first < plan.num_segments; first += kJoinedAtOnce) {
        float2 state[kQuads][kSegments];
        float4 o[kQuads][kSegments];
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          const int index = few ? begin + i * kThreads : begin, from = few ? 0 : first + i * kSegments;
#pragma unroll
          for (int k = 0; k < kSegments; ++k) {
            state[i][k] = {negative_infinity(), 0.0f};
            o[i][k] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (index < count && from + k < plan.num_segments) {
              const float *const partial = place_of(plan.first_place + from + k) + index / kQuadsOfRow * kPlaceFloats;
              state[i][k] = load_from_l2(reinterpret_cast<const float2 *>(partial + kHeadDim));
              o[i][k] = load_from_l2(reinterpret_cast<const float4 *>(partial) + index % kQuadsOfRow);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          float largest = sums[i].m;
#pragma unroll
          for (int k = 0; k < kSegments; ++k) largest = fmaxf(largest, state[i][k].x);
          sums[i].raise(largest);
#pragma unroll
          for (int k = 0; k < kSegments; ++k) sums[i].add(state[i][k].x, state[i][k].y, o[i][k]);
        }
      }
      if (!few) {
#pragma unroll
        for (int i = 1; i < kQuads; ++i) {
          sums[0].raise(fmaxf(sums[0].m, sums[i].m));
          sums[0].add(sums[i].m, sums[i].l, sums[i].o);
        }
      }
#pragma unroll 1
      for (int index = begin; index < min(count, begin + quads * kThreads); index += kThreads) {
        const int column = index % kQuadsOfRow * 4;
        if (column < params_.head_dim) write(item, rows.tile_row(index / kQuadsOfRow), column, sums[0]);
#pragma unroll
        for (int i = 1; i < kQuads; ++i) sums[i - 1] = sums[i];
      }
    }
  }

  const AttentionKernelParams &params_;
  Shared &shared_;
  float *states_;
  int thread_;
  int barrier_;
};

}  // namespace pagedattn::cuda
