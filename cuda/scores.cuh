// From products of queries and keys to scores, and online softmax's masks, in the registers of a row of tiles.
//
// SPDX-License-Identifier: Apache-2.0
//
// Tensor-core kernels hold products as tiles of 8 keys (see multiply_add in ptx.cuh): a thread has keys 2 c and 2 c + 1
// of each, c = lane % 4, of two rows.
#pragma once

#include "attention_params.cuh"
#include "ptx.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float negative_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// tanh to about 1e-7 absolute: scores that are computed from 16-bit numbers need no more.
__device__ inline float tanh_fast(float x) {
  const float e = exp2_fast(-2.0f * kLog2E * fabsf(x));
  return copysignf(__fdividef(1.0f - e, 1.0f + e), x);
}

// Products of the keys from `token` on to scores in units of log 2: scale, soft cap, ALiBi.  Of the two rows are given
// the scale, the slope in units of log 2, and the position; `lane` is the thread's of four.
template <int kTiles>
__device__ void transform_scores(float (&s)[kTiles][4], const AttentionKernelParams &params, const float (&scale)[2],
                                 const float (&slope)[2], const int (&position)[2], int token,
                                 int lane = static_cast<int>(threadIdx.x) % 4) {
  const float cap = params.softcap * kLog2E;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int first_key = token + lane * 2 - position[i];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float x = s[tile][2 * i + j] * scale[i];
        if (params.softcap > 0.0f) x = cap * tanh_fast(x);
        s[tile][2 * i + j] = x + slope[i] * static_cast<float>(first_key + tile * 8 + j);
      }
    }
  }
}

// Keys that the rows do not see get no weight, whatever was computed from them.
template <int kTiles>
__device__ void mask_scores(float (&s)[kTiles][4], const Range (&keys)[2], int token) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int first_key = token + static_cast<int>(threadIdx.x) % 4 * 2;
    const int begin = keys[i].begin - first_key, end = keys[i].end - first_key;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (tile * 8 + j < begin || tile * 8 + j >= end) s[tile][2 * i + j] = negative_infinity();
      }
    }
  }
}

// The same with a bit a key that says whether it is seen, which takes a third of the instructions that comparisons
// take; for kernels that mask a good part of their tiles.
template <int kTiles>
__device__ void mask_scores_by_bits(float (&s)[kTiles][4], const Range (&keys)[2], int token,
                                    int lane = static_cast<int>(threadIdx.x) % 4) {
  static_assert(kTiles <= 16);
  const int first_key = token + lane * 2;
  const auto bits_before = [&](int key) {  // of the thread's
    const int distance = clamp_to(key - first_key, 0, kTiles * 8), bits = distance / 8 * 2 + smaller(distance % 8, 2);
    return bits >= 32 ? ~0u : (1u << bits) - 1;
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t seen = bits_before(keys[i].end) & ~bits_before(keys[i].begin);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if ((seen >> (tile * 2 + j) & 1) == 0) s[tile][2 * i + j] = negative_infinity();
      }
    }
  }
}

}  // namespace pagedattn::cuda
