// Paged attention by mma.sync for every sm_80+ device: 16-bit queries over 16-bit or float8 caches.
//
// SPDX-License-Identifier: Apache-2.0
//
// The query heads that share a KV head are packed into the rows of one tile, so each K/V row is loaded once for all of
// them.  Persistent blocks take equal shares of all (sequence, KV head, row tile, KV tile) work (work_schedule.cuh);
// online softmax keeps (m, l, O) in registers, and the scores' accumulators are, rounded, the left operand of P V.
//  - Few rows (decode, at most 16 a KV head): all four warps hold the same 16 rows and take different tokens, each with
//  a
//    ring of tiles and a state of its own, so that nothing waits for a barrier; the states are joined at the end.
//    Bound: bytes of the cache.  The ring holds 32 to 64 KB a block, two or three blocks fit a multiprocessor.
//  - Many rows (prefill, append): each warp has 16 of 64 rows, all share a double-buffered tile of tokens, one barrier
//  a
//    tile.  Bound: the tensor cores, as far as mma.sync reaches them.
// Float8 caches go through shared memory as they are and are widened to float16 in registers (float8_fragments.cuh);
// K's scale is folded into the scores' and V's into the normalisation.  bfloat16 queries over float8 are scaled by a
// power of two a row into float16's range, which loses nothing that counts beside the row's largest element.
#pragma once

#include "attention_epilogue.cuh"
#include "attention_kernel.h"
#include "float8_fragments.cuh"
#include "kv_loader.cuh"
#include "row_table.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

constexpr int kFewRows = 16;

template <class CacheElement>
struct MmaTypes {  // float16 and bfloat16 caches
  using Math = CacheElement;
  using Storage = CacheElement;
  static constexpr bool kFloat8 = false;
  static constexpr OutputType kOutput =
      sizeof(CacheElement) == 2 && __is_same(CacheElement, __half) ? OutputType::kFloat16 : OutputType::kBFloat16;
};
template <>
struct MmaTypes<Float8E4M3> {
  using Math = __half;
  using Storage = uint8_t;
  static constexpr bool kFloat8 = true;
  static constexpr OutputType kOutput = OutputType::kFromParams;
};
template <>
struct MmaTypes<Float8E5M2> : MmaTypes<Float8E4M3> {};

template <class CacheElement_, int kHeadDim_, bool kManyRows_>
struct MmaTraits : MmaTypes<CacheElement_> {
  using CacheElement = CacheElement_;
  using Types = MmaTypes<CacheElement>;
  static constexpr int kHeadDim = kHeadDim_;  // D is at most this; dimensions past D are zeros
  static constexpr bool kManyRows = kManyRows_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kElementBytes = sizeof(typename Types::Storage);

  static constexpr int kRows = kManyRows ? 64 : kFewRows;
  static constexpr int kTokens = kManyRows && kHeadDim > 128 ? 32 : 64;
  using Shape = TileShape<kRows, kTokens, kManyRows ? kFewRows + 1 : 1, kManyRows ? 1 << 30 : kFewRows>;
  // What one warp multiplies with, and what one warp copies.
  static constexpr int kWarpTokens = kManyRows ? kTokens : kTokens / kWarps;
  static constexpr int kCopyTokens = kTokens / kWarps;

  using QTile = SwizzledTile<kHeadDim * 2>;
  using KvTile = SwizzledTile<kHeadDim * kElementBytes>;
  static constexpr int kQBytes = kRows * QTile::kRowBytes;
  static constexpr int kCopyBytes = kCopyTokens * KvTile::kRowBytes;  // a warp's share of a tile of K or of V
  static constexpr int kTileBytes = kTokens * KvTile::kRowBytes;
  // Tiles of K and V each in flight: two, or as many as make 64 KB a block where each warp has a ring.
  static constexpr int kStages = kManyRows                         ? 2
                                 : 2 * kTileBytes >= 64 * 1024     ? 1
                                 : 2 * kTileBytes * 4 <= 64 * 1024 ? 4
                                                                   : 2;
  static constexpr bool kQInRegisters = kHeadDim <= 128;

  using TileLoader = KvLoader<kCopyTokens, KvTile, typename Types::Storage>;
  using Cursor = WorkCursor<Shape, kThreads>;
  using BlockEpilogue = Epilogue<Shape, kThreads, kHeadDim, kManyRows ? 1 : kWarps, Types::kOutput>;

  struct Shared {
    union {
      struct {
        char kv[kStages * 2 * kTileBytes];
        char q[kQBytes];
      } tiles;
      float states[BlockEpilogue::kStateFloats];
    };
    typename BlockEpilogue::Shared epilogue;
    typename Cursor::Shared cursor;
    RowTable<kRows> rows;
  };
  static_assert(sizeof(Shared) <= 99 * 1024, "what a block may have on every sm_8x and later device");
};

// ---- queries -------------------------------------------------------------------------------------------------

// Column (in pairs) of a pair of dimensions in shared memory.
template <bool kFloat8>
__device__ constexpr int q_pair_place(int pair) {
  return kFloat8 ? pair / 8 * 8 + pair % 2 * 4 + pair % 8 / 2 : pair;
}

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

// Rounds bfloat16 pairs to float16 after dividing the row by the power of two below its largest element, which the
// kLanes lanes that hold the row find together; returns that power.
template <int kLanes>
__device__ float normalise_bfloat16_row(QChunk &x) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    largest = max(largest, max(x.pairs[i] & 0x7fffu, x.pairs[i] >> 16 & 0x7fffu));
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  }
  // Biased exponents 1 ... 253, so that the power and its inverse are normal numbers.
  const uint32_t exponent = min(max(largest >> 7, 1u), 253u);
  const float inverse = __uint_as_float((254 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x.pairs[i] =
        pack<__half>(__uint_as_float(x.pairs[i] << 16) * inverse, __uint_as_float(x.pairs[i] & 0xffff0000u) * inverse);
  }
  return __uint_as_float(exponent << 23);
}

// The item's query rows to shared memory, zeros where there is no row or dimension.
template <class Traits>
__device__ void load_q(const AttentionKernelParams &params, const WorkItem &item, typename Traits::Shared &shared) {
  constexpr int kChunks = Traits::QTile::kChunks;
  const int rows = num_rows(params.batch, item.seq), group = static_cast<int>(params.batch.group.divisor);
#pragma unroll 2
  for (int index = static_cast<int>(threadIdx.x); index < Traits::kRows * kChunks; index += Traits::kThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    const int packed_row = item.query_tile * Traits::kRows + row;
    QChunk x{};
    if (packed_row < rows && chunk * 8 < params.head_dim) {
      const int query = params.batch.group.divide(packed_row);
      const int64_t token = item.seq.first_token + query;
      const int64_t head = item.kv_head * group + packed_row - query * group;
      const auto *q = static_cast<const uint16_t *>(params.q.data);
      x = load_q_chunk(params, q + token * params.q.token_stride + head * params.q.head_stride, chunk);
    }
    if constexpr (Traits::kFloat8) {
      const float scale = params.q_is_bfloat16 ? normalise_bfloat16_row<kChunks>(x) : 1.0f;
      if (chunk == 0) shared.rows.q_scale[row] = scale;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pair = q_pair_place<true>(chunk * 4 + i);
        *reinterpret_cast<uint32_t *>(shared.tiles.q + Traits::QTile::offset(row, pair / 4) + pair % 4 * 4) =
            x.pairs[i];
      }
    } else {
      *reinterpret_cast<uint4 *>(shared.tiles.q + Traits::QTile::offset(row, chunk)) = {x.pairs[0], x.pairs[1],
                                                                                        x.pairs[2], x.pairs[3]};
    }
  }
}

// ---- one warp's 16 rows --------------------------------------------------------------------------------------

// tanh to about 1e-7 absolute: scores that are computed from 16-bit numbers need no more.
__device__ inline float tanh_fast(float x) {
  const float e = exp2_fast(-2.0f * kLog2E * fabsf(x));
  return copysignf(__fdividef(1.0f - e, 1.0f + e), x);
}

template <class Traits>
class WarpRows {
  using Math = typename Traits::Math;
  using Q = typename Traits::QTile;
  using Kv = typename Traits::KvTile;
  static constexpr int kTokens = Traits::kWarpTokens;
  static constexpr int kHeadDim = Traits::kHeadDim;

 public:
  using Scores = float[kTokens / 8][4];

  __device__ explicit WarpRows(const AttentionKernelParams &params)
      : params_(params), lane_(static_cast<int>(threadIdx.x) % 32) {}

  // Rows first_row ... first_row + 15 of the tile; queries and row table must be in shared memory, behind a barrier.
  __device__ void begin(const WorkItem &item, int first_row, const typename Traits::Shared &shared) {
    table_ = &shared.rows;
    row_ = first_row + lane_ / 4;
    const Range first = table_->keys[first_row], last = table_->keys[first_row + 15];
    const bool any = item.query_tile * Traits::kRows + first_row < num_rows(params_.batch, item.seq);
    visible_to_any_ = any ? Range{first.begin, last.end} : Range{0, 0};
    visible_to_all_ = {last.begin, first.end};

    const float scale = params_.k_scale.of_head(item.kv_head) * params_.scale;
    pre_scale_ = params_.softcap > 0.0f ? scale / params_.softcap : scale * kLog2E;
    // The largest score is that of the largest product only if their ratio is positive.
    transform_ =
        params_.softcap > 0.0f || params_.alibi_slopes != nullptr || !(row_scale(0) > 0.0f) || !(row_scale(1) > 0.0f);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      post_scale_[i] = transform_ ? 1.0f : row_scale(i);
      m_[i] = negative_infinity();
      l_[i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) o_[i][j] = 0.0f;
    }
    q_fragment_ = shared_address(shared.tiles.q + Q::offset(first_row + lane_ % 16, lane_ / 16));
    if constexpr (Traits::kQInRegisters) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) load_q_fragment(q_[k], k);
    }
  }

  // Does any row see any of kTokens keys from `token` on?
  __device__ bool sees(int token) const {
    return token < visible_to_any_.end && token + kTokens > visible_to_any_.begin;
  }

  // s = Q K^T
  __device__ void multiply_q_k(Scores &s, const char *k_tile) const {
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[i][j] = 0.0f;
    }
    if constexpr (Traits::kFloat8) {
      // Matrices: 8 tokens x 16 dimensions; two groups of tokens, two of dimensions.
      const SharedAddress k = shared_address(k_tile + Kv::offset(lane_ % 16, lane_ / 16));
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; step += 2) {
        uint32_t q[2][4];
        get_q_fragment(q[0], step);
        get_q_fragment(q[1], step + 1);
#pragma unroll
        for (int t = 0; t < kTokens / 16; ++t) {
          uint32_t raw[4];
          load_matrices(raw, Kv::down(Kv::along(k, step), t * 16));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t b0, b1;
            widen<typename Traits::CacheElement>(raw[i], b0, b1);
            multiply_add<Math>(s[2 * t + i % 2], q[i / 2], b0, b1);
          }
        }
      }
    } else {
      // Matrices: 8 tokens x 8 dimensions; two groups of dimensions, two of tokens.
      const SharedAddress k = shared_address(k_tile + Kv::offset(lane_ / 16 * 8 + lane_ % 8, lane_ / 8 % 2));
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32_t q[4];
        get_q_fragment(q, step);
#pragma unroll
        for (int t = 0; t < kTokens / 16; ++t) {
          uint32_t b[4];
          load_matrices(b, Kv::down(Kv::along(k, 2 * step), t * 16));
          multiply_add<Math>(s[2 * t], q, b[0], b[1]);
          multiply_add<Math>(s[2 * t + 1], q, b[2], b[3]);
        }
      }
    }
  }

  // Scores of the keys from `token` on become exp2(score - m), the state is brought to the new m.
  __device__ void softmax(Scores &s, int token) {
    if (transform_) transform(s, token);
    if (token < visible_to_all_.begin || token + kTokens > visible_to_all_.end) mask(s, token);

    float largest[2] = {m_[0], m_[1]};
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      largest[0] = fmaxf(largest[0], fmaxf(s[i][0], s[i][1]));
      largest[1] = fmaxf(largest[1], fmaxf(s[i][2], s[i][3]));
    }
    float scaled[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(kFullWarp, largest[i], 1));
      largest[i] = fmaxf(largest[i], __shfl_xor_sync(kFullWarp, largest[i], 2));
      scaled[i] = largest[i] == negative_infinity() ? 0.0f : largest[i] * post_scale_[i];
    }
    if (__any_sync(kFullWarp, largest[0] != m_[0] || largest[1] != m_[1])) {
      const float factor[2] = {exp2_fast(m_[0] * post_scale_[0] - scaled[0]),
                               exp2_fast(m_[1] * post_scale_[1] - scaled[1])};
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        o_[i][0] *= factor[0];
        o_[i][1] *= factor[0];
        o_[i][2] *= factor[1];
        o_[i][3] *= factor[1];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        l_[i] *= factor[i];
        m_[i] = largest[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = exp2_fast(s[i][j] * post_scale_[j / 2] - scaled[j / 2]);
        l_[j / 2] += s[i][j];
      }
    }
  }

  // O += P V
  __device__ void multiply_p_v(const Scores &p, const char *v_tile) {
    const SharedAddress v = shared_address(v_tile + Kv::offset(lane_ % 16, lane_ / 16));
#pragma unroll
    for (int t = 0; t < kTokens / 16; ++t) {
      const uint32_t a[4] = {pack<Math>(p[2 * t][0], p[2 * t][1]), pack<Math>(p[2 * t][2], p[2 * t][3]),
                             pack<Math>(p[2 * t + 1][0], p[2 * t + 1][1]),
                             pack<Math>(p[2 * t + 1][2], p[2 * t + 1][3])};
      if constexpr (Traits::kFloat8) {
        // Matrices: 8 tokens x 16 dimensions; two groups of tokens, two of dimensions.
#pragma unroll
        for (int group = 0; group < kHeadDim / 16; group += 2) {
          uint32_t raw[4];
          load_matrices_transposed(raw, Kv::down(Kv::along(v, group), t * 16));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t even0, odd0, even1, odd1;
            widen<typename Traits::CacheElement>(pick_bytes(raw[2 * i], 0x3120), even0, odd0);
            widen<typename Traits::CacheElement>(pick_bytes(raw[2 * i + 1], 0x3120), even1, odd1);
            multiply_add<Math>(o_[2 * (group + i)], a, even0, even1);
            multiply_add<Math>(o_[2 * (group + i) + 1], a, odd0, odd1);
          }
        }
      } else {
        // Matrices: 8 tokens x 8 dimensions; two groups of tokens, two of dimensions.
#pragma unroll
        for (int group = 0; group < kHeadDim / 16; ++group) {
          uint32_t b[4];
          load_matrices_transposed(b, Kv::down(Kv::along(v, 2 * group), t * 16));
          multiply_add<Math>(o_[2 * group], a, b[0], b[1]);
          multiply_add<Math>(o_[2 * group + 1], a, b[2], b[3]);
        }
      }
    }
  }

  // Hands the state to the epilogue, behind a barrier after the last use of the tiles.
  template <class Epilogue>
  __device__ void store_state(const Epilogue &epilogue, int part) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l_[i] += __shfl_xor_sync(kFullWarp, l_[i], 1);
      l_[i] += __shfl_xor_sync(kFullWarp, l_[i], 2);
      const int row = row_ + 8 * i;
      if (lane_ % 4 == 0) epilogue.set_row(part, row, m_[i] * post_scale_[i], l_[i]);
      float *o = epilogue.states() + Epilogue::state_offset(part, row, 0);
#pragma unroll
      for (int group = 0; group < kHeadDim / 16; ++group) {
        const float (&even)[4] = o_[2 * group];
        const float (&odd)[4] = o_[2 * group + 1];
        if constexpr (Traits::kFloat8) {
          *reinterpret_cast<float4 *>(o + group * 16 + lane_ % 4 * 4) = {even[2 * i], odd[2 * i], even[2 * i + 1],
                                                                         odd[2 * i + 1]};
        } else {
          *reinterpret_cast<float2 *>(o + group * 16 + lane_ % 4 * 2) = {even[2 * i], even[2 * i + 1]};
          *reinterpret_cast<float2 *>(o + group * 16 + 8 + lane_ % 4 * 2) = {odd[2 * i], odd[2 * i + 1]};
        }
      }
    }
  }

 private:
  __device__ void load_q_fragment(uint32_t (&fragment)[4], int step) const {
    load_matrices(fragment, Q::along(q_fragment_, 2 * step));
  }

  __device__ void get_q_fragment(uint32_t (&fragment)[4], int step) const {
    if constexpr (Traits::kQInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = q_[step][i];
    } else {
      load_q_fragment(fragment, step);
    }
  }

  __device__ float row_scale(int i) const {
    if constexpr (Traits::kFloat8) return pre_scale_ * table_->q_scale[row_ + 8 * i];
    return pre_scale_;
  }

  // Products to scores in units of log 2: scale, soft cap, ALiBi.
  __device__ void transform(Scores &s, int token) const {
    const float cap = params_.softcap * kLog2E;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float scale = row_scale(row), slope = table_->slope[row_ + 8 * row];
      const int first_key = token + lane_ % 4 * 2 - table_->position[row_ + 8 * row];
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float x = s[i][2 * row + j] * scale;
          if (params_.softcap > 0.0f) x = cap * tanh_fast(x);
          s[i][2 * row + j] = x + slope * static_cast<float>(first_key + i * 8 + j);
        }
      }
    }
  }

  __device__ void mask(Scores &s, int token) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Range keys = table_->keys[row_ + 8 * row];
      const int first_key = token + lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = first_key + i * 8 + j;
          if (key < keys.begin || key >= keys.end) s[i][2 * row + j] = negative_infinity();
        }
      }
    }
  }

  const AttentionKernelParams &params_;
  int lane_;
  const RowTable<Traits::kRows> *table_;
  int row_;  // the lane's rows of the tile are this and the eighth after it
  SharedAddress q_fragment_;
  Range visible_to_any_;  // of the warp's rows
  Range visible_to_all_;
  bool transform_;       // scores are not just products times a positive number
  float pre_scale_;      // what `transform` multiplies products by
  float post_scale_[2];  // what turns its results, or else the products, into units of log 2
  float m_[2];           // before post_scale
  float l_[2];           // of the lane's own columns until store_state
  uint32_t q_[Traits::kQInRegisters ? kHeadDim / 16 : 1][4];
  float o_[kHeadDim / 8][4];
};

// ---- the two ways to share out a segment ---------------------------------------------------------------------

// Few rows: warps take different tokens and never wait for each other.  Ends with the states in shared memory.
template <class Traits>
__device__ void attend_few_rows(const AttentionKernelParams &params, typename Traits::Shared &shared,
                                const WorkItem &item, Range tiles, const typename Traits::BlockEpilogue &epilogue) {
  constexpr int kStages = Traits::kStages;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  char *const ring = shared.tiles.kv + warp * kStages * 2 * Traits::kCopyBytes;
  const auto k_tile = [&](int stage) { return ring + stage * 2 * Traits::kCopyBytes; };
  const auto v_tile = [&](int stage) { return k_tile(stage) + Traits::kCopyBytes; };
  const auto first_token = [&](int tile) { return tile * Traits::kTokens + warp * Traits::kWarpTokens; };

  // Groups of copies are K, V, K, V ...; tiles past the last one make empty groups and keep the count.
  typename Traits::TileLoader loader(params);
  loader.begin(item);
  loader.look_up(first_token(tiles.begin));
  for (int stage = 0; stage < kStages; ++stage) {
    loader.locate();
    if (tiles.begin + stage < tiles.end) loader.copy_k(k_tile(stage));
    commit_copies();
    if (tiles.begin + stage < tiles.end) loader.copy_v(v_tile(stage));
    commit_copies();
    loader.look_up(first_token(tiles.begin + stage + 1));
  }

  load_q<Traits>(params, item, shared);
  fill_row_table<Traits::kThreads>(params, item, shared.rows);
  __syncthreads();
  WarpRows<Traits> rows(params);
  rows.begin(item, 0, shared);

  int stage = 0;
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    const int token = first_token(tile);
    const bool sees = rows.sees(token), more = tile + kStages < tiles.end;
    typename WarpRows<Traits>::Scores s;
    wait_copies<2 * kStages - 1>();
    __syncwarp();
    if (sees) rows.multiply_q_k(s, k_tile(stage));
    __syncwarp();  // every lane is done with K: its place takes the next
    loader.locate();
    if (more) loader.copy_k(k_tile(stage));
    commit_copies();
    if (sees) rows.softmax(s, token);
    wait_copies<2 * kStages - 1>();
    __syncwarp();
    if (sees) rows.multiply_p_v(s, v_tile(stage));
    __syncwarp();
    if (more) loader.copy_v(v_tile(stage));
    commit_copies();
    loader.look_up(first_token(tile + kStages + 1));
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_copies<0>();
  __syncthreads();  // the states overlay every warp's ring
  rows.store_state(epilogue, warp);
}

// Many rows: warps take different rows and share the tiles.
template <class Traits>
__device__ void attend_many_rows(const AttentionKernelParams &params, typename Traits::Shared &shared,
                                 const WorkItem &item, Range tiles, const typename Traits::BlockEpilogue &epilogue) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto k_tile = [&](int stage) { return shared.tiles.kv + stage * 2 * Traits::kTileBytes; };
  const auto v_tile = [&](int stage) { return k_tile(stage) + Traits::kTileBytes; };
  const auto copied_token = [&](int tile) { return tile * Traits::kTokens + warp * Traits::kCopyTokens; };

  typename Traits::TileLoader loader(params);
  const auto copy = [&](int tile, int stage) {
    loader.locate();
    if (tile < tiles.end) {
      loader.copy_k(k_tile(stage) + warp * Traits::kCopyBytes);
      loader.copy_v(v_tile(stage) + warp * Traits::kCopyBytes);
    }
    commit_copies();
    loader.look_up(copied_token(tile + 1));
  };
  loader.begin(item);
  loader.look_up(copied_token(tiles.begin));
  copy(tiles.begin, 0);

  load_q<Traits>(params, item, shared);
  fill_row_table<Traits::kThreads>(params, item, shared.rows);
  __syncthreads();
  WarpRows<Traits> rows(params);
  rows.begin(item, warp * 16, shared);

  int stage = 0;
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    wait_copies<0>();
    __syncthreads();  // this tile has landed, and nobody reads the other stage any more
    copy(tile + 1, stage ^ 1);
    const int token = tile * Traits::kTokens;
    if (rows.sees(token)) {
      typename WarpRows<Traits>::Scores s;
      rows.multiply_q_k(s, k_tile(stage));
      rows.softmax(s, token);
      rows.multiply_p_v(s, v_tile(stage));
    }
    stage ^= 1;
  }
  wait_copies<0>();
  __syncthreads();  // the states overlay the tiles
  rows.store_state(epilogue, 0);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    attention_mma_kernel(const __grid_constant__ AttentionKernelParams params) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto &shared = *reinterpret_cast<typename Traits::Shared *>(shared_memory);
  const typename Traits::BlockEpilogue epilogue(params, shared.epilogue, shared.states);

  typename Traits::Cursor cursor(params.batch, shared.cursor);
  for (cursor.seek_first_item(); cursor.valid(); cursor.advance()) {
    const WorkItem &item = cursor.item();
    const Range segments = cursor.segments();
    for (int segment = segments.begin; segment < segments.end; ++segment) {
      const Range tiles = cursor.cut().tiles_of(item, segment);
      if constexpr (Traits::kManyRows) {
        attend_many_rows<Traits>(params, shared, item, tiles, epilogue);
      } else {
        attend_few_rows<Traits>(params, shared, item, tiles, epilogue);
      }
      __syncthreads();
      epilogue.finish(item, cursor.cut(), segment);
    }
    __syncthreads();
  }
}

template <class CacheElement, int kHeadDim, bool kManyRows>
AttentionKernel attention_mma(const char *name) {
  using Traits = MmaTraits<CacheElement, kHeadDim, kManyRows>;
  return {name,
          reinterpret_cast<const void *>(&attention_mma_kernel<Traits>),
          Traits::kThreads,
          sizeof(typename Traits::Shared),
          kPlaceFloats<Traits::kRows, kHeadDim>,
          Traits::Shape::kMaxPieces};
}

}  // namespace pagedattn::cuda
