// How the attention of a ragged batch is divided among persistent blocks, on the device, from the lengths alone.
//
// SPDX-License-Identifier: Apache-2.0
//
// A work item is one tile of packed query rows (row r is query token r / group, head r % group) of one KV head of one
// sequence.  Items are laid end to end, tiles within heads within sequences, on a line of cost units: one unit for each
// KV tile that the item's rows see, and kItemOverhead for loading queries and writing results.  The line is cut into
// equal ranges, one a block ("stream-K"), wherever the cuts fall: a long sequence is spread over the whole GPU, a
// skewed batch is balanced, and a block holds at most two unfinished results, of its first item and of its last.
//
// With deterministic results, which bits an item gets must not depend on where its neighbours put the cuts.  Then items
// are made of pieces of a length that the item alone decides, a block does the pieces that begin in its range, and each
// piece is a partial result of its own.
//
// What becomes one partial result is a segment of its item: a block's share, or a piece.  Its place in the workspace
// follows from the item and the segment's number, so whoever merges knows where to look without being told.
#pragma once

#include <cstdint>

#include "attention_params.cuh"

namespace pagedattn::cuda {

// The tile of one kernel and the rows a KV head of the sequences that it serves.
template <int kRows_, int kTokens_, int kMinSequenceRows_, int kMaxSequenceRows_>
struct TileShape {
  static constexpr int kRows = kRows_;      // query rows an item
  static constexpr int kTokens = kTokens_;  // keys a KV tile
  static constexpr int kMinSequenceRows = kMinSequenceRows_;
  static constexpr int kMaxSequenceRows = kMaxSequenceRows_;
  // Shorter segments are not worth their merge.
  static constexpr int kMinSegmentTiles = kRows <= 16 ? 2 : 4;
  // Pieces of an item in deterministic mode.  Tall tiles are many, and their partial results large.
  static constexpr int kMaxPieces = kRows <= 16 ? 8 : 4;
  static constexpr int kDeterministicPlaces = 2 * kMaxPieces;  // a block
  static constexpr int kMinPieceTiles = 8;
};

constexpr int kItemOverhead = 1;

// Of numbers that are not negative.
__host__ __device__ inline int ceil_divide(int a, int b) {
  return static_cast<int>((static_cast<uint32_t>(a) + static_cast<uint32_t>(b) - 1) / static_cast<uint32_t>(b));
}
__host__ __device__ inline int clamp_to(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
__host__ __device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Of numbers that are not negative; in 32 bits where they suffice, as nearly always.  A 64-bit division takes five
// times as long, and its many instructions, in place, would have to be fetched by every kernel.
#ifdef __CUDA_ARCH__
static __device__ __noinline__ int64_t divide_in_64_bits(int64_t a, int64_t b) { return a / b; }
#else
inline int64_t divide_in_64_bits(int64_t a, int64_t b) { return a / b; }
#endif
__host__ __device__ inline int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return divide_in_64_bits(a, b);
}

struct Range {
  int begin;
  int end;
};

struct Sequence {
  int index;
  int first_token;  // of its queries in q
  int num_queries;
  int length;
};

// Lengths are read unchecked: whatever they hold, tokens stay in 0 ... T and keys within the block table.
__host__ __device__ inline Sequence load_sequence(const Batch &batch, int index) {
  Sequence seq{index, index, 1, clamp_to(batch.seq_lens[index], 0, batch.max_length)};
  if (batch.query_start_loc != nullptr) {
    seq.first_token = clamp_to(batch.query_start_loc[index], 0, batch.num_tokens);
    seq.num_queries = clamp_to(batch.query_start_loc[index + 1], seq.first_token, batch.num_tokens) - seq.first_token;
  }
  return seq;
}

// The keys that a query token sees.  Both ends grow with the token.
__host__ __device__ inline Range visible_keys(const Batch &batch, const Sequence &seq, int query) {
  int end = seq.length;
  if (batch.causal) end = clamp_to(seq.length - seq.num_queries + query + 1, 0, seq.length);
  return {batch.window > 0 && end > batch.window ? end - batch.window : 0, end};
}

__host__ __device__ inline int num_rows(const Batch &batch, const Sequence &seq) {
  return seq.num_queries * static_cast<int>(batch.group.divisor);
}

template <class Shape>
__host__ __device__ int num_query_tiles(const Batch &batch, const Sequence &seq) {
  const int rows = num_rows(batch, seq);
  return rows < Shape::kMinSequenceRows || rows > Shape::kMaxSequenceRows ? 0 : ceil_divide(rows, Shape::kRows);
}

// The keys that any row of a query tile sees.
template <class Shape>
__host__ __device__ Range tile_keys(const Batch &batch, const Sequence &seq, int tile) {
  const int first_row = tile * Shape::kRows;
  const int rows = num_rows(batch, seq);
  const int last_row = (rows - first_row > Shape::kRows ? first_row + Shape::kRows : rows) - 1;
  return {visible_keys(batch, seq, batch.group.divide(first_row)).begin,
          visible_keys(batch, seq, batch.group.divide(last_row)).end};
}

template <class Shape>
__host__ __device__ Range kv_tiles(Range keys) {
  if (keys.end <= keys.begin) return {0, 0};
  return {keys.begin / Shape::kTokens, (keys.end - 1) / Shape::kTokens + 1};
}

template <class Shape>
__host__ __device__ int tile_cost(const Batch &batch, const Sequence &seq, int tile) {
  const Range tiles = kv_tiles<Shape>(tile_keys<Shape>(batch, seq, tile));
  return tiles.end - tiles.begin + kItemOverhead;
}

struct WorkItem {
  Sequence seq;
  int kv_head;
  int query_tile;
  Range keys;      // that any of its rows sees
  Range kv_tiles;  // that hold them
  int64_t start;   // on the line of cost units

  __host__ __device__ int num_kv_tiles() const { return kv_tiles.end - kv_tiles.begin; }
};

template <class Shape>
__host__ __device__ WorkItem make_item(const Batch &batch, const Sequence &seq, int kv_head, int tile, int64_t start) {
  const Range keys = tile_keys<Shape>(batch, seq, tile);
  return {seq, kv_head, tile, keys, kv_tiles<Shape>(keys), start};
}

// The cuts of the line, and which segments of an item they make.
//
// An item's tiles are cut between granules only, and a granule belongs to the block in whose range it begins.  An item
// without keys has one empty granule.  Where a range is at least a granule long, every block between an item's first
// and last owner holds one or more of its granules and together they are one segment; where it is shorter, and in
// deterministic mode, each granule is a segment.
template <class Shape>
struct WorkCut {
  int64_t quantum;  // cost units a block
  bool deterministic;

  __host__ __device__ static WorkCut of(int64_t total, int num_blocks, bool deterministic) {
    return {larger(divide(total + num_blocks - 1, num_blocks), 1), deterministic};
  }

  __host__ __device__ int owner(int64_t position) const { return static_cast<int>(divide(position, quantum)); }
  __host__ __device__ int first_owner(const WorkItem &item) const { return owner(item.start); }

  // Tiles.  A constant for all items but in deterministic mode.
  __host__ __device__ int granule(const WorkItem &item) const {
    if (!deterministic) return Shape::kMinSegmentTiles;
    const int shortest = ceil_divide(item.num_kv_tiles(), Shape::kMaxPieces);
    return shortest > Shape::kMinPieceTiles ? shortest : Shape::kMinPieceTiles;
  }
  __host__ __device__ int granules_in(const WorkItem &item, int tiles) const {
    return deterministic ? ceil_divide(tiles, granule(item)) : ceil_divide(tiles, Shape::kMinSegmentTiles);
  }
  __host__ __device__ int num_granules(const WorkItem &item) const {
    return item.num_kv_tiles() == 0 ? 1 : granules_in(item, item.num_kv_tiles());
  }
  __host__ __device__ bool granules_are_segments(const WorkItem &item) const {
    return deterministic || quantum < granule(item);
  }
  __host__ __device__ int64_t granule_start(const WorkItem &item, int index) const {
    return item.start + static_cast<int64_t>(index) * granule(item);
  }
  // The item's first granule that begins at a position or behind it.
  __host__ __device__ int first_granule_from(const WorkItem &item, int64_t position) const {
    const int64_t offset = position - item.start;
    if (offset > item.num_kv_tiles()) return num_granules(item);
    return offset <= 0 ? 0 : granules_in(item, static_cast<int>(offset));
  }

  __host__ __device__ int num_segments(const WorkItem &item) const {
    const int granules = num_granules(item);
    return granules_are_segments(item) ? granules : owner(granule_start(item, granules - 1)) - first_owner(item) + 1;
  }

  // The segments of the item that a block does, perhaps none.
  __host__ __device__ Range segments_of(const WorkItem &item, int block) const {
    if (granules_are_segments(item)) {
      return {first_granule_from(item, block * quantum), first_granule_from(item, (block + 1) * quantum)};
    }
    const int segment = block - first_owner(item);
    return {segment, segment < num_segments(item) ? segment + 1 : segment};
  }

  __host__ __device__ Range tiles_of(const WorkItem &item, int segment) const {
    Range granules{segment, segment + 1};
    if (!granules_are_segments(item)) {
      const int64_t block = first_owner(item) + segment;
      granules = {first_granule_from(item, block * quantum), first_granule_from(item, (block + 1) * quantum)};
    }
    const int64_t tiles = item.num_kv_tiles(), length = granule(item);
    return {item.kv_tiles.begin + static_cast<int>(smaller(granules.begin * length, tiles)),
            item.kv_tiles.begin + static_cast<int>(smaller(granules.end * length, tiles))};
  }

  // Is the item shared with other blocks?
  __host__ __device__ bool is_shared(const WorkItem &item) const {
    return owner(granule_start(item, num_granules(item) - 1)) != first_owner(item);
  }

  // Where partial results lie.  A block has one place for a segment of the item that it found begun and one for the
  // item that it leaves unfinished.  In deterministic mode it has one for each piece of the item that it leaves
  // unfinished, and as many for items of several pieces that are all its own, which it finishes one after the other
  // while other blocks may already have done their part of the unfinished one.
  __host__ __device__ static int places_per_block(bool deterministic) {
    return deterministic ? Shape::kDeterministicPlaces : 2;
  }
  struct Places {
    int64_t first;
    int64_t item_start;
    int64_t quantum;
    int stride;  // places from one segment to the next; 0: the segments are granules of several blocks

    __host__ __device__ int64_t of(int segment) const {
      if (stride == 1) return first + segment;
      const int64_t granule = item_start + static_cast<int64_t>(segment) * Shape::kMinSegmentTiles;
      return (stride == 2 ? first + 2 * segment : 2 * divide(granule, quantum)) + (segment == 0 ? 1 : 0);
    }
  };
  __host__ __device__ Places places(const WorkItem &item) const {
    const int64_t first = first_owner(item);
    if (deterministic) {
      return {first * Shape::kDeterministicPlaces + (is_shared(item) ? 0 : Shape::kMaxPieces), 0, quantum, 1};
    }
    return {2 * first, item.start, quantum, granules_are_segments(item) ? 0 : 2};
  }
};

#ifdef __CUDACC__

constexpr uint32_t kFullWarp = 0xffffffffu;

template <class T>
__device__ T warp_sum(T x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
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

// Walks a block's items.  The current item lies in shared memory, where it costs no registers.  Every function is
// called by the whole block.
template <class Shape, int kThreads>
class WorkCursor {
  static constexpr int kWarps = kThreads / 32;

 public:
  struct Shared {
    WorkItem item;
    WorkCut<Shape> cut;
    Range segments;  // of the item, the block's
    int64_t end;     // of the block's range
    bool valid;
    int64_t warp_totals[kWarps];
    int64_t sequence_start;
    int sequence;
  };

  __device__ WorkCursor(const Batch &batch, Shared &shared) : batch_(batch), shared_(shared) {}

  // Finds the block's range and its first item.
  __device__ void seek_first_item() {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int per_thread = ceil_divide(batch_.num_seqs, kThreads);
    const int first = static_cast<int>(threadIdx.x) * per_thread;

    int64_t cost = 0;
    for (int k = 0; k < per_thread; ++k) cost += head_cost(first + k);
    cost *= batch_.num_kv_heads;
    const int64_t scanned = warp_inclusive_scan(cost, lane);
    if (lane == 31) shared_.warp_totals[warp] = scanned;
    __syncthreads();
    int64_t before = scanned - cost, total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += shared_.warp_totals[w];
      total += shared_.warp_totals[w];
    }

    const auto cut = WorkCut<Shape>::of(total, static_cast<int>(gridDim.x), batch_.deterministic);
    const int64_t begin = blockIdx.x * cut.quantum;
    const bool holds_begin = before <= begin && begin < before + cost;
    if (__any_sync(kFullWarp, holds_begin)) {
      for (int k = 0; k < per_thread; ++k) {
        const int64_t sequence_cost = head_cost(first + k) * batch_.num_kv_heads;
        if (before <= begin && begin < before + sequence_cost) {
          shared_.sequence = first + k;
          shared_.sequence_start = before;
        }
        before += sequence_cost;
      }
    }
    if (threadIdx.x == 0) {
      shared_.cut = cut;
      shared_.end = smaller(begin + cut.quantum, total);
      shared_.valid = begin < total;
    }
    __syncthreads();
    if (warp == 0 && shared_.valid) seek_tile(shared_.sequence, shared_.sequence_start, begin);
    __syncthreads();
  }

  __device__ bool valid() const { return shared_.valid; }
  __device__ const WorkCut<Shape> &cut() const { return shared_.cut; }
  __device__ const WorkItem &item() const { return shared_.item; }
  __device__ Range segments() const { return shared_.segments; }

  // To be called behind a barrier after the last use of the item.
  __device__ void advance() {
    if (threadIdx.x < 32) seek_next_item();
    __syncthreads();
  }

 private:
  // Cost of one KV head of each lane's sequence.  Lanes work alone while tiles are few; a sequence of many is summed by
  // the whole warp.
  __device__ int64_t head_cost(int index) const {
    Sequence seq{0, 0, 0, 0};
    if (index < batch_.num_seqs) seq = load_sequence(batch_, index);
    const int tiles = num_query_tiles<Shape>(batch_, seq);
    int64_t cost = tiles == 1 ? tile_cost<Shape>(batch_, seq, 0) : 0;
    if constexpr (Shape::kMaxSequenceRows > Shape::kRows) {
      for (uint32_t tall = __ballot_sync(kFullWarp, tiles > 1); tall != 0; tall &= tall - 1) {
        const int source = __ffs(static_cast<int>(tall)) - 1;
        const Sequence warp_seq{0, 0, __shfl_sync(kFullWarp, seq.num_queries, source),
                                __shfl_sync(kFullWarp, seq.length, source)};
        const int64_t sum = warp_head_cost(warp_seq);
        if (static_cast<int>(threadIdx.x) % 32 == source) cost = sum;
      }
    }
    return cost;
  }

  __device__ int64_t warp_head_cost(const Sequence &seq) const {
    const int tiles = num_query_tiles<Shape>(batch_, seq);
    int64_t cost = 0;
    for (int tile = static_cast<int>(threadIdx.x) % 32; tile < tiles; tile += 32) {
      cost += tile_cost<Shape>(batch_, seq, tile);
    }
    return warp_sum(cost);
  }

  // The rest is done by the first warp; its lanes hold the same values.

  __device__ void publish(const WorkItem &item) {
    __syncwarp();  // every lane has read the previous item
    if (threadIdx.x == 0) {
      shared_.item = item;
      shared_.segments = shared_.cut.segments_of(item, static_cast<int>(blockIdx.x));
    }
  }

  // The item of a sequence that a position lies in.
  __device__ void seek_tile(int sequence, int64_t sequence_start, int64_t target) {
    const int lane = static_cast<int>(threadIdx.x);
    const Sequence seq = load_sequence(batch_, sequence);
    const int tiles = num_query_tiles<Shape>(batch_, seq);
    const int64_t cost = warp_head_cost(seq);
    const int kv_head = static_cast<int>(divide(target - sequence_start, cost));
    int64_t start = sequence_start + kv_head * cost;
    for (int base = 0; base < tiles; base += 32) {
      const int tile = base + lane;
      const int64_t mine = tile < tiles ? tile_cost<Shape>(batch_, seq, tile) : 0;
      const int64_t scanned = warp_inclusive_scan(mine, lane);
      const uint32_t beyond = __ballot_sync(kFullWarp, start + scanned > target);
      if (beyond != 0) {
        const int source = __ffs(static_cast<int>(beyond)) - 1;
        start += __shfl_sync(kFullWarp, scanned - mine, source);
        publish(make_item<Shape>(batch_, seq, kv_head, base + source, start));
        return;
      }
      start += __shfl_sync(kFullWarp, scanned, 31);
    }
  }

  __device__ void seek_next_item() {
    Sequence seq = shared_.item.seq;
    int kv_head = shared_.item.kv_head, tile = shared_.item.query_tile + 1;
    const int64_t start = shared_.item.start + shared_.item.num_kv_tiles() + kItemOverhead;
    bool found = start < shared_.end;
    if (found && tile == num_query_tiles<Shape>(batch_, seq)) {
      tile = 0;
      if (++kv_head == batch_.num_kv_heads) {
        kv_head = 0;
        found = seek_next_sequence(seq);
      }
    }
    if (found) {
      publish(make_item<Shape>(batch_, seq, kv_head, tile, start));
    } else {
      __syncwarp();
      if (threadIdx.x == 0) shared_.valid = false;
    }
  }

  // Sequences that another kernel serves, or that have no queries, are passed over 32 at a time.
  __device__ bool seek_next_sequence(Sequence &seq) const {
    for (int base = seq.index + 1; base < batch_.num_seqs; base += 32) {
      const int index = base + static_cast<int>(threadIdx.x);
      Sequence candidate{0, 0, 0, 0};
      if (index < batch_.num_seqs) candidate = load_sequence(batch_, index);
      const uint32_t served = __ballot_sync(kFullWarp, num_query_tiles<Shape>(batch_, candidate) > 0);
      if (served != 0) {
        const int source = __ffs(static_cast<int>(served)) - 1;
        seq = {base + source, __shfl_sync(kFullWarp, candidate.first_token, source),
               __shfl_sync(kFullWarp, candidate.num_queries, source), __shfl_sync(kFullWarp, candidate.length, source)};
        return true;
      }
    }
    return false;
  }

  const Batch &batch_;
  Shared &shared_;
};

#endif  // __CUDACC__

}  // namespace pagedattn::cuda
