// Results of query rows that lie in registers: written, or kept in the workspace and joined.
//
// SPDX-License-Identifier: Apache-2.0
//
// Tensor-core kernels hold results as tiles of 8 columns (see multiply_add in ptx.cuh): lane c of a quad has columns 2
// c and 2 c + 1 of each, of two rows, i = 0 and 1.  A row of a partial result lies in the workspace as place_row_floats
// says, but which column lies where is known to the lane alone that has it.
#pragma once

#include "attention_epilogue.cuh"
#include "attention_params.cuh"
#include "ptx.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Lane c of four has words (j, c) of a row, j = 0 ... 3; it gets words (c, j).
__device__ inline uint4 transpose_quad(const uint32_t (&words)[4]) {
  const int c = static_cast<int>(threadIdx.x) % 4;
  const bool odd = c % 2 != 0, high = c / 2 != 0;
  uint32_t pairs[2][2];  // words of two neighbours: (c % 2, ...) and (2 + c % 2, ...)
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? words[2 * i] : words[2 * i + 1], 1);
    pairs[i][0] = odd ? other : words[2 * i];
    pairs[i][1] = odd ? words[2 * i + 1] : other;
  }
  const uint32_t first = __shfl_xor_sync(kFullWarp, high ? pairs[0][0] : pairs[1][0], 2);
  const uint32_t second = __shfl_xor_sync(kFullWarp, high ? pairs[0][1] : pairs[1][1], 2);
  return high ? uint4{first, second, pairs[1][0], pairs[1][1]} : uint4{pairs[0][0], pairs[0][1], first, second};
}

__device__ inline void store_eight(const AttentionKernelParams &params, uint16_t *out, const uint4 &eight) {
  if (params.out_bytes >= 16) {
    *reinterpret_cast<uint4 *>(out) = eight;
    return;
  }
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = static_cast<uint16_t>(words[i]);
    out[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
  }
}

// Stores a row times `factor`, from an offset in `out` on: for all lanes of a warp, those without a row with a negative
// offset.
template <class Math, int kTiles>
__device__ void write_row(const AttentionKernelParams &params, const float (&o)[kTiles][4], int i, int64_t offset,
                          float factor) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int first = 0; first < kTiles; first += 4) {
    uint32_t words[4] = {};
#pragma unroll
    for (int j = 0; j < 4 && first + j < kTiles; ++j) {
      words[j] = pack<Math>(o[first + j][2 * i] * factor, o[first + j][2 * i + 1] * factor);
    }
    const uint4 eight = transpose_quad(words);
    const int column = (first + lane) * 8;
    if (offset >= 0 && column < params.head_dim) {
      store_eight(params, static_cast<uint16_t *>(params.out.data) + offset + column, eight);
    }
  }
}

// A row of a partial result to its place.
template <int kTiles>
__device__ void store_partial_row(float *row, const float (&o)[kTiles][4], int i, float m, float l) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    *reinterpret_cast<float2 *>(row + tile * 8 + column) = {o[tile][2 * i], o[tile][2 * i + 1]};
  }
  if (column == 0) *reinterpret_cast<float2 *>(row + kTiles * 8) = {m, l};
}

// Adds it to a sum of such.  Products are rounded before they are added, so that of two parts either may come first.
template <int kTiles>
__device__ void add_partial_row(const float *row, float (&o)[kTiles][4], int i, float &m, float &l) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
  const float2 other = load_from_l2(reinterpret_cast<const float2 *>(row + kTiles * 8));
  const float largest = fmaxf(m, other.x);
  const float factor = rescale_factor(m, largest), weight = rescale_factor(other.x, largest);
  m = largest;
  l = __fadd_rn(__fmul_rn(l, factor), __fmul_rn(other.y, weight));
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const float2 x = load_from_l2(reinterpret_cast<const float2 *>(row + tile * 8 + column));
    o[tile][2 * i] = __fadd_rn(__fmul_rn(o[tile][2 * i], factor), __fmul_rn(x.x, weight));
    o[tile][2 * i + 1] = __fadd_rn(__fmul_rn(o[tile][2 * i + 1], factor), __fmul_rn(x.y, weight));
  }
}

}  // namespace pagedattn::cuda
