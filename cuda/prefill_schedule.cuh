// How the prefill of a ragged batch is divided among persistent blocks, on the device, from the lengths alone.
//
// SPDX-License-Identifier: Apache-2.0
//
// An item is a tile of query tokens of one KV head of one sequence.  Items have an order: a sequence after the other;
// in a sequence, so many KV heads at a time as the L2 cache holds keys and values of; the tiles of these from the last,
// which sees most keys, to the first; in a tile a head after the other.  Blocks take the next item each when they are
// done with one, so that blocks at work share what they read, and what is left at the end is short.  Which block takes
// which item depends on chance, but what becomes of it does not.
//
// Where that would leave blocks idle for longer than joins take, the order's first items are cut evenly into a range
// for each block before anything else (WorkCut): all items, if they are few, or those of an incomplete last round, if
// all are of about the same length.  Then the rest are whole rounds, in which every block has one.  Where nearly all
// blocks can have equal parts of equal items, they do, and so the tiles of a KV head go over the same keys side by
// side.
#pragma once

#include "attention_kernel.h"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Of the arrival counters, the last.
constexpr int kTicketCounter = kMaxGrid - 1;
// Of keys and values that blocks at work should read at a time: less than half of Hopper's L2 cache, of whose data each
// half may keep a copy.
constexpr int kCachedBytes = 16 << 20;

// a / b of numbers that are not negative, in fewer instructions than the compiler's where a is not large.
__device__ inline int quick_divide(int a, int b) {
  if (a >= 1 << 22) [[unlikely]]
    return static_cast<int>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
  const int quotient =
      static_cast<int>(__fdividef(static_cast<float>(a), static_cast<float>(b)));  // off by one at most
  const int rest = a - quotient * b;
  return quotient + (rest >= b) - (rest < 0);
}

// Tiles that hold whole query tokens.
template <int kRows, int kTokens>
struct PrefillShape : TileShape<kRows, kTokens, false> {
  // Where items are cut, to so many tiles: blocks that have equal parts end together but for these.
  static constexpr int kMinSegmentTiles = 2;
};

// A share of an item for one block.
struct PrefillSegment {
  bool valid;  // false: there are no more
  WorkItem item;
  Range tiles;
  SegmentPlan plan;
};

// Rows of an item's tile that are a token's; others come behind them.
__device__ inline int tile_rows(const Batch &batch, const WorkItem &item) {
  const int queries = min(batch.tile_queries, item.seq.num_queries - item.query_tile * batch.tile_queries);
  return queries * static_cast<int>(batch.group.divisor);
}

// The query token, of those of the sequence, that a row of an item's tile is of.  Rows that no token has are given the
// last one's.
__device__ inline int query_of_row(const Batch &batch, const WorkItem &item, int row) {
  const int query = item.query_tile * batch.tile_queries + min(batch.group.divide(row), batch.tile_queries - 1);
  return min(query, item.seq.num_queries - 1);
}
__device__ inline Range keys_of_row(const Batch &batch, const WorkItem &item, int row) {
  return visible_keys(batch, item.seq, query_of_row(batch, item, row));
}

// How many items some sequences have, and what these cost.
struct WorkMeasure {
  int items = 0;
  int shortest = kMaxUnits;  // cost of one
  int longest = 0;
  float work = 0.0f;  // what all cost, if they differ evenly

  // Of which the first and the last cost so much.
  __device__ void add(int count, int first, int last) {
    join({count, smaller(first, last), larger(first, last),
          0.5f * static_cast<float>(count) * (static_cast<float>(first) + static_cast<float>(last))});
  }
  __device__ void join(const WorkMeasure &other) {
    items += other.items;
    shortest = smaller(shortest, other.shortest);
    longest = larger(longest, other.longest);
    work += other.work;
  }
  // Of all lanes of a warp.
  __device__ void join_lanes() {
    items = warp_sum(items);
    shortest = __reduce_min_sync(kFullWarp, shortest);
    longest = __reduce_max_sync(kFullWarp, longest);
    work = warp_sum(work);
  }
  // Query starts that make no sense may give the same tokens to many sequences: then nothing, rather than anything.
  __device__ bool makes_sense() const { return items >= 0 && items < kMaxUnits && work < 2.0f * kMaxUnits; }
  __device__ bool alike() const { return shortest >= longest - longest / 4; }
};

// Shape's tiles hold whole query tokens.  kThreads is the block's, kTokenBytes what a token has of K and V for a head.
template <class Shape, int kThreads, int kTokenBytes>
class PrefillSchedule {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMostCut = 512;  // items
  // Of what a block spends on the ends of its range: partial results stored, waited for and joined.  In units.
  static constexpr float kJoinCost = 6.0f;
  // Behind a window, tiles between the first, which has fewer keys before it, and the last, which may have fewer
  // queries, see more than either, by so many KV tiles at most.  Items in equal parts must begin behind all of the one
  // before.
  static constexpr int kWindowMargin = (Shape::kRows + Shape::kTokens - 1) / Shape::kTokens + 1;

 public:
  struct Shared {
    WorkCut<Shape> cut;
    LineRange range;       // the block's, of the items that are cut
    int starts[kMostCut];  // of these, on the line
    int num_cut;
    int num_items;
    bool alike;                  // items are of about the same length
    WorkItem item;               // that the block is at, kept here to save registers
    int items_before[kThreads];  // each thread's sequences
    WorkMeasure measures[kWarps];
  };

  __device__ PrefillSchedule(const Batch &batch, Shared &shared) : batch_(batch), shared_(shared) {}

  // Called by the whole block; the first warp may use the schedule at once.  All this comes before any data is asked
  // for and takes as long as a warp's way through the instructions, mostly for the first time: few sequences are
  // measured by every warp for itself.
  __device__ void begin() {
    const auto thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32, warp = thread / 32, chunk = sequences_of_thread();
    const bool few = batch_.num_seqs <= 32;
    const int place = few ? lane : thread;
    WorkMeasure measure;
#pragma unroll 1
    for (int index = place * chunk; index < smaller((place + 1) * chunk, batch_.num_seqs); ++index) {
      const Sequence seq = load_sequence(batch_, index);
      const int tiles = num_tiles(seq);
      if (tiles > 0) {
        measure.add(tiles * batch_.num_kv_heads, cost_of(keys_of_tile(seq, 0)), cost_of(keys_of_tile(seq, tiles - 1)));
      }
    }
    const int scanned = warp_inclusive_scan(measure.items, lane);
    int before = scanned - measure.items;
    measure.join_lanes();
    if (!few) {
      if (lane == 0) shared_.measures[warp] = measure;
      __syncthreads();
      measure = {};
#pragma unroll 1
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp) before += measure.items;
        measure.join(shared_.measures[w]);
      }
    }
    if (!few || warp == 0) shared_.items_before[thread_index()] = before;
    if (!few) __syncthreads();
    if (!measure.makes_sense()) measure = {};
    cut_first_items(measure);
  }

  __device__ Shared &shared() const { return shared_; }
  __device__ const Batch &batch() const { return batch_; }

  // An item by its place in the order.  Lanes may ask for different ones.
  __device__ WorkItem locate(int index) const {
    // The last thread whose sequences have no more items before them.
    int low = 0, high = smaller(kThreads, batch_.num_seqs);
#pragma unroll 1
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (shared_.items_before[middle] <= index ? low : high) = middle;
    }
    int place = index - shared_.items_before[low], sequence = low * sequences_of_thread();
    Sequence seq = load_sequence(batch_, sequence);
    int tiles = num_tiles(seq);
#pragma unroll 1
    while (place >= tiles * batch_.num_kv_heads) {
      place -= tiles * batch_.num_kv_heads;
      seq = load_sequence(batch_, ++sequence);
      tiles = num_tiles(seq);
    }
    const int cached_heads =
        clamp_to(quick_divide(kCachedBytes / kTokenBytes, larger(seq.length, 1)), 1, batch_.num_kv_heads);
    const int section = quick_divide(place, cached_heads * tiles), first_head = section * cached_heads;
    place -= section * cached_heads * tiles;
    const int heads = smaller(cached_heads, batch_.num_kv_heads - first_head), row = quick_divide(place, heads);
    return make_item(seq, first_head + place - row * heads, tiles - 1 - row);
  }

 private:
  __device__ int sequences_of_thread() const { return ceil_divide(batch_.num_seqs, kThreads); }

  __device__ int num_tiles(const Sequence &seq) const {
    const int rows = num_rows(batch_, seq);
    return rows < batch_.min_rows || rows > batch_.max_rows
               ? 0
               : quick_divide(seq.num_queries + batch_.tile_queries - 1, batch_.tile_queries);
  }

  // That any row of a tile sees.
  __device__ Range keys_of_tile(const Sequence &seq, int tile) const {
    const int first = tile * batch_.tile_queries, last = smaller(first + batch_.tile_queries, seq.num_queries) - 1;
    return {visible_keys(batch_, seq, first).begin, visible_keys(batch_, seq, last).end};
  }
  __device__ WorkItem make_item(const Sequence &seq, int kv_head, int tile) const {
    const Range keys = keys_of_tile(seq, tile);
    return {seq, kv_head, 0, tile, keys, kv_tiles<Shape>(keys), 0};
  }

  __device__ int cost_of(Range keys) const {
    const Range tiles = kv_tiles<Shape>(keys);
    return cuda::cost_of<Shape>(batch_, tiles.end - tiles.begin);
  }

  // How the order's first items are cut, if at all: some of them, into a range for each block; if into equal parts, so
  // many of an item and so long.
  struct CutPlan {
    int num_items;
    bool equal_parts;
    int parts;
    int part;
  };

  // The costs of both ways are compared as they would be if those of items fell evenly from the largest to the least.
  __device__ CutPlan plan_cut(const WorkMeasure &measure) const {
    const int blocks = static_cast<int>(gridDim.x), items = measure.items, longest = measure.longest;
    const bool are_few = items <= smaller(2 * blocks, kMostCut);
    if (!are_few && !measure.alike()) return {0, false, 0, 0};
    const int num_cut = are_few ? items : items - quick_divide(items, blocks) * blocks;
    if (num_cut == 0 || num_cut > kMostCut) return {0, false, 0, 0};
    const int parts = quick_divide(blocks, num_cut), reach = longest + (batch_.window > 0 ? kWindowMargin : 0),
              part = quick_divide(reach + larger(parts, 1) - 1, larger(parts, 1));
    const bool equal_parts = measure.alike() && parts > 1 && 8 * parts * num_cut >= 7 * blocks &&
                             part >= units_of(batch_, Shape::kMinSegmentTiles);
    const auto most = static_cast<float>(longest);
    float cut = static_cast<float>(part), whole = most;
    if (!equal_parts) cut = __fdividef(are_few ? measure.work : most * static_cast<float>(num_cut), blocks);
    if (are_few && items > blocks) {  // then a block has two, whose sum is the same for all
      whole += fmaxf(0.0f, most - static_cast<float>(longest - measure.shortest) * __fdividef(2 * blocks, items));
    }
    return {whole > cut + kJoinCost ? num_cut : 0, equal_parts, parts, part};
  }

  // By the whole block, since to find an item takes long.  What is left is the first warp's.
  __device__ void cut_first_items(const WorkMeasure &measure) {
    const auto [num_cut, equal_parts, parts, part] = plan_cut(measure);
    if (num_cut > 0 && !equal_parts) {
      __syncthreads();
#pragma unroll 1
      for (int i = thread_index(); i < num_cut; i += kThreads) shared_.starts[i] = cost_of(locate(i).keys);
      __syncthreads();
    }
    const int lane = thread_index();
    if (lane >= 32) return;
    auto cut = WorkCut<Shape>::of(batch_, 0, 1);
    int total = 0;
    if (num_cut > 0) {
#pragma unroll 1
      for (int i = lane; i - lane < num_cut; i += 32) {
        // Items in equal parts are further apart on the line than they are long.
        const int cost = i >= num_cut ? 0 : equal_parts ? parts * part : shared_.starts[i];
        const int scanned = warp_inclusive_scan(cost, lane);
        if (i < num_cut) shared_.starts[i] = total + scanned - cost;
        total += __shfl_sync(kFullWarp, scanned, 31);
      }
      cut = WorkCut<Shape>::of(batch_, total, static_cast<int>(gridDim.x));
      if (equal_parts) cut.quantum = part;
    }
    if (lane == 0) {
      shared_.num_items = measure.items;
      shared_.alike = measure.alike();
      shared_.num_cut = num_cut;
      shared_.cut = cut;
      const int block = static_cast<int>(blockIdx.x), begin = block * cut.quantum;
      shared_.range = {block, begin, smaller(begin + cut.quantum, total)};
    }
    __syncwarp();
  }

  const Batch &batch_;
  Shared &shared_;
};

// The segments of a block one after the other, for its first warp, whose lanes get the same values.
template <class Shape, class Schedule>
class PrefillSource {
 public:
  // `tickets`: a counter that all blocks draw from.
  __device__ PrefillSource(const Schedule &schedule, uint32_t *tickets)
      : schedule_(schedule), shared_(schedule.shared()), tickets_(tickets) {}

  // The first, behind the schedule's begin, but for its plan, for which the result is kept.
  __device__ int begin(PrefillSegment &segment) {
    int begun = 0;  // items that begin where the block's range does, or before
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < shared_.num_cut; i += 32) {
      begun += shared_.starts[i] <= shared_.range.begin;
    }
    cut_item_ = shared_.range.begin < shared_.range.end ? warp_sum(begun) - 1 : shared_.num_cut;
    return find(segment);
  }

  // Into shared memory, where others see it behind a barrier.
  __device__ void next(PrefillSegment &segment) { make_plan(segment, find(segment)); }

  // Of the segment found last, whose first granule is given.
  __device__ void make_plan(PrefillSegment &segment, int granule) const {
    const WorkCut<Shape> &cut = shared_.cut;
    const WorkItem &item = shared_.item;
    SegmentPlan plan;
    if (item.start != kNotCut) {
      plan = plan_of(item, cut, shared_.range, granule);
    } else if (cut.deterministic) {
      const int block = static_cast<int>(blockIdx.x);
      plan = {granule, cut.num_granules(item), false, block, (2 * block + 1) * Shape::kMaxPieces};
    } else {
      plan = {0, 1, false, 0, 0};
    }
    if (threadIdx.x == 0) segment.plan = plan;
  }

 private:
  // Returns the segment's first granule, or anything if there is none.
  __device__ int find(PrefillSegment &segment) {
    const WorkCut<Shape> &cut = shared_.cut;
    while (granules_.begin >= granules_.end) {
      if (!next_item()) {
        if (threadIdx.x == 0) segment.valid = false;
        return 0;
      }
    }
    const int granule = granules_.begin, step = cut.deterministic ? 1 : granules_.end - granule;
    granules_.begin += step;
    const WorkItem &item = shared_.item;
    Range tiles = tiles_of(item, cut, {granule, granule + step});
    if (tiles.begin == tiles.end) ++tiles.end;  // an item without keys gets a tile that nobody sees
    if (threadIdx.x == 0) {
      segment.valid = true;
      segment.tiles = tiles;
    }
    copy_item(segment.item, item);
    return granule;
  }

  static constexpr int kNotCut = -1;  // where an item starts that is nowhere on the line

  __device__ bool next_item() {
    const WorkCut<Shape> &cut = shared_.cut;
    const bool is_cut = cut_item_ < shared_.num_cut && shared_.starts[cut_item_] < shared_.range.end;
    const int tickets = shared_.num_items - shared_.num_cut;
    if (!is_cut) ticket_ = ticket_ < 0 ? static_cast<int>(blockIdx.x) : next_ticket(tickets);
    if (!is_cut && ticket_ >= tickets) return false;
    WorkItem item = schedule_.locate(is_cut ? cut_item_ : shared_.num_cut + ticket_);
    if (is_cut) {
      item.start = shared_.starts[cut_item_++];
      granules_ = granules_of(item, cut, shared_.range);
    } else {
      item.start = kNotCut;
      granules_ = {0, cut.num_granules(item)};
    }
    __syncwarp();  // every lane is done with the one before
    if (threadIdx.x == 0) shared_.item = item;
    __syncwarp();
    return true;
  }

  // A word a lane: one lane would need registers for all.
  __device__ static void copy_item(WorkItem &to, const WorkItem &from) {
    static_assert(sizeof(WorkItem) <= 32 * sizeof(int) && alignof(WorkItem) == alignof(int));
    const int word = thread_index();
    if (word < static_cast<int>(sizeof(WorkItem) / sizeof(int))) {
      reinterpret_cast<int *>(&to)[word] = reinterpret_cast<const int *>(&from)[word];
    }
  }

  __device__ int next_ticket(int tickets) const {
    if (shared_.alike) return ticket_ + static_cast<int>(gridDim.x);
    // As many are drawn as there are, and the last draw sets the counter back.
    int drawn = 0;
    if (threadIdx.x == 0) drawn = static_cast<int>(atomicInc(tickets_, static_cast<uint32_t>(tickets - 1)));
    return static_cast<int>(gridDim.x) + __shfl_sync(kFullWarp, drawn, 0);
  }

  const Schedule &schedule_;
  typename Schedule::Shared &shared_;
  uint32_t *tickets_;
  Range granules_{0, 0};  // of the item that are still to come
  int cut_item_;
  int ticket_ = -1;  // the latest; the first of a block is its number
};

}  // namespace pagedattn::cuda
