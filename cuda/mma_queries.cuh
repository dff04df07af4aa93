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

__device__ inline QChunk load_q_chunk(const AttentionKernelParams &params, const uint16_t *row, int chunk) {
  if (params.q_wide) {
    const uint4 x = *reinterpret_cast<const uint4 *>(row + chunk * 8);
    return {{x.x, x.y, x.z, x.w}};
  }
  QChunk x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x.pairs[i] = row[chunk * 8 + 2 * i] | static_cast<uint32_t>(row[chunk * 8 + 2 * i + 1]) << 16;
  }
  return x;
}

// Float8 ones as they come, in the first two words.
__device__ inline QChunk load_float8_q_chunk(const AttentionKernelParams &params, const uint8_t *row, int chunk) {
  if (params.q_wide) {
    const uint2 x = *reinterpret_cast<const uint2 *>(row + chunk * 8);
    return {{x.x, x.y, 0, 0}};
  }
  QChunk x{};
#pragma unroll
  for (int i = 0; i < 8; ++i) x.pairs[i / 4] |= static_cast<uint32_t>(row[chunk * 8 + i]) << i % 4 * 8;
  return x;
}

// What has come so, as float16.
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
template <class Traits, int kCount>
class QueryChunks {
  static constexpr int kChunks = Traits::QTile::kChunks;
  static constexpr int kLanes = kChunks > 16 ? 32 : kChunks > 8 ? 16 : 8;  // a power of two that a row's chunks fit in

 public:
  // Of a thread, to cover this many rows.
  __device__ static constexpr int chunks_of_thread(int rows) {
    return (rows * kLanes + Traits::kQThreads - 1) / Traits::kQThreads;
  }

  __device__ QueryChunks(int first, int thread) : first_(first), thread_(thread) {}

  __device__ void fetch(const AttentionKernelParams &params, const WorkItem &item) {
    const int rows = num_rows(params.batch, item.seq), group = static_cast<int>(params.batch.group.divisor);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const TileRow place = tile_row<typename Traits::Shape>(params.batch, item, row(i));
      const int packed_row = item.query_tile * Traits::kRows + place.row;
      chunks_[i] = {};
      if (row(i) < Traits::kRows && place.head < 1 << item.head_shift && packed_row < rows &&
          chunk(i) * 8 < params.head_dim) {
        const int query = params.batch.group.divide(packed_row);
        const int64_t token = item.seq.first_token + query;
        const int64_t head = (item.kv_head + place.head) * group + packed_row - query * group;
        const int64_t offset = token * params.q.token_stride + head * params.q.head_stride;
        if (Traits::kFloat8 && params.q_is_float8) {
          chunks_[i] = load_float8_q_chunk(params, static_cast<const uint8_t *>(params.q.data) + offset, chunk(i));
        } else {
          chunks_[i] = load_q_chunk(params, static_cast<const uint16_t *>(params.q.data) + offset, chunk(i));
        }
      }
    }
  }

  __device__ void store(const AttentionKernelParams &params, char *q_tile, RowTable<Traits::kRows> &rows) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const QChunk &x = chunks_[i];
      float scale = 1.0f;
      if constexpr (Traits::kFloat8) {
        if (params.q_is_bfloat16) scale = normalise_bfloat16_row<kLanes>(&chunks_[i]);
        if (params.q_is_float8) chunks_[i] = widen_q_chunk<typename Traits::CacheElement>(x.pairs[0], x.pairs[1]);
      }
      if (row(i) >= Traits::kRows || chunk(i) >= kChunks) continue;
      if constexpr (Traits::kFloat8) {
        if (chunk(i) == 0) rows.q_scale[row(i)] = scale;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int pair = float8_pair_place(chunk(i) * 4 + k);
          *reinterpret_cast<uint32_t *>(q_tile + Traits::QTile::offset(row(i), pair / 4) + pair % 4 * 4) = x.pairs[k];
        }
      } else {
        *reinterpret_cast<uint4 *>(q_tile + Traits::QTile::offset(row(i), chunk(i))) = {x.pairs[0], x.pairs[1],
                                                                                        x.pairs[2], x.pairs[3]};
      }
    }
  }

 private:
  __device__ int index(int i) const { return (first_ + i) * Traits::kQThreads + thread_; }
  __device__ int row(int i) const { return index(i) / kLanes; }
  __device__ int chunk(int i) const { return index(i) % kLanes; }

  int first_;
  int thread_;
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
