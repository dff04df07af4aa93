// Paged decode on Hopper: sequences of at most 64 query rows a KV head, 16-bit queries, 16-bit or float8 caches.
//
// SPDX-License-Identifier: Apache-2.0
//
// One persistent block a multiprocessor takes an equal share of all (sequence, KV head, KV tile) work
// (work_schedule.cuh).  Four producer warps do nothing but find that work and ask the copy engine (TMA) for its tiles,
// into a ring of 64 to 132 KB that runs on across the ends of segments, so that memory is never idle while results are
// written.  Two groups of four warps compute by mma.sync, a segment each in turn: one writes results and fetches
// queries while the other multiplies.  Within a group, warps that share query rows take the tiles in turn, each with a
// state (m, l, O) of its own in registers, and nobody waits for anybody before the end.
//
// Bound: bytes of the cache.  64 sequences of 4096 tokens, 8 KV heads of 128 bfloat16: 361 us on an H100, 94.5 % of the
// rate at which it reads memory.  docs/performance/decode.md tells where the rest goes and what was tried.
#pragma once

#include "hopper_traits.cuh"
#include "mma_queries.cuh"
#include "mma_warp_rows.cuh"

namespace pagedattn::cuda {

// ---- the producers ----------------------------------------------------------------------------------------------

// Asks for the tiles of one segment after the other.  Producers take turns: each has those whose count, from the
// kernel's first on, is its number.
template <class Traits>
class TileProducer {
  using Kv = typename Traits::KvTile;

 public:
  __device__ TileProducer(const HopperDecodeParams &params, typename Traits::Shared &shared)
      : params_(params), shared_(shared), lane_(static_cast<int>(threadIdx.x) % 32), policy_(read_once_policy()) {
    // A lane's box of every tile: K or V, columns, some of the tokens.
    const int pieces = 2 * Kv::kColumns / params.box_columns;
    const int column = lane_ % pieces / 2 * params.box_columns;
    is_v_ = lane_ % 2 != 0;
    first_token_ = lane_ / pieces * params.box_tokens;
    active_ = first_token_ < Traits::kTokens;
    element_ = column * (128 / Traits::kElementBytes);
    offset_ = (is_v_ ? Kv::kBytes : 0) + first_token_ / 8 * Kv::kEightRows + column * 1024;
  }

  __device__ uint32_t count() const { return count_; }

  __device__ void ask_for(const WorkItem &item, Range tiles) {
    const int32_t *const table = params_.block_tables + item.seq.index * params_.block_table_stride;
    const int end_block = item.keys.end > 0 ? params_.block_size.divide(item.keys.end - 1) + 1 : 0;
    const Range keys = item.keys;
    const int kv_head = item.kv_head;
    const auto load_entries = [&](int first) { return first + lane_ < end_block ? table[first + lane_] : 0; };
    // The lanes hold the table's next 64 entries, the second half on its way while the first is used.
    int first_entry = params_.block_size.divide(tiles.begin * Traits::kTokens);
    int entries = load_entries(first_entry), next_entries = load_entries(first_entry + 32);
    const auto mine = [&](uint32_t count) { return count % Traits::kProducers == threadIdx.x / 32; };
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile, ++count_) {
      const int first_token = tile * Traits::kTokens;
      if (params_.block_size.divide(first_token) >= first_entry + 32) {
        first_entry += 32;
        entries = next_entries;
        next_entries = load_entries(first_entry + 32);
      }
      if (!mine(count_)) continue;
      const int token = first_token + first_token_, block = params_.block_size.divide(token);
      const int place = block - first_entry;
      const int near = __shfl_sync(kFullWarp, entries, place), far = __shfl_sync(kFullWarp, next_entries, place - 32);
      const int corner[5] = {element_, token - block * static_cast<int>(params_.block_size.divisor), 0, kv_head,
                             clamp_to(place < 32 ? near : far, 0, params_.last_block)};
      // Boxes that nobody sees stay as they are.
      const bool seen = active_ && token < keys.end && token + params_.box_tokens > keys.begin;
      const int boxes = __popc(__ballot_sync(kFullWarp, seen));

      const uint32_t slot = count_ % Traits::kSlots;
      wait(&shared_.tile_empty[slot], (count_ / Traits::kSlots & 1) ^ 1);
      if (lane_ == 0) arrive_and_expect(&shared_.tile_full[slot], boxes * params_.box_bytes);
      __syncwarp();
      if (seen) {
        copy_box(shared_address(shared_.ring[slot][0]) + static_cast<SharedAddress>(offset_),
                 is_v_ ? &params_.v_map : &params_.k_map, corner, &shared_.tile_full[slot], policy_);
      }
    }
  }

 private:
  const HopperDecodeParams &params_;
  typename Traits::Shared &shared_;
  int lane_;
  uint64_t policy_;
  bool is_v_;
  bool active_;
  int first_token_;
  int element_;
  int offset_;
  uint32_t count_ = 0;  // of tiles so far
};

// The first producer walks the block's work and tells the others.
template <class Traits>
__device__ void lead(const HopperDecodeParams &params, typename Traits::Shared &shared,
                     typename Traits::Cursor &cursor) {
  TileProducer<Traits> producer(params, shared);
  const auto &cut = cursor.cut();
  uint32_t told = 0;  // segments
  const auto tell = [&](const typename Traits::Segment &segment) {
    const uint32_t place = told % Traits::kSegments;
    wait(&shared.segment_empty[place], (told / Traits::kSegments & 1) ^ 1);
    __syncwarp();
    if (threadIdx.x == 0) {
      shared.segments[place] = segment;
      arrive(&shared.segment_full[place]);
    }
    ++told;
    if (segment.valid) producer.ask_for(segment.item, segment.tiles);
  };
  WorkItem item;
#pragma unroll 1
  for (bool found = cursor.first(item); found; found = cursor.next(item)) {
    const Range granules = granules_of(item, cut, cursor.range());
    const int step = cut.deterministic ? 1 : granules.end - granules.begin;
#pragma unroll 1
    for (int granule = granules.begin; granule < granules.end; granule += step) {
      tell({true, item, tiles_of(item, cut, {granule, granule + step}), producer.count(), granule});
    }
  }
  // One for each group of warps; the other producers end with the first.
#pragma unroll 1
  for (int i = 0; i < Traits::kGroups; ++i) tell({});
}

// Hears of segments, from the `first` on every kStep-th; function(segment, its number) ends with the warp at one point,
// and `arrives` says whether this thread tells that the segment's description is used no more.
template <class Traits, int kStep, class Function>
__device__ void for_each_segment(typename Traits::Shared &shared, uint32_t first, bool arrives, Function &&function) {
#pragma unroll 1
  for (uint32_t heard = first;; heard += kStep) {
    const uint32_t place = heard % Traits::kSegments;
    wait(&shared.segment_full[place], heard / Traits::kSegments & 1);
    const typename Traits::Segment &segment = shared.segments[place];
    if (!segment.valid) return;
    function(segment, heard);
    if (arrives) arrive(&shared.segment_empty[place]);
  }
}

template <class Traits>
__device__ void follow(const HopperDecodeParams &params, typename Traits::Shared &shared) {
  TileProducer<Traits> producer(params, shared);
  for_each_segment<Traits, 1>(shared, 0, threadIdx.x % 32 == 0, [&](const typename Traits::Segment &segment, uint32_t) {
    producer.ask_for(segment.item, segment.tiles);
    __syncwarp();
  });
}

// ---- the warps that compute --------------------------------------------------------------------------------------

template <class Traits>
__device__ void compute(const HopperDecodeParams &params, typename Traits::Shared &shared) {
  const int index = static_cast<int>(threadIdx.x) - 32 * Traits::kProducers;
  const int group_index = index / Traits::kGroupThreads, thread = index % Traits::kGroupThreads;
  const int warp = thread / 32, lane = thread % 32, barrier = 1 + group_index;
  typename Traits::Group &group = shared.groups[group_index];
  const typename Traits::BlockEpilogue epilogue(params, group.epilogue, group.states, thread, barrier);
  const auto attend = [&](const typename Traits::Segment &segment, uint32_t number) {
    const WorkItem &item = segment.item;
    // Warps hold 16 rows each; those with the same rows, a party, take turns at the tiles.
    const int item_rows = num_rows(params.batch, item.seq);
    const int row_tiles = item_rows <= 16 ? 1 : item_rows <= 32 ? 2 : 4, parties = Traits::kGroupWarps / row_tiles;
    const int row_tile = warp % row_tiles, party = warp / row_tiles;

    load_queries<Traits>(params, item, 16 * row_tiles, group.queries(), group.rows, thread);
    fill_row_table<Traits::kGroupThreads>(params, item, group.rows, thread);
    if (thread == 0) group.plan = plan_of(item, shared.cursor.cut, shared.cursor.range, segment.granule);
    named_barrier<Traits::kGroupThreads>(barrier);
    WarpRows<Traits> rows(params);
    rows.begin(item, 16 * row_tile, group.rows, group.queries());

    // The ring's barriers know a tile only from the one before it in the same slot: none may be waited for before those
    // of the segment before have all been taken.
    if (number > 0) wait(&shared.turn[group_index], (number - 1) / Traits::kGroups & 1);
    const int num_tiles = segment.tiles.end - segment.tiles.begin;
#pragma unroll 1
    for (int tile = party; tile < num_tiles; tile += parties) {
      const uint32_t count = segment.first_tile + static_cast<uint32_t>(tile), slot = count % Traits::kSlots;
      const int token = (segment.tiles.begin + tile) * Traits::kTokens;
      wait(&shared.tile_full[slot], count / Traits::kSlots & 1);
      if (rows.sees(token)) {
        typename WarpRows<Traits>::Scores s;
        rows.multiply_q_k(s, shared.ring[slot][0]);
        rows.softmax(s, token);
        rows.multiply_p_v(s, shared.ring[slot][1], token);
      }
      __syncwarp();
      if (lane == 0) arrive(&shared.tile_empty[slot], Traits::kGroupWarps / row_tiles);
    }
    __syncwarp();
    if (lane == 0) arrive(&shared.turn[(group_index + 1) % Traits::kGroups]);
    named_barrier<Traits::kGroupThreads>(barrier);  // the states overlay the queries
    // Deterministic pieces of an item that is all this block's are joined, uncounted, by whoever has the last, and the
    // next such item takes the same places.
    if (params.batch.deterministic && number > 0) {
      wait(&shared.finished[group_index], (number - 1) / Traits::kGroups & 1);
    }
    epilogue.finish(item, group.plan, parties, 16 * row_tiles,
                    [&](int column) { rows.store_state(epilogue, (party * row_tiles + row_tile) * 16, column); });
    if (thread == 0) arrive(&shared.finished[(group_index + 1) % Traits::kGroups]);
  };
  for_each_segment<Traits, Traits::kGroups>(shared, static_cast<uint32_t>(group_index), thread == 0, attend);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    hopper_decode_kernel(const __grid_constant__ HopperDecodeParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char shared_memory[];
  auto &shared = *reinterpret_cast<typename Traits::Shared *>(shared_memory);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&params.k_map);
    prefetch_tensor_map(&params.v_map);
    for (int i = 0; i < Traits::kSlots; ++i) {
      init_barrier(&shared.tile_full[i], 1);
      init_barrier(&shared.tile_empty[i], Traits::kGroupWarps);
    }
    for (int i = 0; i < Traits::kGroups; ++i) {
      init_barrier(&shared.turn[i], Traits::kGroupWarps);
      init_barrier(&shared.finished[i], 1);
    }
    for (int i = 0; i < Traits::kSegments; ++i) {
      init_barrier(&shared.segment_full[i], 1);
      init_barrier(&shared.segment_empty[i], Traits::kProducers);  // but the first, and a group
    }
    publish_barriers();
  }
  wait_for_previous_kernels();
  typename Traits::Cursor cursor(params.batch, shared.cursor);
  cursor.begin();
  let_next_kernel_start();
  if (threadIdx.x < 32 * Traits::kProducers) {
    give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) {
      lead<Traits>(params, shared, cursor);
    } else {
      follow<Traits>(params, shared);
    }
  } else {
    take_registers<Traits::kMathRegisters>();
    compute<Traits>(params, shared);
  }
#else
  __trap();  // chosen only where it has been built for sm_90a
#endif
}

template <class CacheElement, int kHeadDim>
HopperDecodeKernel hopper_decode(const char *name, const char *with_many_rows) {
  using Traits = HopperDecodeTraits<CacheElement, kHeadDim>;
  return {{name, reinterpret_cast<const void *>(&hopper_decode_kernel<Traits>), Traits::kThreads,
           sizeof(typename Traits::Shared), Traits::kRows, Traits::kTokens, kHeadDim, &Traits::Cut::places_per_block},
          with_many_rows,
          {Traits::KvTile::kColumns, Traits::KvTile::kRowBytes, Traits::KvTile::kCut}};
}

}  // namespace pagedattn::cuda
