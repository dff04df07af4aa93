// What the Hopper prefill kernels over float8 caches have besides: a warpgroup that widens all that is multiplied.
//
// SPDX-License-Identifier: Apache-2.0
//
// The tensor cores multiply float16, which holds every float8.  The copy engine brings a tile of K or V, as it lies in
// the cache, to the end of the room that it will take.  Then this warpgroup writes it as float16 where the
// 16-bit kernels' copy engine would, so that what computes sees no difference.  It also widens float8 queries, and
// divides rows of bfloat16 queries by a power of two, so that they fit float16; a row's scores take that, and the
// scales of Q and K, as a factor.
//
// Bound: the time from a tile's room being free to its being float16.  One prompt of 8192 tokens, 32 heads of 128 over
// 8: 978 us on an H100, 565 TFLOP/s.
#pragma once

#include <numeric>

#include "hopper_prefill_traits.cuh"
#include "hopper_wgmma.cuh"
#include "mma_queries.cuh"

namespace pagedattn::cuda {

// Half of the warpgroup widens keys, the other half queries and values.
template <class Traits>
class Widener {
  using Tile = typename Traits::KvTile;
  using Queries = typename Traits::QTile;
  static constexpr int kThreads = 64;
  static constexpr int kChunks = Traits::kHeadDim / 8;  // of eight elements in a row
  static constexpr int kRows = Traits::kTokens / 4;     // a tile is widened in quarters
  static constexpr int kOfThread = kRows * kChunks / kThreads;
  // The places of a thread's chunks are the same again every so many, and so many bytes further on.
  static constexpr int kPlaces = std::lcm(kThreads, Traits::kHeadDim) / kThreads;
  static constexpr int kPlacesBytes = kPlaces * kThreads / Traits::kHeadDim * Tile::kEightRows;
  static_assert(kRows % 8 == 0 && kRows * kChunks % kThreads == 0);

 public:
  // `barrier`: for the half's threads to meet at.
  __device__ Widener(const HopperParams &params, typename Traits::Shared &shared, bool keys, int barrier)
      : params_(params),
        shared_(shared),
        keys_(keys),
        thread_(static_cast<int>(threadIdx.x) % kThreads),
        barrier_(barrier) {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int index = thread_ + kThreads * i;
      places_[i] = Tile::offset(index / kChunks, index % kChunks);
    }
  }

  // So many tiles of K, or of V, and the queries that meet them.
  __device__ void widen_segment(uint32_t number, int tiles, float scale) {
    if (!keys_) widen_queries(number % Traits::kQStages, number / Traits::kQStages & 1, scale);
#pragma unroll 1
    for (; tiles > 0; --tiles, ++tile_) {
      const uint32_t stage = tile_ % Traits::kKvStages;
      wait(keys_ ? &shared_.raw.k[stage] : &shared_.raw.v[stage], tile_ / Traits::kKvStages & 1);
      widen_tile(keys_ ? shared_.k[stage] : shared_.v[stage]);
      publish(keys_ ? &shared_.k_full[stage] : &shared_.v_full[stage]);
    }
  }

 private:
  using Chunks = uint2[kOfThread];

  // Float16 of the first two quarters lies where nothing is.  That of the third takes the place of these as they came,
  // and that of the fourth the place of the last two: all threads have read what is overwritten.
  __device__ void widen_tile(char *tile) const {
    Chunks chunks;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      load(chunks, tile + Traits::kRawPlace + quarter * kRows * Traits::kHeadDim);
      if (quarter >= 2) named_barrier<kThreads>(barrier_);
      store(chunks, tile + quarter * (kRows / 8) * Tile::kEightRows);
    }
  }
  __device__ void load(Chunks &chunks, const char *from) const {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) chunks[i] = reinterpret_cast<const uint2 *>(from)[thread_ + kThreads * i];
  }
  __device__ void store(const Chunks &chunks, char *to) const {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      uint4 wide;
      widen<typename Traits::CacheElement>(chunks[i].x, wide.x, wide.y);
      widen<typename Traits::CacheElement>(chunks[i].y, wide.z, wide.w);
      *reinterpret_cast<uint4 *>(to + places_[i % kPlaces] + i / kPlaces * kPlacesBytes) = wide;
    }
  }
  __device__ void publish(Barrier *full) const {
    publish_shared_writes();
    __syncwarp();
    if (thread_ % 32 == 0) arrive(full);
  }

  __device__ void widen_queries(uint32_t stage, uint32_t phase, float scale) {
    float (&factors)[Traits::kRows] = shared_.raw.factors[stage];
    wait(&shared_.raw.q[stage], phase);
    if (params_.q_is_bfloat16) {
#pragma unroll 1
      for (int row = thread_ / 8; row < Traits::kRows; row += kThreads / 8) {
        const float power = widen_query_row(shared_.q[stage], row);
        if (thread_ % 8 == 0) factors[row] = power * scale;
      }
    } else {
      if (params_.q_is_float8) widen_float8_queries(shared_.q[stage]);
      for (int row = thread_; row < Traits::kRows; row += kThreads) factors[row] = scale;
    }
    publish(&shared_.q_full[stage]);
  }

  // They come to the end of each column's room.  Rows are widened from the first on, so that what a row takes the place
  // of has been widened, or read, before.  Eight lanes have a row.
  __device__ void widen_float8_queries(char *q) const {
#pragma unroll 1
    for (int row = thread_ / 8; row < Traits::kRows; row += kThreads / 8) {
      uint2 raw[Queries::kColumns];
#pragma unroll
      for (int column = 0; column < Queries::kColumns; ++column) {
        const char *const column_start = q + column * Queries::kColumnBytes + Traits::kRawQueryPlace;
        raw[column] = *reinterpret_cast<const uint2 *>(column_start + row * 64 + thread_ % 8 * 8);
      }
      named_barrier<kThreads>(barrier_);
#pragma unroll
      for (int column = 0; column < Queries::kColumns; ++column) {
        const QChunk wide = widen_q_chunk<typename Traits::CacheElement>(raw[column].x, raw[column].y);
        *reinterpret_cast<uint4 *>(q + Queries::offset(row, column * 8 + thread_ % 8)) = {wide.pairs[0], wide.pairs[1],
                                                                                          wide.pairs[2], wide.pairs[3]};
      }
    }
  }

  // Returns the power of two that it has been divided by.  Eight lanes have a row.
  __device__ float widen_query_row(char *q, int row) const {
    uint4 *chunks[Queries::kColumns];
    QChunk x[Queries::kColumns];
#pragma unroll
    for (int column = 0; column < Queries::kColumns; ++column) {
      chunks[column] = reinterpret_cast<uint4 *>(q + Queries::offset(row, column * 8 + thread_ % 8));
      const uint4 words = *chunks[column];
      x[column] = {{words.x, words.y, words.z, words.w}};
    }
    const float power = normalise_bfloat16_row<8, Queries::kColumns>(x);
#pragma unroll
    for (int column = 0; column < Queries::kColumns; ++column) {
      *chunks[column] = {x[column].pairs[0], x[column].pairs[1], x[column].pairs[2], x[column].pairs[3]};
    }
    return power;
  }

  const HopperParams &params_;
  typename Traits::Shared &shared_;
  bool keys_;
  int thread_;
  int barrier_;
  uint32_t tile_ = 0;
  int places_[kPlaces];  // of the first chunks in a quarter of a tile
};

}  // namespace pagedattn::cuda
