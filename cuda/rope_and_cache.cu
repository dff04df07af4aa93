// rope_and_cache: keys are rotated on their way to their slots, values follow them, and queries are rotated beside.
//
// SPDX-License-Identifier: Apache-2.0
//
// The heads of a token's query, key and value stand in one row, and a thread block takes a few rows.  A thread takes
// two packs of N elements at a time, of which each pair (x, y) of a rotary dimension becomes (x cos - y sin, y cos +
// x sin): with half the rotary dimensions between the packs where pairs are split by halves, side by side where they
// interleave.  What is behind the rotary dimensions, and all of a value, passes through the same way unrotated.  N is
// 16 bytes' worth where addresses, strides and dimensions allow, else 1.
//
// Bound by memory where tokens are many and by the latency of two trips to memory where they are few.  The second,
// behind the position, fetches its cosines and sines, which all heads of a token share: they go to shared memory once,
// while the elements are on their way.  Arithmetic is in float32, and a float8 cache is rounded to from there.  Tokens
// whose position is not in the table are left alone.
#include "cache_rows.cuh"
#include "cuda_backend.h"
#include "fast_divisor.cuh"
#include "index_divisor.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "runtime.h"

namespace pagedattn::cuda {
namespace {

struct Args {
  TokenRows query, query_out, key, value;
  CacheRows k_cache, v_cache;
  void *query_data, *query_out_data, *key_data, *value_data, *k_cache_data, *v_cache_data;
  Scale k_scale, v_scale;
  const int64_t *slot_mapping;
  const void *positions;
  const void *cos_sin;
  int64_t cos_sin_stride;
  int64_t max_position;
  int64_t num_tokens;
  int64_t num_slots;
  IndexDivisor block_size;
  FastDivisor threads_per_head;  // two packs each
  int num_q_heads;
  int num_kv_heads;
  int half_rotary;
  DType cos_sin_dtype;
  bool long_positions;
  bool interleaved;
};

// Where a thread's packs begin in their head, and its first pair of rotary dimensions, or -1.
struct Place {
  int first;
  int second;
  int pair;
};

template <int N>
__device__ Place place_of(const Args &args, int unit) {
  const int pair = unit * N;
  if (pair >= args.half_rotary) return {2 * pair, 2 * pair + N, -1};
  return args.interleaved ? Place{2 * pair, 2 * pair + N, pair} : Place{pair, args.half_rotary + pair, pair};
}

__device__ float load_float(const void *data, DType dtype, int64_t at) {
  if (dtype == DType::kFloat32) return static_cast<const float *>(data)[at];
  if (dtype == DType::kFloat16) return to_float(static_cast<const float16 *>(data)[at]);
  return to_float(static_cast<const bfloat16 *>(data)[at]);
}

// x holds the first pack and behind it the second.
template <int N>
__device__ void rotate(float (&x)[2 * N], const float *cosine, const float *sine, bool interleaved) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float a = interleaved ? x[2 * i] : x[i];
    const float b = interleaved ? x[2 * i + 1] : x[N + i];
    const float rotated_a = a * cosine[i] - b * sine[i];
    const float rotated_b = b * cosine[i] + a * sine[i];
    if (interleaved) {
      x[2 * i] = rotated_a;
      x[2 * i + 1] = rotated_b;
    } else {
      x[i] = rotated_a;
      x[N + i] = rotated_b;
    }
  }
}

template <class T, int N>
struct TwoPacks {
  Pack<T, N> first, second;
};

template <class Source, int N>
__device__ TwoPacks<Source, N> load_packs(const char *head, const Place &place) {
  const auto *elements = reinterpret_cast<const Source *>(head);
  return {*reinterpret_cast<const Pack<Source, N> *>(elements + place.first),
          *reinterpret_cast<const Pack<Source, N> *>(elements + place.second)};
}

template <class Target, int N>
__device__ void store_packs(char *head, const Place &place, float (&x)[2 * N], float scale) {
  float first[N], second[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    first[i] = x[i];
    second[i] = x[N + i];
  }
  auto *elements = reinterpret_cast<Target *>(head);
  if constexpr (sizeof(Target) == 1) {
    *reinterpret_cast<Pack<Target, N> *>(elements + place.first) = divide_and_round<Target>(first, scale);
    *reinterpret_cast<Pack<Target, N> *>(elements + place.second) = divide_and_round<Target>(second, scale);
  } else {
    *reinterpret_cast<Pack<Target, N> *>(elements + place.first) = from_floats<Target>(first);
    *reinterpret_cast<Pack<Target, N> *>(elements + place.second) = from_floats<Target>(second);
  }
}

// What thread i of a token's row takes.
enum class Kind { kQuery, kKey, kValue };

struct Unit {
  Kind kind;
  int head;
  Place place;
};

template <int N>
__device__ Unit unit_of(const Args &args, int i) {
  int head = args.threads_per_head.divide(i);
  const Place place = place_of<N>(args, i - head * static_cast<int>(args.threads_per_head.divisor));
  if (head < args.num_q_heads) return {Kind::kQuery, head, place};
  head -= args.num_q_heads;
  if (head < args.num_kv_heads) return {Kind::kKey, head, place};
  return {Kind::kValue, head - args.num_kv_heads, place};
}

template <class Source, int N>
__device__ TwoPacks<Source, N> load_unit(const Args &args, int64_t token, const Unit &unit) {
  const char *const source = unit.kind == Kind::kQuery ? args.query.head(args.query_data, token, unit.head)
                             : unit.kind == Kind::kKey ? args.key.head(args.key_data, token, unit.head)
                                                       : args.value.head(args.value_data, token, unit.head);
  return load_packs<Source, N>(source, unit.place);
}

template <class Source, class Target, int N>
__global__ void __launch_bounds__(kThreadsPerBlock, 4) rope_and_cache_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(16) float turns[];  // a token's cosines and then its sines
  wait_for_kernels_before();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = token < args.num_tokens;
  const auto lane = static_cast<int>(threadIdx.x), lanes = static_cast<int>(blockDim.x);
  const int units = (args.num_q_heads + 2 * args.num_kv_heads) * static_cast<int>(args.threads_per_head.divisor);
  int64_t position = -1, slot = -1;
  TwoPacks<Source, N> held;
  if (exists) {
    position = args.long_positions ? static_cast<const int64_t *>(args.positions)[token]
                                   : int64_t{static_cast<const int32_t *>(args.positions)[token]};
    slot = args.slot_mapping[token];
    if (lane < units) held = load_unit<Source, N>(args, token, unit_of<N>(args, lane));
  }
  const bool has_position = position >= 0 && position < args.max_position;
  float *const cosines = turns + static_cast<int>(threadIdx.y) * 2 * args.half_rotary;
  if (has_position) {
    for (int i = lane; i < 2 * args.half_rotary; i += lanes) {
      cosines[i] = load_float(args.cos_sin, args.cos_sin_dtype, position * args.cos_sin_stride + i);
    }
  }
  __syncthreads();
  if (!has_position) return;
  const bool has_slot = slot >= 0 && slot < args.num_slots;
  const int64_t block = args.block_size.split(&slot);  // which leaves the offset

  for (int i = lane; i < units; i += lanes) {
    const Unit unit = unit_of<N>(args, i);
    float x[2 * N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      x[e] = to_float(held.first.element[e]);
      x[N + e] = to_float(held.second.element[e]);
    }
    if (unit.kind != Kind::kValue && unit.place.pair >= 0) {
      const float *const cosine = cosines + unit.place.pair;
      rotate<N>(x, cosine, cosine + args.half_rotary, args.interleaved);
    }
    if (unit.kind == Kind::kQuery) {
      store_packs<Source, N>(args.query_out.head(args.query_out_data, token, unit.head), unit.place, x, 1.0f);
    } else if (has_slot && unit.kind == Kind::kValue) {
      store_packs<Target, N>(args.v_cache.head(args.v_cache_data, block, slot, unit.head), unit.place, x,
                             scale_of(args.v_scale, unit.head));
    } else if (has_slot) {
      store_packs<Target, N>(args.k_cache.head(args.k_cache_data, block, slot, unit.head), unit.place, x,
                             scale_of(args.k_scale, unit.head));
    }
    if (i + lanes < units) held = load_unit<Source, N>(args, token, unit_of<N>(args, i + lanes));
  }
}

template <class Source, class Target, int N>
void launch(const RopeAndCacheParams &p, Args args, cudaStream_t stream, const char *name) {
  const int64_t units = p.write.head_dim / (2 * N);
  args.threads_per_head = FastDivisor::of(checked_int(units, "elements a head"));
  const int total = checked_int((p.num_q_heads + int64_t{2} * p.write.num_kv_heads) * units, "elements a token");
  const dim3 threads = threads_over_rows(total);
  const unsigned blocks = blocks_over_rows(p.write.num_tokens, threads.y);
  const size_t shared_bytes = threads.y * 2 * static_cast<size_t>(args.half_rotary) * sizeof(float);
  launch_kernel({name, dim3(blocks), threads, shared_bytes, stream, EarlyStart::kUnlessCaptured},
                rope_and_cache_kernel<Source, Target, N>, args);
}

Args launch_arguments(const RopeAndCacheParams &p) {
  const ReshapeAndCacheParams &w = p.write;
  Args args = {};
  args.query = token_rows(p.query, w.src_dtype);
  args.query_out = token_rows(p.query_out, w.src_dtype);
  args.key = token_rows(w.key, w.src_dtype);
  args.value = token_rows(w.value, w.src_dtype);
  args.k_cache = cache_rows(w.k_cache, w.kv_dtype);
  args.v_cache = cache_rows(w.v_cache, w.kv_dtype);
  args.query_data = p.query.data;
  args.query_out_data = p.query_out.data;
  args.key_data = w.key.data;
  args.value_data = w.value.data;
  args.k_cache_data = w.k_cache.data;
  args.v_cache_data = w.v_cache.data;
  args.k_scale = w.k_scale;
  args.v_scale = w.v_scale;
  args.slot_mapping = w.slot_mapping;
  args.positions = p.positions;
  args.cos_sin = p.cos_sin;
  args.cos_sin_stride = p.cos_sin_stride;
  args.max_position = p.max_position;
  args.num_tokens = w.num_tokens;
  args.num_slots = w.num_blocks * w.block_size;
  args.block_size = IndexDivisor::of(w.block_size);
  args.num_q_heads = p.num_q_heads;
  args.num_kv_heads = w.num_kv_heads;
  args.half_rotary = p.rotary_dim / 2;
  args.cos_sin_dtype = p.cos_sin_dtype;
  args.long_positions = p.long_positions;
  args.interleaved = p.interleaved;
  return args;
}

// Whether two packs of `n` elements begin at multiples of their size wherever a thread's do.
bool packs_fit(const RopeAndCacheParams &p, const Args &args, int64_t n) {
  const ReshapeAndCacheParams &w = p.write;
  if (w.head_dim % (2 * n) != 0 || p.rotary_dim % (2 * n) != 0) return false;
  AccessWidth source(0), target(0);
  source.address(w.key.data);
  source.address(w.value.data);
  target.address(w.k_cache.data);
  target.address(w.v_cache.data);
  include_strides(&source, args.key, w.num_tokens, w.num_kv_heads);
  include_strides(&source, args.value, w.num_tokens, w.num_kv_heads);
  include_strides(&target, args.k_cache, w.num_blocks, w.block_size, w.num_kv_heads);
  include_strides(&target, args.v_cache, w.num_blocks, w.block_size, w.num_kv_heads);
  if (p.num_q_heads > 0) {
    source.address(p.query.data);
    source.address(p.query_out.data);
    include_strides(&source, args.query, w.num_tokens, p.num_q_heads);
    include_strides(&source, args.query_out, w.num_tokens, p.num_q_heads);
  }
  return source.bytes() >= n * dtype_size(w.src_dtype) && target.bytes() >= n * dtype_size(w.kv_dtype);
}

}  // namespace

void rope_and_cache(const RopeAndCacheParams &p, void *stream_pointer) {
  const ReshapeAndCacheParams &w = p.write;
  const bool quantize = w.src_dtype != w.kv_dtype;
  const char *name = quantize ? "cuda::rope_and_cache_quantize" : "cuda::rope_and_cache_copy";
  record_kernel("rope_and_cache", name);
  if (w.num_tokens == 0) return;
  auto *stream = static_cast<cudaStream_t>(stream_pointer);
  const Args args = launch_arguments(p);
  with_wide_type(w.src_dtype, [&](auto source) {
    using Source = decltype(source);
    constexpr int kWide = 16 / static_cast<int>(sizeof(Source));
    const auto with_target = [&](auto target) {
      using Target = decltype(target);
      if (packs_fit(p, args, kWide)) {
        launch<Source, Target, kWide>(p, args, stream, name);
      } else {
        launch<Source, Target, 1>(p, args, stream, name);
      }
    };
    quantize ? with_float8_type(w.kv_dtype, with_target) : with_target(source);
  });
}

}  // namespace pagedattn::cuda
