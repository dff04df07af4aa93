// How the attention of a ragged batch is divided among persistent blocks, on the device, from the lengths alone.
//
// SPDX-License-Identifier: Apache-2.0
//
// A work item is one tile of packed query rows (row r is query token r / group, head r % group) of one KV head of one
// sequence.  Items are laid end to end, tiles within heads within sequences, on a line of cost units: one unit for each
// KV tile that the item's rows see (or for two, four ... tiles, where the line would outgrow 31 bits), and
// TileShape::kItemOverhead for loading queries and writing results.  The line is cut into equal ranges, one a block
// ("stream-K"), wherever the cuts fall: a long sequence is spread over the whole GPU, a skewed batch is balanced, and a
// block holds at most two unfinished results, of its first item and of its last.
//
// With deterministic results, which bits an item gets must not depend on where its neighbours put the cuts.  Then items
// are made of pieces of a length that the item alone decides, a block does the pieces that begin in its range, and each
// piece is a partial result of its own.
//
// Some kernels have a line for each KV head or two instead, divided by some of the blocks each (head_lines.cuh).
//
// Neighbouring KV heads of a sequence of few rows may make one item, of as many times the cost, whose tile has rows for
// each: their keys lie side by side in memory, which reads them faster together.  Unless the kernel can do no other,
// not so where too many blocks would share the item, since one of them joins all its partial results; and never with
// deterministic results.
//
// What becomes one partial result is a segment of its item: a block's share, or a piece.  Its place in the workspace
// follows from the item and the segment's number, so whoever merges knows where to look without being told.
#pragma once

#include <cstdint>
#include <type_traits>

#include "head_lines.cuh"
#include "work_items.cuh"

namespace pagedattn::cuda {

// The cuts of the line into a range for each block, and which segments of an item they make.
//
// An item's tiles are cut between granules only, and a granule belongs to the range in which it begins.  An item
// without keys has one empty granule.  Ranges are at least a granule long, so every range between an item's first and
// last owner holds one or more of its granules, and together they are one segment.  In deterministic mode each granule
// is a segment.
template <class Shape>
struct WorkCut {
  int quantum;             // length of a range
  int most_of_many_heads;  // cost of an item of several KV heads,
  int most_tiles_of_many;  // its tiles,
  int max_head_shift;      // and log 2 of its heads
  int unit_shift;
  bool deterministic;

  // Of a line that has so many heads, or all.
  __host__ __device__ static WorkCut of(const Batch &batch, int total, int num_blocks, int heads = kMaxUnits) {
    const int least = units_of(batch, Shape::kMinSegmentTiles) << Shape::kLeastHeadShift;
    const int quantum = larger(ceil_divide(total, num_blocks), least);
    const bool is_pair = heads == 2 && heads < batch.num_kv_heads;
    return {quantum,
            quantum > kMaxUnits / kMostSharers ? kMaxUnits : quantum * kMostSharers,
            is_pair ? kMaxUnits : Shape::kMaxTilesOfMany,
            heads <= 2 ? smaller(heads - 1, batch.max_head_shift) : batch.max_head_shift,
            batch.unit_shift,
            batch.deterministic};
  }

  __host__ __device__ int owner(int position) const {
    return static_cast<int>(static_cast<uint32_t>(position) / static_cast<uint32_t>(quantum));
  }

  // Tiles.  A constant for all items but in deterministic mode.
  __host__ __device__ int granule(const WorkItem &item) const {
    if (!deterministic) [[likely]]
      return Shape::kMinSegmentTiles;
    return larger(ceil_divide(item.num_kv_tiles(), Shape::kMaxPieces), Shape::kMinPieceTiles);
  }
  __host__ __device__ int granules_in(const WorkItem &item, int tiles) const {  // the common divisor a constant
    if (!deterministic) [[likely]]
      return ceil_divide(tiles, Shape::kMinSegmentTiles);
    return ceil_divide(tiles, granule(item));
  }
  __host__ __device__ int num_granules(const WorkItem &item) const {
    return item.num_kv_tiles() == 0 ? 1 : granules_in(item, item.num_kv_tiles());
  }
  __host__ __device__ int granule_start(const WorkItem &item, int index) const {
    return item.start + (index * granule(item) >> unit_shift << item.head_shift);
  }
  // The item's first granule that begins at a position or behind it.
  __host__ __device__ int first_granule_from(const WorkItem &item, int position) const {
    if (position <= item.start) return 0;
    const int offset = (position - item.start + (1 << item.head_shift) - 1) >> item.head_shift;  // of each head
    if (offset > item.num_kv_tiles() >> unit_shift) return num_granules(item);
    return granules_in(item, offset << unit_shift);
  }

  // Where partial results lie.  Those of an item that several blocks share follow each other from two places a block
  // on: the next such item begins in the block that ends this one, or behind it.  In deterministic mode a block has a
  // place for each piece of the item that it leaves unfinished, and as many for items of several pieces that are all
  // its own, which it finishes one after the other while other blocks may already have done their part of the
  // unfinished one.
  __host__ __device__ static int places_per_block(bool deterministic) {
    return deterministic ? 2 * Shape::kMaxPieces : 2;
  }
};

// Of a sequence's KV heads, log 2 of how many make an item.
template <class Shape>
__host__ __device__ int head_shift(const Batch &batch, const WorkCut<Shape> &cut, const Sequence &seq, int kv_tiles) {
  if constexpr (Shape::kMaxHeadShift == Shape::kLeastHeadShift) return Shape::kMaxHeadShift;
  const int rows_shift = head_rows_shift(num_rows(batch, seq)), cost = cost_of<Shape>(batch, kv_tiles);
  if (kv_tiles > cut.most_tiles_of_many) return 0;
  const auto fits = [&](int shift) {
    return shift <= cut.max_head_shift && Shape::kRows >> shift >> rows_shift != 0 &&
           cost << shift <= cut.most_of_many_heads && units_of(batch, Shape::kMinSegmentTiles) << shift <= cut.quantum;
  };
  static_assert(Shape::kMaxHeadShift <= 2);
  return fits(1) + fits(2);  // what fits twice fits once
}

// The item of a sequence's first KV head, were it at the line's start.
template <class Shape>
__host__ __device__ WorkItem make_item(const Batch &batch, const WorkCut<Shape> &cut, const Sequence &seq, int tile) {
  const Range keys = tile_keys<Shape>(batch, seq, tile), tiles = kv_tiles<Shape>(keys);
  return {seq, 0, head_shift(batch, cut, seq, tiles.end - tiles.begin), tile, keys, tiles, 0};
}

// A block's range of its line.
struct LineRange {
  int block;  // of the line
  int begin;
  int end;
  int first_block = 0;  // of the line, see HeadLine
};

// Some of an item's granules, which together are one segment.
template <class Shape>
__host__ __device__ Range granules_of(const WorkItem &item, const WorkCut<Shape> &cut, const LineRange &range) {
  return {cut.first_granule_from(item, range.begin), cut.first_granule_from(item, range.end)};
}
template <class Shape>
__host__ __device__ Range tiles_of(const WorkItem &item, const WorkCut<Shape> &cut, Range granules) {
  const int granule = cut.granule(item), tiles = item.num_kv_tiles();
  return {item.kv_tiles.begin + smaller(granules.begin * granule, tiles),
          item.kv_tiles.begin + smaller(granules.end * granule, tiles)};
}

// What becomes of a segment's result.
struct SegmentPlan {
  int segment;
  int num_segments;  // of the item
  bool is_shared;    // with other blocks
  int first_owner;   // of the item; the arrivals of shared items are counted there
  int first_place;   // of its partial results
};

// Of the segment of an item that holds a granule in this range.  Most items begin and end in one range and cost no
// division.
template <class Shape>
__host__ __device__ SegmentPlan plan_of(const WorkItem &item, const WorkCut<Shape> &cut, const LineRange &range,
                                        int granule) {
  const int granules = cut.num_granules(item), last_granule = cut.granule_start(item, granules - 1);
  const auto owner = [&](int position) {
    return position >= range.begin && position < range.end ? range.block : cut.owner(position);
  };
  const int first = owner(item.start), last = owner(last_granule);
  const int first_owner = range.first_block + first;
  if (!cut.deterministic) return {range.block - first, last - first + 1, last != first, first_owner, 2 * first_owner};
  const int place = first_owner * 2 * Shape::kMaxPieces + (last != first ? 0 : Shape::kMaxPieces);
  return {granule, granules, last != first, first_owner, place};
}

#ifdef __CUDACC__

constexpr uint32_t kFullWarp = 0xffffffffu;

template <class T>
__device__ T warp_sum(T x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <class T>
__device__ T warp_inclusive_scan(T x, int lane) {
  for (int offset = 1; offset < 32; offset *= 2) {
    const T other = __shfl_up_sync(kFullWarp, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

// Walks the items of a block's range.
template <class Shape, int kThreads>
class WorkCursor {
  static constexpr int kWarps = kThreads / 32;
  static constexpr bool kOneTile = Shape::kOneTile;
  static_assert(kWarps > 1, "one for each end of the range");
  // Query starts that make no sense may give the same tokens to many sequences, and these a line that outgrows 31 bits.
  using Sum = std::conditional_t<kOneTile, int, int64_t>;

 public:
  struct Shared {
    WorkCut<Shape> cut;
    HeadLine line;     // the block's,
    LineRange range;   // and its range
    WorkItem ends[2];  // the items that the range, if it is not empty, begins and ends in
    int warp_totals[kWarps];
    int warp_clipped[kWarps];
  };

  __device__ WorkCursor(const Batch &batch, Shared &shared) : batch_(batch), shared_(shared) {}

  // Measures the line, and finds the block's range and the items at its ends.  Called by the whole block, which may
  // look at these behind its next barrier.
  //
  // It all takes as long as a warp's way through these instructions, mostly for the first time, while memory is idle.
  // So a lane whose sequence an end lies in knows it already, and finds the item.  Few sequences are measured by two
  // warps, which need not wait for each other, and look for an end each.
  __device__ void begin() {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const bool many = batch_.num_seqs > 32;
    if (!many && warp > 1) return;
    const int chunk = many ? ceil_divide(batch_.num_seqs, 32 * kWarps) * 32 : 32;  // sequences a warp
    const int first = many ? warp * chunk : 0;
    Lanes lanes;
    Sum length = 0, before = 0;
    int clipped = 0;
#pragma unroll 1
    for (int k = 0; k < chunk; k += 32) {
      lanes = measure(first + k);
      length += lanes.total();
      if constexpr (Shape::kHeadsInStep) clipped += clip_cost<Shape>(batch_, lanes.cost);
    }
    if constexpr (Shape::kHeadsInStep) clipped = warp_sum(clipped);
    if (many) {
      if (lane == 0) {
        shared_.warp_totals[warp] = static_cast<int>(length < kMaxUnits ? length : kMaxUnits);
        shared_.warp_clipped[warp] = clipped;
      }
      __syncthreads();
      length = clipped = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp) before = length;
        length += shared_.warp_totals[w];
        if constexpr (Shape::kHeadsInStep) clipped += shared_.warp_clipped[w];
      }
    }
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    auto line = HeadLine::of_all(batch_, block, blocks);
    if (!is_one_line<Shape>(batch_, blocks)) {  // few sequences go past it in one jump
      line = HeadLine::of(batch_, heads_by_lengths<Shape>(batch_, {length, clipped}, blocks), block, blocks);
    }
    const int heads = line.heads;
    length *= heads;
    before *= heads;
    const int total = length < kMaxUnits ? static_cast<int>(length) : 0;  // nothing, rather than anything
    const auto cut = WorkCut<Shape>::of(batch_, total, line.num_columns, heads);
    const int start = line.column * cut.quantum;  // less than 2^31, as the line is
    const LineRange range{line.column, start, smaller(start + cut.quantum, total), line.first_block};
    if (threadIdx.x == 0) {
      shared_.cut = cut;
      shared_.line = line;
      shared_.range = range;
    }
    if (range.begin >= range.end) return;
#pragma unroll 1
    for (int end = many ? 0 : warp; end < (many ? 2 : warp + 1); ++end) {
      const int target = end == 0 ? range.begin : range.end - 1;
      int offset = target - static_cast<int>(before);
      if (many && (offset < 0 || offset >= shared_.warp_totals[warp] * heads)) continue;
#pragma unroll 1
      for (int k = 0; chunk > 32; k += 32) {
        lanes = measure(first + k);
        if (offset < lanes.total() * heads) break;
        offset -= static_cast<int>(lanes.total()) * heads;
      }
      find_item(lanes, offset, target, cut, line, shared_.ends[end]);
    }
  }

  __device__ const WorkCut<Shape> &cut() const { return shared_.cut; }
  __device__ const LineRange &range() const { return shared_.range; }

  // The rest is for the first warp.  Its lanes are given and get the same values.

  // The item that the range, if it is not empty, begins or ends in.
  __device__ const WorkItem &item_at(bool end) const { return shared_.ends[end]; }

  __device__ int end_of(const WorkItem &item) const {
    return item.start + (cost_of<Shape>(batch_, item.num_kv_tiles()) << item.head_shift);
  }

  // The next item of the range; false if there is none.
  __device__ bool next(WorkItem &item) const {
    const int start = end_of(item);
    if (start >= shared_.range.end) return false;
    Sequence seq = item.seq;
    int kv_head = item.kv_head, tile = item.query_tile + 1;
    if (kOneTile || tile == num_query_tiles<Shape>(batch_, seq)) {
      tile = 0;
      kv_head += 1 << item.head_shift;
      if (kv_head == shared_.line.first_head + shared_.line.heads) {
        kv_head = shared_.line.first_head;
        if (!find_next_sequence(seq)) return false;
      }
    }
    if (!kOneTile || kv_head == shared_.line.first_head) item = make_item(batch_, shared_.cut, seq, tile);
    item.kv_head = kv_head;
    item.start = start;
    return true;
  }

 private:
  // Sequences that follow each other, one a lane.
  struct Lanes {
    Sequence seq;
    Sum cost;  // of a head
    Sum end;   // of the costs up to this lane's

    __device__ Sum total() const { return __shfl_sync(kFullWarp, end, 31); }
  };
  __device__ Lanes measure(int first) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Lanes lanes{load_or_none(first + lane), 0, 0};
    lanes.cost = static_cast<Sum>(head_cost(lanes.seq));
    lanes.end = warp_inclusive_scan(lanes.cost, lane);
    return lanes;
  }
  __device__ Sequence load_or_none(int index) const {
    return index < batch_.num_seqs ? load_sequence(batch_, index) : Sequence{0, 0, 0, 0};
  }

  // The item at `offset` units from the start of the first of these sequences, `target` from the line's.
  __device__ void find_item(const Lanes &lanes, int offset, int target, const WorkCut<Shape> &cut, const HeadLine &line,
                            WorkItem &found) const {
    const int begin = static_cast<int>(lanes.end - lanes.cost) * line.heads;
    const bool mine = begin <= offset && offset < lanes.end * line.heads;
    if constexpr (kOneTile) {
      if (!mine) return;
      WorkItem item = make_item(batch_, cut, lanes.seq, 0);
      const int cost = cost_of<Shape>(batch_, item.num_kv_tiles()), head = head_at(offset - begin, cost);
      const int first = head >> item.head_shift << item.head_shift;
      item.kv_head = line.first_head + first;
      item.start = target - offset + begin + first * cost;
      found = item;
    } else {
      const int source = __ffs(static_cast<int>(__ballot_sync(kFullWarp, mine))) - 1;
      const Sequence seq = of_lane(lanes.seq, source);
      const int seq_start = target - offset + __shfl_sync(kFullWarp, begin, source);
      const int cost = warp_head_cost(seq), kv_head = head_at(target - seq_start, cost);
      int start = seq_start + kv_head * cost;
      WorkItem item = make_item(batch_, cut, seq, find_tile(target, seq, start));
      item.kv_head = line.first_head + kv_head;
      item.start = start;
      if (threadIdx.x % 32 == 0) found = item;
    }
  }

  // Cost of one KV head of each lane's sequence.  Lanes work alone while tiles are few; a sequence of many is summed by
  // the whole warp.
  __device__ int head_cost(const Sequence &seq) const {
    const int tiles = num_query_tiles<Shape>(batch_, seq);
    int cost = tiles == 1 ? tile_cost<Shape>(batch_, seq, 0) : 0;
    if constexpr (!kOneTile) {
      for (uint32_t tall = __ballot_sync(kFullWarp, tiles > 1); tall != 0; tall &= tall - 1) {
        const int source = __ffs(static_cast<int>(tall)) - 1;
        const int sum = warp_head_cost(of_lane(seq, source));
        if (static_cast<int>(threadIdx.x) % 32 == source) cost = sum;
      }
    }
    return cost;
  }

  __device__ static Sequence of_lane(const Sequence &seq, int lane) {
    return {__shfl_sync(kFullWarp, seq.index, lane), __shfl_sync(kFullWarp, seq.first_token, lane),
            __shfl_sync(kFullWarp, seq.num_queries, lane), __shfl_sync(kFullWarp, seq.length, lane)};
  }

  __device__ int warp_head_cost(const Sequence &seq) const {
    const int tiles = num_query_tiles<Shape>(batch_, seq);
    int cost = 0;
    for (int tile = static_cast<int>(threadIdx.x) % 32; tile < tiles; tile += 32) {
      cost += tile_cost<Shape>(batch_, seq, tile);
    }
    return warp_sum(cost);
  }

  // The KV head at so many units from its sequence's start.
  __device__ static int head_at(int offset, int cost) {
    return static_cast<int>(static_cast<uint32_t>(offset) / static_cast<uint32_t>(cost));
  }

  // The tile of a head that the position lies in, and where it starts, given where the head does.
  __device__ int find_tile(int target, const Sequence &seq, int &start) const {
    const int tiles = num_query_tiles<Shape>(batch_, seq), lane = static_cast<int>(threadIdx.x) % 32;
    for (int base = 0; base < tiles; base += 32) {
      const int mine = base + lane < tiles ? tile_cost<Shape>(batch_, seq, base + lane) : 0;
      const int scanned = warp_inclusive_scan(mine, lane);
      const uint32_t beyond = __ballot_sync(kFullWarp, start + scanned > target);
      if (beyond != 0) {
        const int source = __ffs(static_cast<int>(beyond)) - 1;
        start += __shfl_sync(kFullWarp, scanned - mine, source);
        return base + source;
      }
      start += __shfl_sync(kFullWarp, scanned, 31);
    }
    return 0;
  }

  // Sequences that another kernel serves, or that have no queries, are passed over 32 at a time.
  __device__ bool find_next_sequence(Sequence &seq) const {
#pragma unroll 1
    for (int base = seq.index + 1; base < batch_.num_seqs; base += 32) {
      const Sequence candidate = load_or_none(base + static_cast<int>(threadIdx.x));
      const uint32_t served = __ballot_sync(kFullWarp, num_query_tiles<Shape>(batch_, candidate) > 0);
      if (served != 0) {
        seq = of_lane(candidate, __ffs(static_cast<int>(served)) - 1);
        return true;
      }
    }
    return false;
  }

  const Batch &batch_;
  Shared &shared_;
};

// The same for a whole block, whose current item and segments lie in shared memory, where they cost no registers.
template <class Shape, int kThreads>
class BlockCursor {
  using Cursor = WorkCursor<Shape, kThreads>;

 public:
  struct Shared {
    typename Cursor::Shared cursor;
    WorkItem item;
    Range segments;
    bool valid;
  };

  __device__ BlockCursor(const Batch &batch, Shared &shared) : cursor_(batch, shared.cursor), shared_(shared) {}

  // Calls function(item, segment) for all segments of the block's range.
  template <class Function>
  __device__ void for_each_segment(Function &&function) {
    cursor_.begin();
    __syncthreads();
    for (bool first = true;; first = false) {
      if (threadIdx.x < 32) go_on(first);
      __syncthreads();
      if (!shared_.valid) return;
      for (int segment = shared_.segments.begin; segment < shared_.segments.end; ++segment) {
        function(shared_.item, segment);
      }
      __syncthreads();
    }
  }

  // Segments are counted by their first granule.
  __device__ Range tiles(int segment) const {
    return tiles_of(shared_.item, cursor_.cut(),
                    cursor_.cut().deterministic ? Range{segment, segment + 1}
                                                : granules_of(shared_.item, cursor_.cut(), cursor_.range()));
  }
  __device__ SegmentPlan plan(int segment) const {
    return plan_of(shared_.item, cursor_.cut(), cursor_.range(), segment);
  }

 private:
  __device__ void go_on(bool first) {
    WorkItem item = shared_.item;
    const LineRange &range = cursor_.range();
    const bool valid = first ? range.begin < range.end : cursor_.next(item);
    if (first && valid) item = cursor_.item_at(false);
    __syncwarp();  // every lane has read the item
    if (threadIdx.x == 0) {
      shared_.valid = valid;
      if (valid) {
        shared_.item = item;
        shared_.segments = granules_of(item, cursor_.cut(), cursor_.range());
        if (!cursor_.cut().deterministic)
          shared_.segments.end = smaller(shared_.segments.end, shared_.segments.begin + 1);
      }
    }
  }

  Cursor cursor_;
  Shared &shared_;
};

#endif  // __CUDACC__

}  // namespace pagedattn::cuda
