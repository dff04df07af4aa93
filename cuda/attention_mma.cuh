// Paged attention by mma.sync for every sm_80+ device: 16-bit or float8 queries, 16-bit or float8 caches.
//
// SPDX-License-Identifier: Apache-2.0
//
// The query heads that share a KV head are packed into the rows of one tile, so each K/V row is loaded once for all of
// them.  Persistent blocks take equal shares of all (sequence, KV head, row tile, KV tile) work (work_schedule.cuh);
// online softmax keeps (m, l, O) in registers, and the scores' accumulators are, rounded, the left operand of P V.
//  - Few rows (decode, at most 16 a KV head): all four warps hold the same 16 rows and take different tokens, each with
//    a ring of tiles and a state of its own, so nothing waits for a barrier; the states are joined at the end.
//    Bound: bytes of the cache.  The ring holds 32 to 64 KB a block, two or three blocks fit a multiprocessor.
//  - Many rows (prefill, append): each warp has 32 of 128 rows, or 16 of 64 where D > 128, and all share a
//    double-buffered tile of tokens, with one barrier a tile.  Bound: the tensor cores, as far as mma.sync reaches
//    them, and shared memory: what a warp loads of K or V serves 16 rows at a time.
// Float8 caches go through shared memory as they are and are widened to float16 in registers (float8_fragments.cuh);
// K's scale is folded into the scores' and V's into the normalisation.  bfloat16 queries over float8 are scaled by a
// power of two a row into float16's range, which loses nothing that counts beside the row's largest element.
#pragma once

#include "attention_kernel.h"
#include "mma_queries.cuh"
#include "mma_traits.cuh"
#include "mma_warp_rows.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Few rows: warps take different tokens and never wait for each other.
template <class Traits>
__device__ void attend_few_rows(const AttentionKernelParams &params, typename Traits::Shared &shared,
                                const typename Traits::Cursor &cursor, const WorkItem &item, int segment) {
  const Range tiles = cursor.tiles(segment);
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
  AllQueryChunks<Traits> queries(0, static_cast<int>(threadIdx.x));
  queries.fetch(params, item);
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    loader.locate();
    if (tiles.begin + stage < tiles.end) loader.copy_k(k_tile(stage));
    commit_copies();
    if (tiles.begin + stage < tiles.end) loader.copy_v(v_tile(stage));
    commit_copies();
    loader.look_up(first_token(tiles.begin + stage + 1));
  }

  queries.store(params, shared.tiles.q, shared.rows);
  fill_row_table<typename Traits::Shape, Traits::kThreads>(params, item, shared.rows, static_cast<int>(threadIdx.x));
  __syncthreads();
  WarpRows<Traits> rows(params);
  rows.begin(item, 0, shared.rows, shared.tiles.q);

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
    if (sees) rows.multiply_p_v(s, v_tile(stage), token);
    __syncwarp();
    if (more) loader.copy_v(v_tile(stage));
    commit_copies();
    loader.look_up(first_token(tile + kStages + 1));
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  wait_copies<0>();
  __syncthreads();  // the states overlay every warp's ring
  const typename Traits::BlockEpilogue epilogue(params, shared.epilogue, shared.states, static_cast<int>(threadIdx.x));
  epilogue.finish(item, cursor.plan(segment), Traits::kWarps, Traits::kRows,
                  [&](int column) { rows.store_state(epilogue, warp * Traits::kRows, column); });
}

// Many rows: warps take different rows and share the tiles.
template <class Traits>
__device__ void attend_many_rows(const AttentionKernelParams &params, typename Traits::Shared &shared,
                                 const typename Traits::Cursor &cursor, const WorkItem &item, int segment) {
  const Range tiles = cursor.tiles(segment);
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

  // Where the tile is at most half full, all warps have a share of its rows nevertheless.
  const int rows_left = num_rows(params.batch, item.seq) - item.query_tile * Traits::kRows;
  const int bands = Traits::kWarpBands == 2 && rows_left <= Traits::kRows / 2 ? 1 : Traits::kWarpBands;
  const int thread = static_cast<int>(threadIdx.x);
  load_queries<Traits, 8>(params, item, 16 * Traits::kWarps * bands, shared.tiles.q, shared.rows, thread);
  fill_row_table<typename Traits::Shape, Traits::kThreads>(params, item, shared.rows, thread);
  __syncthreads();
  WarpRows<Traits> rows(params);
  rows.begin(item, warp * 16 * bands, shared.rows, shared.tiles.q, bands);

  int stage = 0;
  const auto attend = [&](auto active) {
    constexpr int kActive = decltype(active)::value;
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
      wait_copies<0>();
      __syncthreads();  // this tile has landed, and nobody reads the other stage any more
      copy(tile + 1, stage ^ 1);
      const int token = tile * Traits::kTokens;
      if (rows.sees(token)) {
        typename WarpRows<Traits>::Scores s;
        rows.template multiply_q_k<kActive>(s, k_tile(stage));
        rows.template softmax<kActive>(s, token);
        rows.template multiply_p_v<kActive>(s, v_tile(stage), token);
      }
      stage ^= 1;
    }
  };
  if (bands == 1) {
    attend(std::integral_constant<int, 1>{});
  } else {
    attend(std::integral_constant<int, Traits::kWarpBands>{});
  }
  wait_copies<0>();
  __syncthreads();  // nobody reads queries and tiles any more
  rows.finish(
      item, cursor.plan(segment), false, shared.last_to_arrive, threadIdx.x == 0, [] { __syncthreads(); }, bands);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    attention_mma_kernel(const __grid_constant__ AttentionKernelParams params) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto &shared = *reinterpret_cast<typename Traits::Shared *>(shared_memory);
  typename Traits::Cursor cursor(params.batch, shared.cursor);
  cursor.for_each_segment([&](const WorkItem &item, int segment) {
    if constexpr (Traits::kManyRows) {
      attend_many_rows<Traits>(params, shared, cursor, item, segment);
    } else {
      attend_few_rows<Traits>(params, shared, cursor, item, segment);
    }
  });
}

template <class CacheElement, int kHeadDim, bool kManyRows>
AttentionKernel attention_mma(const char *name) {
  using Traits = MmaTraits<CacheElement, kHeadDim, kManyRows>;
  return {name,
          reinterpret_cast<const void *>(&attention_mma_kernel<Traits>),
          Traits::kThreads,
          sizeof(typename Traits::Shared),
          Traits::kRows,
          Traits::kTokens,
          kHeadDim,
          &Traits::Cut::places_per_block};
}

}  // namespace pagedattn::cuda
