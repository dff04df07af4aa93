// Paged attention in float32 on the CUDA cores: float32 queries over float32 caches.
//
// SPDX-License-Identifier: Apache-2.0
//
// The tensor cores would round the operands, so this kernel multiplies in float32 throughout.  Work is packed, cut and
// merged as in attention_mma.cuh.  A block holds 16 query rows and shares tiles of 32 tokens; a warp owns four of the
// rows.  For the scores each lane takes one token, reading its row of K once for the four query rows; for the output
// each lane takes D / 32 dimensions.  K of the next tile is copied while V is used, and the other way round.
// Bound: shared-memory reads, about two for every eight multiply-adds.
#include "attention_epilogue.cuh"
#include "attention_kernel.h"
#include "kv_loader.cuh"
#include "row_table.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {
namespace {

// Rows apart by an odd number of 16-byte chunks, so that lanes reading one chunk of different rows touch all banks.
template <int kHeadDim>
struct PaddedTile {
  static constexpr int kChunks = kHeadDim / 4;
  static constexpr int kPitch = (kChunks + 1) * 16;
  __host__ __device__ static constexpr int offset(int row, int chunk) { return row * kPitch + chunk * 16; }
  __device__ static SharedAddress down(SharedAddress address, int rows) {
    return address + static_cast<SharedAddress>(rows * kPitch);
  }
};

template <int kHeadDim_>
struct FmaTraits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16;
  static constexpr int kWarpRows = kRows / kWarps;
  static constexpr int kTokens = 32;
  static constexpr int kCopyTokens = kTokens / kWarps;
  using Shape = TileShape<kRows, kTokens, false>;
  using Tile = PaddedTile<kHeadDim>;
  using TileLoader = KvLoader<kCopyTokens, Tile, float>;
  using Cut = WorkCut<Shape>;
  using Cursor = BlockCursor<Shape, kThreads>;
  using BlockEpilogue = Epilogue<Shape, kThreads, kHeadDim, 1, kRows, OutputType::kFloat32>;

  struct Shared {
    union {
      struct {
        char k[kTokens * Tile::kPitch];
        char v[kTokens * Tile::kPitch];
        char q[kRows * Tile::kPitch];
        float p[kRows][kTokens];
      } tiles;
      float states[BlockEpilogue::kStateFloats];
    };
    typename BlockEpilogue::Shared epilogue;
    typename Cursor::Shared cursor;
    RowTable<kRows> rows;
  };
  static_assert(sizeof(Shared) <= 99 * 1024, "what a block may have on every sm_8x and later device");
};

// The item's query rows to shared memory, zeros where there is no row or dimension.
template <class Traits>
__device__ void load_q(const AttentionKernelParams &params, const WorkItem &item, char *q_tile) {
  constexpr int kChunks = Traits::Tile::kChunks;
  const int rows = num_rows(params.batch, item.seq), group = static_cast<int>(params.batch.group.divisor);
  for (int index = static_cast<int>(threadIdx.x); index < Traits::kRows * kChunks; index += Traits::kThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    const int packed_row = item.query_tile * Traits::kRows + row;
    float4 x{0.0f, 0.0f, 0.0f, 0.0f};
    if (packed_row < rows && chunk * 4 < params.head_dim) {
      const int query = params.batch.group.divide(packed_row);
      const int64_t token = item.seq.first_token + query;
      const int64_t head = item.kv_head * group + packed_row - query * group;
      const float *q = static_cast<const float *>(params.q.data) + token * params.q.token_stride +
                       head * params.q.head_stride + chunk * 4;
      x = params.q_wide ? *reinterpret_cast<const float4 *>(q) : float4{q[0], q[1], q[2], q[3]};
    }
    *reinterpret_cast<float4 *>(q_tile + Traits::Tile::offset(row, chunk)) = x;
  }
}

// One warp's four rows.  m and l are the same in every lane.
template <class Traits>
class WarpRows {
  static constexpr int kRows = Traits::kWarpRows;
  static constexpr int kPairs = Traits::kHeadDim / 64;  // of dimensions a lane: 2 lane + {0, 1} of each 64

 public:
  __device__ WarpRows(const AttentionKernelParams &params, const WorkItem &item, typename Traits::Shared &shared)
      : params_(params),
        shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % 32),
        first_row_(static_cast<int>(threadIdx.x) / 32 * kRows),
        scale_(params.scale * params.k_scale.of_head(item.kv_head)) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      m_[row] = negative_infinity();
      l_[row] = 0.0f;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) o_[row][i] = {0.0f, 0.0f};
    }
  }

  // s = the scores of the lane's token for each row, in units of log 2
  __device__ void scores(float (&s)[kRows], int tile_token) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) s[row] = 0.0f;
    const int chunks = params_.head_dim / 4;
#pragma unroll 4
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const float4 k = *reinterpret_cast<const float4 *>(shared_.tiles.k + Traits::Tile::offset(lane_, chunk));
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float4 q =
            *reinterpret_cast<const float4 *>(shared_.tiles.q + Traits::Tile::offset(first_row_ + row, chunk));
        s[row] += q.x * k.x;
        s[row] += q.y * k.y;
        s[row] += q.z * k.z;
        s[row] += q.w * k.w;
      }
    }
    const int key = tile_token + lane_;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float x = s[row] * scale_;
      if (params_.softcap > 0.0f) x = params_.softcap * tanhf(x / params_.softcap);
      x = x * kLog2E +
          shared_.rows.slope[first_row_ + row] * static_cast<float>(key - shared_.rows.position[first_row_ + row]);
      const Range keys = shared_.rows.keys[first_row_ + row];
      s[row] = key < keys.begin || key >= keys.end ? negative_infinity() : x;
    }
  }

  // Leaves exp2(score - m) in shared memory, brings the state to the new m.
  __device__ void softmax(const float (&s)[kRows]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float largest = s[row];
      for (int offset = 16; offset > 0; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, offset));
      }
      largest = fmaxf(largest, m_[row]);
      const float factor = rescale_factor(m_[row], largest), p = rescale_factor(s[row], largest);
      m_[row] = largest;
      l_[row] = l_[row] * factor + warp_sum(p);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        o_[row][i].x *= factor;
        o_[row][i].y *= factor;
      }
      shared_.tiles.p[first_row_ + row][lane_] = p;
    }
    __syncwarp();
  }

  // O += P V
  __device__ void multiply_p_v() {
#pragma unroll 2
    for (int token = 0; token < Traits::kTokens; token += 4) {
      float4 p[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        p[row] = *reinterpret_cast<const float4 *>(&shared_.tiles.p[first_row_ + row][token]);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const char *v = shared_.tiles.v + Traits::Tile::offset(token, i * 16) + lane_ * 8;
        const auto row_of_v = [&](int t) { return *reinterpret_cast<const float2 *>(v + t * Traits::Tile::kPitch); };
        const float2 v0 = row_of_v(0), v1 = row_of_v(1), v2 = row_of_v(2), v3 = row_of_v(3);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          add_scaled(o_[row][i], p[row].x, v0);
          add_scaled(o_[row][i], p[row].y, v1);
          add_scaled(o_[row][i], p[row].z, v2);
          add_scaled(o_[row][i], p[row].w, v3);
        }
      }
    }
  }

  __device__ void store_state(const typename Traits::BlockEpilogue &epilogue) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (lane_ == 0) epilogue.set_row(first_row_ + row, m_[row], l_[row]);
      float *o = epilogue.state(first_row_ + row) + lane_ * 2;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) *reinterpret_cast<float2 *>(o + i * 64) = o_[row][i];
    }
  }

 private:
  __device__ static void add_scaled(float2 &sum, float factor, float2 x) {
    sum.x += factor * x.x;
    sum.y += factor * x.y;
  }

  const AttentionKernelParams &params_;
  typename Traits::Shared &shared_;
  int lane_;
  int first_row_;
  float scale_;
  float m_[kRows];
  float l_[kRows];
  float2 o_[kRows][kPairs];
};

template <class Traits>
__device__ void attend(const AttentionKernelParams &params, typename Traits::Shared &shared,
                       const typename Traits::Cursor &cursor, const WorkItem &item, int segment,
                       const typename Traits::BlockEpilogue &epilogue) {
  const Range tiles = cursor.tiles(segment);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto copied_token = [&](int tile) { return tile * Traits::kTokens + warp * Traits::kCopyTokens; };
  char *const k_rows = shared.tiles.k + warp * Traits::kCopyTokens * Traits::Tile::kPitch;
  char *const v_rows = shared.tiles.v + warp * Traits::kCopyTokens * Traits::Tile::kPitch;

  // Groups of copies are K, V, K, V ...; those past the last tile are empty and keep the count.
  typename Traits::TileLoader loader(params);
  loader.begin(item);
  loader.look_up(copied_token(tiles.begin));
  loader.locate();
  if (tiles.begin < tiles.end) loader.copy_k(k_rows);
  commit_copies();
  if (tiles.begin < tiles.end) loader.copy_v(v_rows);
  commit_copies();
  loader.look_up(copied_token(tiles.begin + 1));

  load_q<Traits>(params, item, shared.tiles.q);
  fill_row_table<typename Traits::Shape, Traits::kThreads>(params, item, shared.rows, static_cast<int>(threadIdx.x));
  WarpRows<Traits> rows(params, item, shared);

  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    const bool more = tile + 1 < tiles.end;
    float s[Traits::kWarpRows];
    wait_copies<1>();
    __syncthreads();  // K has landed; so have, before the first tile, the queries
    rows.scores(s, tile * Traits::kTokens);
    __syncthreads();  // everybody is done with K: its place takes the next
    loader.locate();
    if (more) loader.copy_k(k_rows);
    commit_copies();
    rows.softmax(s);
    wait_copies<1>();
    __syncthreads();  // V has landed
    rows.multiply_p_v();
    __syncthreads();  // everybody is done with V
    if (more) loader.copy_v(v_rows);
    commit_copies();
    loader.look_up(copied_token(tile + 2));
  }
  wait_copies<0>();
  __syncthreads();  // the states overlay the tiles
  epilogue.finish(item, cursor.plan(segment), 1, Traits::kRows, [&](int) { rows.store_state(epilogue); });
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    attention_fma_kernel(const __grid_constant__ AttentionKernelParams params) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto &shared = *reinterpret_cast<typename Traits::Shared *>(shared_memory);
  const typename Traits::BlockEpilogue epilogue(params, shared.epilogue, shared.states, static_cast<int>(threadIdx.x));

  typename Traits::Cursor cursor(params.batch, shared.cursor);
  cursor.for_each_segment(
      [&](const WorkItem &item, int segment) { attend<Traits>(params, shared, cursor, item, segment, epilogue); });
}

template <int kHeadDim>
AttentionKernel attention_fma(const char *name) {
  using Traits = FmaTraits<kHeadDim>;
  return {name,
          reinterpret_cast<const void *>(&attention_fma_kernel<Traits>),
          Traits::kThreads,
          sizeof(typename Traits::Shared),
          Traits::kRows,
          Traits::kTokens,
          kHeadDim,
          &Traits::Cut::places_per_block};
}

}  // namespace

const AttentionKernel &attention_fma_float32(int head_dim_tile) {
  static const AttentionKernel kKernels[kNumHeadDimTiles] = {attention_fma<64>("fma_float32_d64"),
                                                             attention_fma<128>("fma_float32_d128"),
                                                             attention_fma<256>("fma_float32_d256")};
  return kKernels[head_dim_tile];
}

}  // namespace pagedattn::cuda
