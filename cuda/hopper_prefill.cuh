// Paged prefill and append on Hopper: sequences of more than 64 query rows a KV head, 16-bit queries and caches.
//
// SPDX-License-Identifier: Apache-2.0
//
// A tile of query rows meets a tile of keys after the other, from the last to the first.  Three warps only bring data:
// they ask the copy engine (TMA) for the blocks of K, for those of V, and for the next item's queries, which the first
// of them finds (prefill_schedule.cuh).  The other warpgroups have 64 rows each and share the tiles of K and V; scores
// and output stay in their registers.
//
// What keeps the tensor cores busy: the product of the next tile's scores and that of this tile's weights and V run
// while softmax works on scores that are done; the warpgroups take turns, so that one's softmax falls into another's
// products; and all this runs on across the ends of items, since an item's first scores are computed beside the last
// product of the item before, whose results are written while other warpgroups multiply.
//
// Bound: the tensor cores.
#pragma once

#include "hopper_prefill_rows.cuh"
#include "hopper_prefill_traits.cuh"

namespace pagedattn::cuda {

// ---- the warps that bring data -----------------------------------------------------------------------------------

// The segment of this number, once it is known.
template <class Traits>
__device__ const PrefillSegment &wait_segment(typename Traits::Shared &shared, uint32_t number) {
  const uint32_t place = number % Traits::kSegments;
  wait(&shared.segment_full[place], number / Traits::kSegments & 1);
  return shared.segments[place];
}

// Called by whole warps that do not look at it again.
template <class Traits>
__device__ void release_segment(typename Traits::Shared &shared, uint32_t number) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(&shared.segment_empty[number % Traits::kSegments]);
}

// Fills a ring with the tiles of K, or of V, of one segment after the other.
template <class Traits>
__device__ void produce_tiles(const HopperParams &params, typename Traits::Shared &shared, const CUtensorMap *map,
                              char (&ring)[Traits::kKvStages][Traits::KvTile::kBytes], Barrier *full, Barrier *empty) {
  using Tile = typename Traits::KvTile;
  constexpr int kBoxes = (Tile::kColumns * Traits::kTokens / 8 + 31) / 32;  // of a lane, of eight tokens or more
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto block_size = static_cast<int>(params.block_size.divisor);
  uint32_t count = 0;  // of tiles so far
#pragma unroll 1
  for (uint32_t number = 0;; ++number) {
    const PrefillSegment &segment = wait_segment<Traits>(shared, number);
    if (!segment.valid) return;
    const int32_t *const table = params.block_tables + segment.item.seq.index * params.block_table_stride;
    const Range keys = segment.item.keys, tiles = segment.tiles;
    const int kv_head = segment.item.kv_head;
    release_segment<Traits>(shared, number);
#pragma unroll 1
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile, ++count) {
      int blocks[kBoxes];
#pragma unroll
      for (int i = 0; i < kBoxes; ++i) {
        const int token = tile * Traits::kTokens + (lane + 32 * i) / Tile::kColumns * params.maps.box_tokens;
        // What no row sees comes from behind the last block, as zeros.
        blocks[i] = token < keys.end && token + params.maps.box_tokens > keys.begin
                        ? clamp_to(table[params.block_size.divide(token)], 0, params.last_block)
                        : params.last_block + 1;
      }
      const uint32_t slot = count % Traits::kKvStages;
      wait(&empty[slot], (count / Traits::kKvStages & 1) ^ 1);
      if (lane == 0) arrive_and_expect(&full[slot], Tile::kBytes);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kBoxes; ++i) {
        const int column = (lane + 32 * i) % Tile::kColumns;
        const int first = (lane + 32 * i) / Tile::kColumns * params.maps.box_tokens;
        const int token = tile * Traits::kTokens + first;
        if (first < Traits::kTokens) {
          const int corner[5] = {column * 64, token - params.block_size.divide(token) * block_size, 0, kv_head,
                                 blocks[i]};
          copy_box(shared_address(ring[slot]) + static_cast<SharedAddress>(column * Tile::kColumnBytes + first * 128),
                   map, corner, &full[slot]);
        }
      }
    }
  }
}

// Finds the segments, tells all others, and asks for the queries of each as soon as there is room.
template <class Traits>
__device__ void produce_queries(const HopperParams &params, typename Traits::Shared &shared,
                                const typename Traits::Schedule &schedule) {
  using Tile = typename Traits::QTile;
  const int rows = params.batch.tile_queries * static_cast<int>(params.batch.group.divisor);
  typename Traits::Source source(schedule, params.arrivals + kTicketCounter);
  const auto tell = [&](uint32_t number, PrefillSegment segment) {
    // A segment without keys gets a tile that nobody sees.
    if (segment.tiles.begin == segment.tiles.end) ++segment.tiles.end;
    const uint32_t place = number % Traits::kSegments;
    wait(&shared.segment_empty[place], (number / Traits::kSegments & 1) ^ 1);
    if (threadIdx.x == 0) {
      shared.segments[place] = segment;
      arrive(&shared.segment_full[place]);
    }
    __syncwarp();
  };
  PrefillSegment next = source.next();
  tell(0, next);
#pragma unroll 1
  for (uint32_t number = 0; next.valid; ++number) {
    const int token = next.item.seq.first_token + next.item.query_tile * params.batch.tile_queries;
    const int kv_head = next.item.kv_head;
    next = source.next();
    tell(number + 1, next);  // before the wait for room for these queries
    const uint32_t stage = number % Traits::kQStages;
    wait(&shared.q_empty[stage], (number / Traits::kQStages & 1) ^ 1);
    if (threadIdx.x == 0) {
      arrive_and_expect(&shared.q_full[stage], Tile::kColumns * rows * 128);
#pragma unroll
      for (int column = 0; column < Tile::kColumns; ++column) {
        const int corner[5] = {column * 64, 0, kv_head, token, 0};
        copy_box(shared_address(shared.q[stage] + column * Tile::kColumnBytes), &params.maps.q, corner,
                 &shared.q_full[stage]);
      }
    }
    __syncwarp();
  }
}

// ---- the warpgroups that compute ---------------------------------------------------------------------------------

template <class Traits>
__device__ void compute(const HopperParams &params, typename Traits::Shared &shared, int group) {
  using Rows = WarpgroupRows<Traits>;
  constexpr int kTokens = Traits::kTokens;
  constexpr uint32_t kStages = Traits::kKvStages, kQStages = Traits::kQStages;
  constexpr int kFirstTurn = 1, kFirstOwn = 1 + Traits::kGroups;  // barriers by number, one a group
  const int next_group = group + 1 == Traits::kGroups ? 0 : group + 1;
  const bool leads_warp = threadIdx.x % 32 == 0;
  Rows rows(params, shared, group, kFirstOwn + group);
  uint32_t number = 0, count = 0;  // of the segment, and of the tile whose weights meet V next
  int token, left;                 // that tile's first, and how many tiles the segment has behind it
  bool first = true;               // in its segment
  typename Rows::Scores s;

  const auto begin = [&](uint32_t segment_number) {
    const uint32_t stage = segment_number % kQStages;
    wait(&shared.q_full[stage], segment_number / kQStages & 1);
    rows.begin(shared.segments[segment_number % Traits::kSegments].item, shared.q[stage]);
  };
  const auto wait_k = [&](uint32_t tile) { wait(&shared.k_full[tile % kStages], tile / kStages & 1); };
  const auto multiply_p_v = [&] {
    wait(&shared.v_full[count % kStages], count / kStages & 1);
    rows.clear_unseen(shared.v[count % kStages], shared.segments[number % Traits::kSegments].item.keys, token);
    rows.multiply_p_v(shared.v[count % kStages], first);
  };
  const auto release = [&](Barrier &empty) {
    if (leads_warp) arrive(&empty);
  };
  const auto enter = [&](const PrefillSegment &segment) {
    left = segment.tiles.end - segment.tiles.begin - 1;
    token = (segment.tiles.end - 1) * kTokens;
  };

  const PrefillSegment &first_segment = wait_segment<Traits>(shared, 0);
  if (!first_segment.valid) return;
  if (next_group == 0) named_barrier_arrive<256>(kFirstTurn);
  enter(first_segment);
  begin(0);
  wait_k(0);
  rows.multiply_q_k(s, shared.k[0]);
  wait_products<0>();
  pin(s);
  release(shared.k_empty[0]);
  rows.softmax(s, token);
  if (left == 0) release(shared.q_empty[0]);
  rows.pack_weights(s);
  if (left > 0) wait_k(1);
#pragma unroll 1
  while (true) {
    // The scores computed now are of the segment's next tile, or of the first of the next segment.
    const bool ends = left == 0;
    typename Rows::Sums ended;
    if (ends) {
      if (!wait_segment<Traits>(shared, number + 1).valid) break;
      ended = rows.take_sums();
      begin(number + 1);
      wait_k(count + 1);
    }
    named_barrier<256>(kFirstTurn + group);
    rows.multiply_q_k(s, shared.k[(count + 1) % kStages]);
    multiply_p_v();
    named_barrier_arrive<256>(kFirstTurn + next_group);
    first = ends;
    token -= kTokens;
    --left;
    if (ends) enter(shared.segments[(number + 1) % Traits::kSegments]);
    wait_products<1>();
    pin(s);
    release(shared.k_empty[(count + 1) % kStages]);
    rows.softmax(s, token);
    pin(s);
    if (left == 0) {
      release(shared.q_empty[(number + ends) % kQStages]);
    } else {
      wait_k(count + 2);  // here, where its loop keeps the compiler from waiting for P V before softmax
    }
    wait_products<0>();
    rows.pin_output();
    release(shared.v_empty[count % kStages]);
    ++count;
    if (ends) {
      rows.finish(shared.segments[number % Traits::kSegments], ended);
      release_segment<Traits>(shared, number);
      ++number;
    } else {
      rows.rescale();
    }
    rows.pack_weights(s);
  }
  multiply_p_v();
  wait_products<0>();
  rows.pin_output();
  rows.finish(shared.segments[number % Traits::kSegments], rows.take_sums());
}

// ---- the kernel --------------------------------------------------------------------------------------------------

template <class Traits>
__device__ void init_barriers(typename Traits::Shared &shared) {
  constexpr int kMathWarps = 4 * Traits::kGroups;
  for (int i = 0; i < Traits::kQStages; ++i) {
    init_barrier(&shared.q_full[i], 1);
    init_barrier(&shared.q_empty[i], kMathWarps);
  }
  for (int i = 0; i < Traits::kKvStages; ++i) {
    init_barrier(&shared.k_full[i], 1);
    init_barrier(&shared.k_empty[i], kMathWarps);
    init_barrier(&shared.v_full[i], 1);
    init_barrier(&shared.v_empty[i], kMathWarps);
  }
  for (int i = 0; i < Traits::kSegments; ++i) {
    init_barrier(&shared.segment_full[i], 1);
    init_barrier(&shared.segment_empty[i], kMathWarps + 2);  // and those that bring K and V
  }
  publish_barriers();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    hopper_prefill_kernel(const __grid_constant__ HopperParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char shared_memory[];
  auto &shared = *reinterpret_cast<typename Traits::Shared *>(shared_memory);
  if (threadIdx.x == 32) {
    for (const CUtensorMap *map : {&params.maps.q, &params.maps.k, &params.maps.v}) prefetch_tensor_map(map);
    init_barriers<Traits>(shared);
  }
  wait_for_previous_kernels();
  typename Traits::Schedule schedule(params.batch, shared.schedule);
  schedule.begin();
  __syncthreads();
  let_next_kernel_start();
  const int warpgroup = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    give_registers<Traits::kProducerRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp == 0) {
      produce_queries<Traits>(params, shared, schedule);
    } else if (warp == 1) {
      produce_tiles<Traits>(params, shared, &params.maps.k, shared.k, shared.k_full, shared.k_empty);
    } else if (warp == 2) {
      produce_tiles<Traits>(params, shared, &params.maps.v, shared.v, shared.v_full, shared.v_empty);
    }
  } else {
    take_registers<Traits::kMathRegisters>();
    compute<Traits>(params, shared, warpgroup - 1);
  }
#else
  __trap();  // chosen only where it has been built for sm_90a
#endif
}

template <class CacheElement, int kHeadDim>
HopperKernel hopper_prefill(const char *name) {
  using Traits = HopperPrefillTraits<CacheElement, kHeadDim>;
  return {{name, reinterpret_cast<const void *>(&hopper_prefill_kernel<Traits>), Traits::kThreads,
           sizeof(typename Traits::Shared), Traits::kRows, Traits::kTokens, kHeadDim, &Traits::Cut::places_per_block, 0,
           true},
          {1, 128, true, 1}};
}

}  // namespace pagedattn::cuda
