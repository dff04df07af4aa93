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
// Where that would leave blocks idle, the order's first items are cut evenly into a range for each block before
// anything else (WorkCut): all items, if they are few, or those of an incomplete last round, if all are of about the
// same length.  Then the rest are whole rounds, in which every block has one.  Where nearly all blocks can have equal
// parts of equal items, they do, and so the tiles of a KV head go over the same keys side by side.
#pragma once

#include "attention_kernel.h"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Of the arrival counters, the last.
constexpr int kTicketCounter = kMaxGrid - 1;
// Of keys and values that blocks at work should read at a time: less than half of Hopper's L2 cache, of whose data each
// half may keep a copy.
constexpr int kCachedBytes = 16 << 20;

// Tiles that hold whole query tokens.
template <int kRows, int kTokens>
struct PrefillShape : TileShape<kRows, kTokens, false> {
  // Blocks that have equal parts of an item end together but for so many tiles.
  static constexpr int kMinSegmentTiles = 2;
};

// A share of an item for one block.
struct PrefillSegment {
  bool valid;  // false: there are no more
  WorkItem item;
  Range tiles;
  SegmentPlan plan;
};

// The share of a group of rows in the join of an item's segments, of so many; none if of = 0.
struct JoinShare {
  int number;
  int of;
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

// Shape's tiles hold whole query tokens.  kThreads is the block's, kTokenBytes what a token has of K and V for a head.
template <class Shape, int kThreads, int kTokenBytes>
class PrefillSchedule {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMostCut = 512;  // items

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
    int64_t warp_items[kWarps];
    int warp_shortest[kWarps];  // cost of an item
    int warp_longest[kWarps];
  };

  __device__ PrefillSchedule(const Batch &batch, Shared &shared) : batch_(batch), shared_(shared) {}

  // Called by the whole block; the first warp may use the schedule at once.
  __device__ void begin() {
    const auto thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32, warp = thread / 32, chunk = sequences_of_thread();
    int64_t items = 0;
    int shortest = kMaxUnits, longest = 0;
#pragma unroll 1
    for (int index = thread * chunk; index < smaller((thread + 1) * chunk, batch_.num_seqs); ++index) {
      const Sequence seq = load_sequence(batch_, index);
      const int tiles = num_tiles(seq);
      if (tiles == 0) continue;
      items += static_cast<int64_t>(tiles) * batch_.num_kv_heads;
      shortest = smaller(shortest, cost_of(make_item(seq, 0, 0)));
      longest = larger(longest, cost_of(make_item(seq, 0, tiles - 1)));
    }
    const int64_t end = warp_inclusive_scan(items, lane);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      shortest = smaller(shortest, __shfl_xor_sync(kFullWarp, shortest, offset));
      longest = larger(longest, __shfl_xor_sync(kFullWarp, longest, offset));
    }
    if (lane == 31) {
      shared_.warp_items[warp] = end;
      shared_.warp_shortest[warp] = shortest;
      shared_.warp_longest[warp] = longest;
    }
    __syncthreads();
    int64_t before = end - items, total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += shared_.warp_items[w];
      total += shared_.warp_items[w];
      shortest = smaller(shortest, shared_.warp_shortest[w]);
      longest = larger(longest, shared_.warp_longest[w]);
    }
    // Query starts that make no sense may give the same tokens to many sequences: then nothing, rather than anything.
    if (total >= kMaxUnits) total = 0;
    shared_.items_before[thread_index()] = static_cast<int>(before);
    __syncthreads();
    cut_first_items(static_cast<int>(total), shortest, longest);
  }

  // The rest is for the first warp.

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
    const int cached_heads = clamp_to(kCachedBytes / kTokenBytes / larger(seq.length, 1), 1, batch_.num_kv_heads);
    const int section = place / (cached_heads * tiles), first_head = section * cached_heads;
    place -= section * cached_heads * tiles;
    const int heads = smaller(cached_heads, batch_.num_kv_heads - first_head), row = place / heads;
    return make_item(seq, first_head + place - row * heads, tiles - 1 - row);
  }

 private:
  __device__ int sequences_of_thread() const { return ceil_divide(batch_.num_seqs, kThreads); }

  __device__ int num_tiles(const Sequence &seq) const {
    const int rows = num_rows(batch_, seq);
    return rows < batch_.min_rows || rows > batch_.max_rows ? 0 : ceil_divide(seq.num_queries, batch_.tile_queries);
  }

  __device__ WorkItem make_item(const Sequence &seq, int kv_head, int tile) const {
    const int first = tile * batch_.tile_queries, last = smaller(first + batch_.tile_queries, seq.num_queries) - 1;
    const Range keys = {visible_keys(batch_, seq, first).begin, visible_keys(batch_, seq, last).end};
    return {seq, kv_head, 0, tile, keys, kv_tiles<Shape>(keys), 0};
  }

  __device__ int cost_of(const WorkItem &item) const { return cuda::cost_of<Shape>(batch_, item.num_kv_tiles()); }

  // By the whole block, since to find an item takes long.  The last two are costs of items.
  __device__ void cut_first_items(int num_items, int shortest, int longest) {
    const int thread = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
    const bool alike = 4 * int64_t{shortest} >= 3 * int64_t{longest};
    const int wanted = num_items <= 2 * blocks ? num_items : alike ? num_items % blocks : 0;
    const int num_cut = smaller(wanted, kMostCut);
    // Equal parts: so many of an item, so long.  Then items are further apart on the line than they are long.
    const int parts = blocks / larger(num_cut, 1), part = ceil_divide(longest, larger(parts, 1));
    const bool equal_parts =
        alike && parts > 1 && 8 * parts * num_cut >= 7 * blocks && part >= units_of(batch_, Shape::kMinSegmentTiles);
#pragma unroll 1
    for (int i = thread; i < num_cut; i += kThreads) {
      shared_.starts[i] = equal_parts ? parts * part : cost_of(locate(i));
    }
    __syncthreads();
    if (thread >= 32) return;
    int total = 0;
#pragma unroll 1
    for (int i = thread; i - thread < num_cut; i += 32) {
      const int cost = i < num_cut ? shared_.starts[i] : 0, scanned = warp_inclusive_scan(cost, thread);
      if (i < num_cut) shared_.starts[i] = total + scanned - cost;
      total += __shfl_sync(kFullWarp, scanned, 31);
    }
    if (thread == 0) {
      shared_.num_items = num_items;
      shared_.alike = alike;
      shared_.num_cut = num_cut;
      shared_.cut = WorkCut<Shape>::of(batch_, total, blocks);
      if (equal_parts) shared_.cut.quantum = part;
      const int block = static_cast<int>(blockIdx.x), begin = block * shared_.cut.quantum;
      shared_.range = {block, begin, smaller(begin + shared_.cut.quantum, total)};
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
      : schedule_(schedule), shared_(schedule.shared()), tickets_(tickets) {
    int begun = 0;  // items that begin where the block's range does, or before
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < shared_.num_cut; i += 32) {
      begun += shared_.starts[i] <= shared_.range.begin;
    }
    cut_item_ = shared_.range.begin < shared_.range.end ? warp_sum(begun) - 1 : shared_.num_cut;
  }

  // Into shared memory, where others see it behind a barrier.
  __device__ void next(PrefillSegment &segment) {
    const WorkCut<Shape> &cut = shared_.cut;
    while (granules_.begin >= granules_.end) {
      if (!next_item()) {
        if (threadIdx.x == 0) segment.valid = false;
        return;
      }
    }
    const int granule = granules_.begin, step = cut.deterministic ? 1 : granules_.end - granule;
    granules_.begin += step;
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
    Range tiles = tiles_of(item, cut, {granule, granule + step});
    if (tiles.begin == tiles.end) ++tiles.end;  // an item without keys gets a tile that nobody sees
    if (threadIdx.x == 0) {
      segment.valid = true;
      segment.tiles = tiles;
      segment.plan = plan;
    }
    copy_item(segment.item, item);
  }

 private:
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
