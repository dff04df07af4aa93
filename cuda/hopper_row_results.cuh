// Results of a warp's 16 rows from registers to global memory, through shared memory.
//
// SPDX-License-Identifier: Apache-2.0
//
// A thread has two neighbours of each eight columns (row_results.cuh), and should write eight.  Shuffles between the
// lanes of a quad take four times as many instructions, each waiting for the one before.
#pragma once

#include "attention_params.cuh"
#include "hopper_ptx.cuh"
#include "row_results.cuh"

namespace pagedattn::cuda {

// 64 columns at a time.  A row's chunks of 16 bytes are permuted, so that neither eight rows' same chunks nor what
// eight lanes read share banks.
struct ResultsRoom {
  alignas(128) char bytes[16 * 128];

  __device__ static constexpr SharedAddress place(int row, int chunk) {
    return static_cast<SharedAddress>(row * 128 + ((chunk ^ row) & 7) * 16);
  }
};

// Writes rows times their factors, from offsets in `out` on; rows with a negative offset are left out.  The room is the
// warp's own; its lanes meet by `meet`.
template <class Math, int kTiles, class Meet>
__device__ void write_rows(const AttentionKernelParams &params, SharedAddress room, const float (&o)[kTiles][4],
                           const int64_t (&offsets)[2], const float (&factors)[2], Meet &&meet) {
  static_assert(kTiles % 2 == 0);
  const int lane = thread_index() % 32, row = lane / 4;
  const SharedAddress to = room + ResultsRoom::place(lane % 16, lane / 16);
  // Of 64 columns a lane has two chunks, in the order in which eight rows' do not share banks.
  const int chunks[2] = {lane % 4 + row % 2 * 4, lane % 4 + (1 - row % 2) * 4};
  const SharedAddress from[2] = {room + ResultsRoom::place(row, chunks[0]), room + ResultsRoom::place(row, chunks[1])};
#pragma unroll
  for (int first = 0; first < kTiles; first += 8) {
    if (first > 0) meet();
#pragma unroll
    for (int tile = first; tile < first + 8 && tile < kTiles; tile += 2) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float *const pair = &o[tile + j / 2][j % 2 * 2];
        words[j] = pack<Math>(pair[0] * factors[j % 2], pair[1] * factors[j % 2]);
      }
      store_matrices(to ^ static_cast<SharedAddress>((tile - first) * 16), words);
    }
    meet();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = (first + chunks[half]) * 8;
      uint4 eights[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) eights[i] = load_shared(from[half] + i * ResultsRoom::place(8, 0));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (offsets[i] < 0 || column >= params.head_dim) continue;
        uint16_t *const out = static_cast<uint16_t *>(params.out.data) + offsets[i] + chunks[half] * 8;
        store_eight(params, out + first * 8, eights[i]);
      }
    }
  }
}

}  // namespace pagedattn::cuda
