// merge_states: attention over disjoint sets of keys, joined by log-sum-exp.
//
// SPDX-License-Identifier: Apache-2.0
//
//   lse = log sum_p exp(lse_p),   out = sum_p exp(lse_p - lse) out_p
//
// A row of threads takes one (token, head) and each thread a few neighbouring elements of it, 16 bytes where addresses
// and strides allow.  Every thread reads the row's few lses itself, first for their maximum, then for the weights.  A
// part whose lse is -inf saw no key: its output is not read, so it may hold anything.
//
// The views of the parts are kernel parameters.  More parts than fit take several launches that hand on (maximum,
// denominator, unnormalised sum) in float32, so accuracy does not depend on the number of parts.
//
// Bound by memory: every part is read once and the result written once.
#include "access.cuh"
#include "convert.cuh"
#include "cuda_backend.h"
#include "index_divisor.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "runtime.h"

namespace pagedattn::cuda {
namespace {

constexpr int kPartsPerLaunch = 64;  // 48 bytes each: with the rest, under the 4 KB that every driver passes.
constexpr float kMinusInfinity = -INFINITY;

struct Part {
  const char *out;
  int64_t out_token_stride;  // bytes
  int64_t out_head_stride;   // bytes
  const float *lse;
  int64_t lse_token_stride;
  int64_t lse_head_stride;
};

struct Args {
  Part parts[kPartsPerLaunch];
  int num_parts;
  bool first;  // nothing was carried in
  bool last;   // `out` is written rather than the state
  char *out;
  int64_t out_token_stride;  // bytes
  int64_t out_head_stride;   // bytes
  float *out_lse;            // or null
  int64_t out_lse_token_stride;
  int64_t out_lse_head_stride;
  float *state;  // [num_rows, head_dim + 2]: maximum, denominator, sums; null where one launch does
  int64_t num_rows;
  IndexDivisor num_heads;
  int32_t head_dim;
};
static_assert(sizeof(Args) <= 4000);

// What has been summed so far, relative to `maximum`.
struct RowState {
  float maximum;
  float denominator;
};

__device__ float part_lse(const Part &part, int64_t token, int64_t head) {
  return part.lse[token * part.lse_token_stride + head * part.lse_head_stride];
}

// exp(value - maximum), and 0 for a value of -inf even where the maximum is -inf too.
__device__ float weight(float value, float maximum) { return value == kMinusInfinity ? 0.0f : expf(value - maximum); }

template <class T, int N>
__device__ void accumulate(float (&sums)[N], const Pack<T, N> &values, float factor) {
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] += factor * to_float(values.element[i]);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreadsPerBlock) merge_states_kernel(const __grid_constant__ Args args) {
  wait_for_kernels_before();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= args.num_rows) return;
  int64_t head = row;
  const int64_t token = args.num_heads.split(&head);
  float *state = args.state == nullptr ? nullptr : args.state + row * (args.head_dim + int64_t{2});

  RowState before = {kMinusInfinity, 0.0f};
  if (!args.first) before = {state[0], state[1]};
  RowState merged = before;
  for (int p = 0; p < args.num_parts; ++p) merged.maximum = fmaxf(merged.maximum, part_lse(args.parts[p], token, head));
  const float carry = weight(before.maximum, merged.maximum);
  merged.denominator *= carry;
  for (int p = 0; p < args.num_parts; ++p) {
    merged.denominator += weight(part_lse(args.parts[p], token, head), merged.maximum);
  }
  const float normaliser = merged.denominator > 0.0f ? 1.0f / merged.denominator : merged.denominator;

  for (int64_t d = int64_t{threadIdx.x} * N; d < args.head_dim; d += int64_t{blockDim.x} * N) {
    float sums[N] = {};
    if (!args.first) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] = state[2 + d + i] * carry;
    }
#pragma unroll 4
    for (int p = 0; p < args.num_parts; ++p) {
      const Part &part = args.parts[p];
      const float lse = part_lse(part, token, head);
      const char *row_values = part.out + token * part.out_token_stride + head * part.out_head_stride;
      Pack<T, N> values = {};
      if (lse != kMinusInfinity) values = reinterpret_cast<const Pack<T, N> *>(row_values)[d / N];
      accumulate(sums, values, weight(lse, merged.maximum));
    }
    if (args.last) {
      Pack<T, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) result.element[i] = from_float<T>(sums[i] * normaliser);
      char *out = args.out + token * args.out_token_stride + head * args.out_head_stride;
      reinterpret_cast<Pack<T, N> *>(out)[d / N] = result;
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) state[2 + d + i] = sums[i];
    }
  }

  // The threads of a row may span warps, and all of them must have read what was carried in.
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (!args.last) {
    state[0] = merged.maximum;
    state[1] = merged.denominator;
  } else if (args.out_lse != nullptr) {
    args.out_lse[token * args.out_lse_token_stride + head * args.out_lse_head_stride] =
        merged.denominator == 0.0f ? kMinusInfinity : merged.maximum + logf(merged.denominator);
  }
}

// Views and strides of parts [first, first + count).
void set_parts(Args &args, const MergeStatesParams &p, int64_t first, int64_t count) {
  const int64_t size = dtype_size(p.dtype);
  for (int64_t i = 0; i < count; ++i) {
    const TokensView &out = p.outs[first + i];
    const MergeStatesParams::Lse &lse = p.lses[first + i];
    args.parts[i] = {static_cast<const char *>(out.data),
                     out.token_stride * size,
                     out.head_stride * size,
                     lse.data,
                     lse.token_stride,
                     lse.head_stride};
  }
  args.num_parts = static_cast<int>(count);
  args.first = first == 0;
  args.last = first + count == p.num_parts;
}

int64_t widest_access(const MergeStatesParams &p) {
  const int64_t size = dtype_size(p.dtype);
  AccessWidth width(p.head_dim * size);
  const auto include = [&](const TokensView &view) {
    width.address(view.data);
    width.stride(view.token_stride * size, p.num_tokens);
    width.stride(view.head_stride * size, p.num_heads);
  };
  include(p.out);
  for (int64_t i = 0; i < p.num_parts; ++i) include(p.outs[i]);
  return width.bytes();
}

template <class T, int N>
void launch(const Args &args, cudaStream_t stream, const char *name) {
  const dim3 threads = threads_over_rows(args.head_dim / N);
  const dim3 blocks(blocks_over_rows(args.num_rows, threads.y));
  launch_kernel({name, blocks, threads, 0, stream, EarlyStart::kAlways}, merge_states_kernel<T, N>, args);
}

}  // namespace

void merge_states(const MergeStatesParams &p, void *stream_pointer) {
  const bool wide = widest_access(p) == 16;
  const char *name = wide ? "cuda::merge_states_vector" : "cuda::merge_states_scalar";
  auto *stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t size = dtype_size(p.dtype);

  Args args = {};
  args.out = static_cast<char *>(p.out.data);
  args.out_token_stride = p.out.token_stride * size;
  args.out_head_stride = p.out.head_stride * size;
  args.out_lse = p.out_lse;
  args.out_lse_token_stride = p.out_lse_token_stride;
  args.out_lse_head_stride = p.out_lse_head_stride;
  args.num_rows = p.num_tokens * p.num_heads;
  args.num_heads = IndexDivisor::of(std::max(p.num_heads, 1));
  args.head_dim = p.head_dim;
  if (args.num_rows == 0) return record_kernel("merge_states", name);

  const bool one_launch = p.num_parts <= kPartsPerLaunch;
  const int64_t state_floats = one_launch ? 0 : args.num_rows * (p.head_dim + int64_t{2});
  const StreamMemory state(static_cast<size_t>(state_floats) * sizeof(float), stream);
  args.state = static_cast<float *>(state.data());
  for (int64_t first = 0; first < p.num_parts; first += kPartsPerLaunch) {
    set_parts(args, p, first, std::min<int64_t>(kPartsPerLaunch, p.num_parts - first));
    with_wide_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      constexpr int kWide = 16 / static_cast<int>(sizeof(T));
      wide ? launch<T, kWide>(args, stream, name) : launch<T, 1>(args, stream, name);
    });
  }
  record_kernel("merge_states", name);
}

}  // namespace pagedattn::cuda
