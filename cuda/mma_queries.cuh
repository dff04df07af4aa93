// Loads a tile of packed query rows to shared memory for the tensor-core kernels.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "mma_traits.cuh"
#include "ptx.cuh"

namespace pagedattn::cuda {

// Where a pair of dimensions goes, in pairs, for the product with float8 keys (see float8_fragments.cuh).
__device__ constexpr int float8_pair_place(int pair) { return pair / 8 * 8 + pair % 2 * 4 + pair % 8 / 2; }

struct QChunk {
  uint32_t pairs[4];
};

// Eight elements of 16 bits, or of eight as they come in the first two words, from where no more than one can be read.
__device__ inline QChunk load_halves(const uint16_t *x) {
  QChunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) chunk.pairs[i] = x[2 * i] | static_cast<uint32_t>(x[2 * i + 1]) << 16;
  return chunk;
}
__device__ inline QChunk load_bytes(const uint8_t *x) {
  QChunk chunk{};
#pragma unroll
  for (int i = 0; i < 8; ++i) chunk.pairs[i / 4] |= static_cast<uint32_t>(x[i]) << i % 4 * 8;
  return chunk;
}

// Float8 ones, which come in two words, as float16.
template <class Float8>
__device__ QChunk widen_q_chunk(uint32_t first, uint32_t second) {
  QChunk wide;
  widen<Float8>(first, wide.pairs[0], wide.pairs[1]);
  widen<Float8>(second, wide.pairs[2], wide.pairs[3]);
  return wide;
}

// Rounds bfloat16 pairs to float16 after dividing the row by the power of two below its largest element, which the
// kLanes lanes that hold the row, kChunks each, find together; returns that power.
template <int kLanes, int kChunks = 1>
__device__ float normalise_bfloat16_row(QChunk *x) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4 * kChunks; ++i) {
    const uint32_t pair = x[i / 4].pairs[i % 4];
    largest = max(largest, max(pair & 0x7fffu, pair >> 16 & 0x7fffu));
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  }
  // Biased exponents 1 ... 253, so that the power and its inverse are normal numbers.
  const uint32_t exponent = min(max(largest >> 7, 1u), 253u);
  const float inverse = __uint_as_float((254 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 4 * kChunks; ++i) {
    uint32_t &pair = x[i / 4].pairs[i % 4];
    pair = pack<__half>(__uint_as_float(pair << 16) * inverse, __uint_as_float(pair & 0xffff0000u) * inverse);
  }
  return __uint_as_float(exponent << 23);
}

// Chunks of the item's query rows on their way to shared memory, zeros where there is no row or dimension: a thread's
// kCount from the `first` on.  Fetched before the keys and values are asked for, they need not queue behind those.
// What is the same for all chunks is asked once, so that all are on their way together.
template <class Traits, int kCount>
class QueryChunks {
  static constexpr int kChunks = Traits::QTile::kChunks;
  static constexpr int kLanes = kChunks > 16 ? 32 : kChunks > 8 ? 16 : 8;  // a power of two that a row's chunks fit in
  static constexpr int kRowsAtOnce = Traits::kQThreads / kLanes;           // of which the threads have a chunk each
  static_assert(Traits::kQThreads % kLanes == 0);

 public:
  // Of a thread, to cover this many rows.
  __device__ static constexpr int chunks_of_thread(int rows) { return (rows + kRowsAtOnce - 1) / kRowsAtOnce; }

  __device__ QueryChunks(int first, int thread)
      : first_row_(first * kRowsAtOnce + static_cast<int>(static_cast<uint32_t>(thread) / kLanes)),
        chunk_(static_cast<int>(static_cast<uint32_t>(thread) % kLanes)) {}

  __device__ void fetch(const AttentionKernelParams &params, const WorkItem &item) {
    if (params.q_wide) {
      fetch_with(params, item, [](const char *x, bool is_float8) {
        if (is_float8) {
          const uint2 words = *reinterpret_cast<const uint2 *>(x);
          return QChunk{{words.x, words.y, 0, 0}};
        }
        const uint4 words = *reinterpret_cast<const uint4 *>(x);
        return QChunk{{words.x, words.y, words.z, words.w}};
      });
    } else {
      fetch_with(params, item, [](const char *x, bool is_float8) {
        return is_float8 ? load_bytes(reinterpret_cast<const uint8_t *>(x))
                         : load_halves(reinterpret_cast<const uint16_t *>(x));
      });
    }
  }

  __device__ void store(const AttentionKernelParams &params, char *q_tile, RowTable<Traits::kRows> &rows) {
    float scales[kCount];
    if constexpr (Traits::kFloat8) make_float16(params, scales);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (row(i) >= Traits::kRows || chunk_ >= kChunks) continue;
      const QChunk &x = chunks_[i];
      if constexpr (Traits::kFloat8) {
        if (chunk_ == 0) rows.q_scale[row(i)] = scales[i];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int pair = float8_pair_place(chunk_ * 4 + k);
          *reinterpret_cast<uint32_t *>(q_tile + Traits::QTile::offset(row(i), pair / 4) + pair % 4 * 4) = x.pairs[k];
        }
      } else {
        *reinterpret_cast<uint4 *>(q_tile + Traits::QTile::offset(row(i), chunk_)) = {x.pairs[0], x.pairs[1],
                                                                                      x.pairs[2], x.pairs[3]};
      }
    }
  }

 private:
  // `load` takes where eight elements lie, and whether they are float8.
  template <class Load>
  __device__ void fetch_with(const AttentionKernelParams &params, const WorkItem &item, Load &&load) {
    const bool is_float8 = Traits::kFloat8 && params.q_is_float8;
    const int rows = num_rows(params.batch, item.seq), group = static_cast<int>(params.batch.group.divisor);
    const int first_row = item.query_tile * Traits::kRows, heads = 1 << item.head_shift;
    const int64_t token_bytes = params.q.token_stride * (is_float8 ? 1 : 2);
    const int64_t head_bytes = params.q.head_stride * (is_float8 ? 1 : 2);
    const char *const q = static_cast<const char *>(params.q.data) + item.seq.first_token * token_bytes +
                          static_cast<int64_t>(item.kv_head) * group * head_bytes + chunk_ * (is_float8 ? 8 : 16);
    const bool has_dimensions = chunk_ * 8 < params.head_dim;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const TileRow place = tile_row<typename Traits::Shape>(params.batch, item, row(i));
      const int packed_row = first_row + place.row;
      chunks_[i] = {};
      if (has_dimensions && row(i) < Traits::kRows && place.head < heads && packed_row < rows) {
        const int query = params.batch.group.divide(packed_row);
        const int head = place.head * group + packed_row - query * group;
        chunks_[i] = load(q + query * token_bytes + head * head_bytes, is_float8);
      }
    }
  }

  // What the chunks have come as becomes float16: bfloat16 rows divided by `scales`, or float8 ones.
  __device__ void make_float16(const AttentionKernelParams &params, float (&scales)[kCount]) {
#pragma unroll
    for (float &scale : scales) scale = 1.0f;
    if (params.q_is_bfloat16) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) scales[i] = normalise_bfloat16_row<kLanes>(&chunks_[i]);
    } else if (params.q_is_float8) {
#pragma unroll
      for (QChunk &x : chunks_) x = widen_q_chunk<typename Traits::CacheElement>(x.pairs[0], x.pairs[1]);
    }
  }

  __device__ int row(int i) const { return first_row_ + i * kRowsAtOnce; }

  int first_row_;
  int chunk_;
  QChunk chunks_[kCount];
};

template <class Traits>
using AllQueryChunks = QueryChunks<Traits, QueryChunks<Traits, 1>::chunks_of_thread(Traits::kRows)>;

// The first `rows` of them, kAtOnce at a time: tall tiles have too many for the registers.
template <class Traits, int kAtOnce = 2>
__device__ void load_queries(const AttentionKernelParams &params, const WorkItem &item, int rows, char *q_tile,
                             RowTable<Traits::kRows> &table, int thread) {
  using Some = QueryChunks<Traits, kAtOnce>;
#pragma unroll 1
  for (int first = 0; first < Some::chunks_of_thread(rows); first += kAtOnce) {
    Some chunks(first, thread);
    chunks.fetch(params, item);
    chunks.store(params, q_tile, table);
  }
}

}  // namespace pagedattn::cuda
