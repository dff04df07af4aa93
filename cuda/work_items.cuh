// The items that the attention of a ragged batch is made of: their rows, the keys that these see, and what they cost.
//
// SPDX-License-Identifier: Apache-2.0
//
// An item is one tile of packed query rows of one KV head of one sequence, or of a few KV heads side by side.  How
// items are laid on lines and divided among blocks is told in work_schedule.cuh.
#pragma once

#include <cstdint>

#include "attention_params.cuh"

namespace pagedattn::cuda {

// What TileShape::kItemOverhead is at most.
constexpr int kMostItemOverhead = 4;

// The tile of one kernel, and what may be changed in it by a struct of its own.
template <int kRows_, int kTokens_, bool kOneTile_>
struct TileShape {
  static constexpr int kRows = kRows_;         // query rows an item
  static constexpr int kTokens = kTokens_;     // keys a KV tile
  static constexpr bool kOneTile = kOneTile_;  // the rows of a sequence that the kernel serves never need more
  // Shorter segments are not worth their merge.
  static constexpr int kMinSegmentTiles = kRows <= 16 ? 2 : 4;
  // Pieces of an item in deterministic mode.  Tall tiles are many, and their partial results large.
  static constexpr int kMaxPieces = kRows <= 16 ? 8 : 4;
  static constexpr int kMinPieceTiles = 8;
  // Of an item, in units, for loading queries and writing results.
  static constexpr int kItemOverhead = 1;
  // Log 2 of an item's KV heads, which are more than the least if few blocks share it and it has at most so many KV
  // tiles; 0 unless kOneTile.
  static constexpr int kMaxHeadShift = 0;
  static constexpr int kLeastHeadShift = 0;
  static constexpr int kMaxTilesOfMany = 0;
  // Whether a KV head may have a line of its own: if sequences have from least to most tiles in the mean, or twice that
  // where a head has 9 to 32 rows, or more if that is said.  And whether two may have one, of at most 8 rows each, from
  // how many tiles on.
  static constexpr bool kHeadsInStep = false;
  static constexpr int kLeastTilesInStep = 0;
  static constexpr int kMostTilesInStep = 0;
  static constexpr bool kManyRowsInStep = false;
  static constexpr bool kPairsInStep = false;
  static constexpr int kMostTilesBeforePairs = 0;
};

// Blocks that an item of several KV heads may be shared by, about.
constexpr int kMostSharers = 4;
// The line is shorter than this, so that a sum of two positions has 31 bits.
constexpr int kMaxUnits = 1 << 30;

// Of numbers that are not negative.
__host__ __device__ inline int ceil_divide(int a, int b) {
  return static_cast<int>((static_cast<uint32_t>(a) + static_cast<uint32_t>(b) - 1) / static_cast<uint32_t>(b));
}
__host__ __device__ inline int clamp_to(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

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
  return rows < batch.min_rows || rows > batch.max_rows ? 0 : ceil_divide(rows, Shape::kRows);
}

// The keys that any row of a query tile sees.
template <class Shape>
__host__ __device__ Range tile_keys(const Batch &batch, const Sequence &seq, int tile) {
  if constexpr (Shape::kOneTile) return {visible_keys(batch, seq, 0).begin, seq.length};  // the last row sees the last
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

// Units of so many KV tiles.
__host__ __device__ inline int units_of(const Batch &batch, int tiles) {
  return static_cast<int>((static_cast<uint32_t>(tiles) + (1u << batch.unit_shift) - 1) >> batch.unit_shift);
}

// Of each head of an item of so many KV tiles.
template <class Shape>
__host__ __device__ int cost_of(const Batch &batch, int kv_tiles) {
  static_assert(Shape::kItemOverhead <= kMostItemOverhead);
  return units_of(batch, kv_tiles) + Shape::kItemOverhead;
}

template <class Shape>
__host__ __device__ int tile_cost(const Batch &batch, const Sequence &seq, int tile) {
  const Range tiles = kv_tiles<Shape>(tile_keys<Shape>(batch, seq, tile));
  return cost_of<Shape>(batch, tiles.end - tiles.begin);
}

struct WorkItem {
  Sequence seq;
  int kv_head;  // the first of 2^head_shift
  int head_shift;
  int query_tile;
  Range keys;      // that any of its rows sees
  Range kv_tiles;  // that hold them
  int start;       // on the line of cost units

  __host__ __device__ int num_kv_tiles() const { return kv_tiles.end - kv_tiles.begin; }
};

// Of a sequence of this many rows a KV head, log 2 of the rows of a tile that each KV head has: tiles of 16 rows that
// hold them, one, two or four.
__host__ __device__ inline int head_rows_shift(int rows) { return rows <= 16 ? 4 : rows <= 32 ? 5 : 6; }

// Of a tile, which of the item's KV heads a row belongs to, and its number among the rows of that head.
struct TileRow {
  int head;
  int row;
};
template <class Shape>
__host__ __device__ TileRow tile_row(const Batch &batch, const WorkItem &item, int row) {
  if constexpr (Shape::kMaxHeadShift == 0) return {0, row};
  const int shift = head_rows_shift(num_rows(batch, item.seq));
  return {row >> shift, row & ((1 << shift) - 1)};
}

}  // namespace pagedattn::cuda
