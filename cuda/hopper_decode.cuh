// Paged decode on Hopper: sequences of at most 64 query rows a KV head, or 16 where four heads of the cache are read as
// one row; 16-bit or float8 queries and caches.
//
// SPDX-License-Identifier: Apache-2.0
//
// One persistent block a multiprocessor takes an equal share of all (sequence, KV head, KV tile) work, or of that of a
// KV head or two (work_schedule.cuh, head_lines.cuh).  Four producer warps do nothing but find that work and ask the
// copy engine (TMA) for its tiles, into a ring of 104 to 160 KB that runs on across the ends of segments, so that
// memory is never idle while results are written.  Several KV heads may be one item, whose tiles follow each other in
// the ring, or lie side by side.
//
// Two groups of four warps compute, a segment each in turn: one writes results and fetches queries while the other
// multiplies, by mma.sync.  Within a group, warps that share query rows take the tiles in turn, each with a state (m,
// l, O) of its own in registers, and nobody waits for anybody before the end.  Warps that share none write their
// results from there.  Tall kernels, for more than 16 rows, multiply by wgmma, all warps of a group each tile together.
//
// Bound: bytes of the cache.  64 sequences of 4096 tokens, 8 KV heads of 128 bfloat16: 356 us on an H100, 95 % of the
// rate at which it reads memory.  docs/performance/decode.md tells where the rest goes and what was tried.
#pragma once

#include "hopper_group_rows.cuh"
#include "hopper_traits.cuh"
#include "mma_queries.cuh"
#include "mma_warp_rows.cuh"
#include "segment_source.cuh"

namespace pagedattn::cuda {

// ---- the producers ----------------------------------------------------------------------------------------------

// Asks for the tiles of one segment after the other.  Producers take turns: each has those whose count, from the
// kernel's first on, is its number.
template <class Traits>
class TileProducer {
  using Kv = typename Traits::KvTile;

 public:
  __device__ TileProducer(const HopperParams &params, typename Traits::Shared &shared)
      : params_(params), shared_(shared), lane_(static_cast<int>(threadIdx.x % 32)), policy_(read_once_policy()) {
    // A lane's box of every tile: K or V, columns, some of the tokens.
    const bool whole = params.maps.box_columns == Kv::kColumns;
    const int column = whole ? 0 : lane_ % (2 * Kv::kColumns) / 2;
    is_v_ = lane_ % 2 != 0;
    first_token_ = (whole ? lane_ / 2 : lane_ / (2 * Kv::kColumns)) * params.maps.box_tokens;
    active_ = first_token_ < Traits::kTokens;
    element_ = column * (128 / Traits::kElementBytes);
    offset_ = (is_v_ ? Kv::kBytes : 0) + first_token_ / 8 * Kv::kEightRows + column * 1024;
  }

  __device__ uint32_t count() const { return count_; }  // of slots so far

  // To come before `ask_for`, which can then do something else before: the first table entries are on their way.
  __device__ void look_up(const WorkItem &item, Range tiles) {
    table_ = params_.block_tables + item.seq.index * params_.block_table_stride;
    end_block_ = item.keys.end > 0 ? params_.block_size.divide(item.keys.end - 1) + 1 : 0;
    first_entry_ = params_.block_size.divide(tiles.begin * Traits::kTokens);
    entries_ = load_entries(first_entry_);
    next_entries_ = load_entries(first_entry_ + 32);
  }

  __device__ void ask_for(const WorkItem &item, Range tiles) {
    const Range keys = item.keys;
    const int first_head = item.kv_head / Traits::kTileHeads, slots = (1 << item.head_shift) / Traits::kTileHeads;
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile, count_ += static_cast<uint32_t>(slots)) {
      const int first_token = tile * Traits::kTokens;
      if (params_.block_size.divide(first_token) >= first_entry_ + 32) {
        first_entry_ += 32;
        entries_ = next_entries_;
        next_entries_ = load_entries(first_entry_ + 32);
      }
      const auto head = static_cast<int>((threadIdx.x / 32 - count_) % Traits::kProducers);
      if (head >= slots) continue;
      const int token = first_token + first_token_, block = params_.block_size.divide(token);
      const int place = block - first_entry_;
      const int near = __shfl_sync(kFullWarp, entries_, place), far = __shfl_sync(kFullWarp, next_entries_, place - 32);
      const int corner[5] = {element_, token - block * static_cast<int>(params_.block_size.divisor), 0,
                             first_head + head, clamp_to(place < 32 ? near : far, 0, params_.last_block)};
      // Boxes that nobody sees stay as they are.
      const bool seen = active_ && token < keys.end && token + params_.maps.box_tokens > keys.begin;
      const int boxes = __popc(__ballot_sync(kFullWarp, seen));

      const uint32_t count = count_ + static_cast<uint32_t>(head), slot = count % Traits::kSlots;
      wait(&shared_.tile_empty[slot], (count / Traits::kSlots & 1) ^ 1);
      // Lanes meet behind the wait, before anything comes that could end the next phase.
      if (lane_ == 0) arrive_and_expect(&shared_.tile_full[slot], boxes * params_.maps.box_bytes);
      __syncwarp();
      if (seen) {
        copy_box(shared_address(shared_.ring[slot][0]) + static_cast<SharedAddress>(offset_),
                 is_v_ ? &params_.maps.v : &params_.maps.k, corner, &shared_.tile_full[slot], policy_);
      }
    }
  }

 private:
  __device__ int load_entries(int first) const { return first + lane_ < end_block_ ? table_[first + lane_] : 0; }

  const HopperParams &params_;
  typename Traits::Shared &shared_;
  int lane_;
  uint64_t policy_;
  bool is_v_;
  bool active_;
  int first_token_;
  int element_;
  int offset_;
  uint32_t count_ = 0;
  // Of the segment's sequence: its table, where that ends, and the 64 entries from one on that the lanes hold, the
  // second half on its way while the first is used.
  const int32_t *table_;
  int end_block_;
  int first_entry_;
  int entries_;
  int next_entries_;
};

// The first producer finds the segments and tells all others; behind the last it tells each group that there are no
// more.
template <class Traits>
__device__ void produce(const HopperParams &params, typename Traits::Shared &shared,
                        const typename Traits::Cursor &cursor) {
  TileProducer<Traits> producer(params, shared);
  SegmentSource<typename Traits::Cursor> source(cursor);
  const bool leads = threadIdx.x < 32;
  int ends = 0;
#pragma unroll 1
  for (uint32_t number = 0; ends < (leads ? Traits::kGroups : 1); ++number) {
    const uint32_t place = number % Traits::kSegments, phase = number / Traits::kSegments & 1;
    typename Traits::Segment segment;
    if (leads) {
      segment = {source.next(), producer.count()};
    } else {
      wait(&shared.segment_full[place], phase);
      segment = shared.segments[place];
      arrive(&shared.segment_empty[place]);
    }
    if (segment.valid) producer.look_up(segment.item, segment.tiles);
    if (leads) {
      wait(&shared.segment_empty[place], phase ^ 1);
      if (threadIdx.x == 0) {
        shared.segments[place] = segment;
        arrive(&shared.segment_full[place]);
      }
    }
    __syncwarp();
    if (segment.valid) {
      producer.ask_for(segment.item, segment.tiles);
    } else {
      ++ends;
    }
  }
}

// ---- the warps that compute --------------------------------------------------------------------------------------

// The group that has the next segment, behind that of this group and number.
template <class Traits>
__device__ int next_group(int group, uint32_t number) {
  if constexpr (Traits::kSavesRegisters) return static_cast<int>((found_here(number) + 1) % Traits::kGroups);
  return (group + 1) % Traits::kGroups;
}

template <class Traits>
__device__ void compute(const HopperParams &params, typename Traits::Shared &shared) {
  const int index = static_cast<int>(threadIdx.x) - 32 * Traits::kProducers;
  const int group_index = index / Traits::kGroupThreads, thread = index % Traits::kGroupThreads;
  const int warp = thread / 32, lane = thread % 32, barrier = 1 + group_index;
  typename Traits::Group &group = shared.groups[group_index];
  const typename Traits::BlockEpilogue epilogue(params, group.epilogue, group.states, thread, barrier);
  const auto meet = [&] { named_barrier<Traits::kGroupThreads>(barrier); };
  const auto attend = [&](const typename Traits::Segment &segment, uint32_t number) {
    const WorkItem &item = segment.item;
    // Warps hold 16 rows each, which are of one head; those with the same rows take turns at the tiles.  Log 2 of an
    // item's heads, and of a head's tiles of 16 rows:
    const int heads_shift = Traits::kTall ? 0 : item.head_shift;
    const int head_shift = Traits::kTall ? 2 : head_rows_shift(num_rows(params.batch, item.seq)) - 4;
    const int shift = heads_shift + head_shift, row_tiles = 1 << shift, parties = Traits::kGroupWarps >> shift;
    const int row_tile = warp & (row_tiles - 1), party = warp >> shift, head = row_tile >> head_shift;

    if (row_tiles > 1) {  // all that are on their way come together
      load_queries<Traits, 8>(params, item, 16 * row_tiles, group.queries(), group.rows, thread);
    } else {
      load_queries<Traits, 2>(params, item, 16 * row_tiles, group.queries(), group.rows, thread);
    }
    fill_row_table<typename Traits::Shape, Traits::kGroupThreads>(params, item, group.rows, thread);
    if constexpr (Traits::kTall) publish_shared_writes();
    meet();
    std::conditional_t<Traits::kTall, GroupRows<Traits>, WarpRows<Traits>> rows(params);
    rows.begin(item, 16 * row_tile, group.rows, group.queries());
    if (thread == 0) group.plan = plan_of(item, shared.cursor.cut, shared.cursor.range, segment.granule);

    // The ring's barriers know a tile only from the one before it in the same slot: none may be waited for before those
    // of the segment before have all been taken.
    if (number > 0) wait(&shared.turn[group_index], (number - 1) / Traits::kGroups & 1);
    const int num_tiles = segment.tiles.end - segment.tiles.begin;
    if constexpr (Traits::kTall) {
      const auto take = [&](int tile) {
        const uint32_t count = segment.first_slot + static_cast<uint32_t>(tile), slot = count % Traits::kSlots;
        wait(&shared.tile_full[slot], count / Traits::kSlots & 1);
        return shared.ring[slot][0];
      };
      const auto release = [&](int tile) {
        __syncwarp();
        const uint32_t slot = (segment.first_slot + static_cast<uint32_t>(tile)) % Traits::kSlots;
        if (lane == 0) arrive(&shared.tile_empty[slot]);
      };
      rows.attend(segment.tiles.begin * Traits::kTokens, num_tiles, thread, take, release, meet);
    } else {
#pragma unroll 1
      for (int tile = party; tile < num_tiles; tile += parties) {
        const uint32_t count = segment.first_slot +
                               static_cast<uint32_t>(Traits::kTileHeads > 1 ? tile : (tile << item.head_shift) + head);
        const uint32_t slot = count % Traits::kSlots;
        const int token = (segment.tiles.begin + tile) * Traits::kTokens;
        wait(&shared.tile_full[slot], count / Traits::kSlots & 1);
        if (rows.sees(token)) {
          typename WarpRows<Traits>::Scores s;
          rows.multiply_q_k(s, shared.ring[slot][0]);
          rows.softmax(s, token);
          rows.multiply_p_v(s, shared.ring[slot][1], token);
        }
        __syncwarp();
        if (lane == 0) arrive(&shared.tile_empty[slot], Traits::kGroupWarps / Traits::kTileHeads >> head_shift);
      }
    }
    __syncwarp();
    if (lane == 0) arrive(&shared.turn[next_group<Traits>(group_index, number)]);
    const bool alone = Traits::kWritesFromRegisters && parties == 1;
    if (alone && thread == 0) {
      const SegmentPlan &plan = group.plan;
      group.other_came =
          plan.num_segments == 2 && plan.is_shared && count_arrivals(params.arrivals + plan.first_owner) == 1;
    }
    meet();  // the states overlay the queries
    // Deterministic pieces of an item that is all this block's are joined, uncounted, by whoever has the last, and the
    // next such item takes the same places.
    if (params.batch.deterministic && number > 0) {
      wait(&shared.finished[group_index], (number - 1) / Traits::kGroups & 1);
    }
    if (alone) {
      rows.finish(item, group.plan, group.other_came, group.epilogue.last_to_arrive, thread == 0, meet);
      meet();  // queries, row table and plan may be overwritten
    } else {
      epilogue.finish(item, group.plan, parties, 16 * row_tiles,
                      [&](int column) { rows.store_state(epilogue, (party * row_tiles + row_tile) * 16, column); });
    }
    if (params.batch.deterministic && thread == 0) arrive(&shared.finished[next_group<Traits>(group_index, number)]);
  };
  for (auto number = static_cast<uint32_t>(group_index);; number += Traits::kGroups) {
    const uint32_t place = number % Traits::kSegments;
    wait(&shared.segment_full[place], number / Traits::kSegments & 1);
    if (!shared.segments[place].valid) return;
    attend(shared.segments[place], number);
    arrive(&shared.segment_empty[Traits::kSavesRegisters ? found_here(number) % Traits::kSegments : place]);
  }
}

// The third warp does so, while the first two look for work.
template <class Traits>
__device__ void init_barriers(const HopperParams &params, typename Traits::Shared &shared) {
  if (threadIdx.x != 64) return;
  prefetch_tensor_map(&params.maps.k);
  prefetch_tensor_map(&params.maps.v);
#pragma unroll
  for (int i = 0; i < Traits::kSlots; ++i) {
    init_barrier(&shared.tile_full[i], 1);
    init_barrier(&shared.tile_empty[i], Traits::kGroupWarps);
  }
#pragma unroll
  for (int i = 0; i < Traits::kGroups; ++i) {
    init_barrier(&shared.turn[i], Traits::kGroupWarps);
    init_barrier(&shared.finished[i], 1);
  }
#pragma unroll
  for (int i = 0; i < Traits::kSegments; ++i) {
    init_barrier(&shared.segment_full[i], 1);
    // All threads that look at it: the producers but for the first, and a group.
    init_barrier(&shared.segment_empty[i], 32 * (Traits::kProducers - 1) + Traits::kGroupThreads);
  }
  publish_barriers();
}

template <class Traits>
__global__ void __maxnreg__(Traits::kRegisters) hopper_decode_kernel(const __grid_constant__ HopperParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char shared_memory[];
  auto &shared = *reinterpret_cast<typename Traits::Shared *>(shared_memory);
  init_barriers<Traits>(params, shared);
  wait_for_previous_kernels();
  typename Traits::Cursor cursor(params.batch, shared.cursor);
  cursor.begin();
  __syncthreads();
  let_next_kernel_start();
  if (threadIdx.x < 32 * Traits::kProducers) {
    give_registers<Traits::kProducerRegisters>();
    produce<Traits>(params, shared, cursor);
  } else {
    take_registers<Traits::kMathRegisters>();
    compute<Traits>(params, shared);
  }
#else
  __trap();  // chosen only where it has been built for sm_90a
#endif
}

template <class CacheElement, int kHeadDim, int kTileHeads = 1, bool kTall = false>
HopperKernel hopper_decode(const char *name) {
  using Traits = HopperDecodeTraits<CacheElement, kHeadDim, kTileHeads, kTall>;
  return {{name, reinterpret_cast<const void *>(&hopper_decode_kernel<Traits>), Traits::kThreads,
           sizeof(typename Traits::Shared), Traits::kRows, Traits::kTokens, kHeadDim, &Traits::Cut::places_per_block,
           Traits::Shape::kMaxHeadShift},
          {Traits::KvTile::kColumns, Traits::KvTile::kRowBytes, Traits::KvTile::kCut, kTileHeads}};
}

}  // namespace pagedattn::cuda
