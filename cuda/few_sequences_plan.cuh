// How the attention of a few sequences is divided among blocks, found by each warp for itself.
//
// SPDX-License-Identifier: Apache-2.0
//
// The grid has columns, and in each a block for every KV head.  The sequences lie end to end on a line of KV tiles, and
// some units more each for what a sequence costs besides; the line is cut into equal ranges, one a column.  A column's
// part of a sequence is a segment, and its rank is the column's number among those of the sequence.
//
// One sequence alone is dealt out to the columns instead, some tiles at a time, so that a short one has few parts and
// the device reads a long one from its beginning to its end.
#pragma once

#include "attention_kernel.h"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

constexpr int kFewSequencesWarps = 8;  // of a block

// What a block has of a sequence: a warp's tiles are tile_of(warp) and each step()-th behind it below `end`.
struct ColumnSegment {
  WorkItem item;
  int begin;
  int deal;       // log 2 of the tiles dealt out at once,
  int deal_step;  // and from these to the next of the same column
  int end;
  int num_ranks;  // columns of the sequence,
  int rank;       // and this one's number among them

  __device__ int tile_of(int warp) const { return begin + (warp & ((1 << deal) - 1)) + (warp >> deal) * deal_step; }
  __device__ int step() const { return (kFewSequencesWarps >> deal) * deal_step; }
  __device__ bool has_tile(int warp) const { return tile_of(warp) < end; }
};

template <class Traits>
class ColumnPlan {
  using Shape = typename Traits::Shape;
  static constexpr int kDeal = Traits::kDeal;
  static constexpr int kOverhead = 28;                    // units of a sequence besides its tiles
  static constexpr int kLeastUnits = kFewSequencesWarps;  // of a range: a tile for each warp

 public:
  // `length` is that of the lane's sequence, or of the last where there is none.
  __device__ ColumnPlan(const Batch &batch, int length)
      : alone_(batch.num_seqs == 1), columns_(static_cast<int>(gridDim.x)), column_(static_cast<int>(blockIdx.x)) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    seq_ = sequence_of(batch, smaller(lane, batch.num_seqs - 1), length);
    keys_ = tile_keys<Shape>(batch, seq_, 0);
    tiles_ = kv_tiles<Shape>(keys_);
    const bool served = lane < batch.num_seqs && num_query_tiles<Shape>(batch, seq_) > 0;
    const int tiles = tiles_.end - tiles_.begin;
    if (alone_) {
      last_ = clamp_to((tiles - 1) >> kDeal, 0, columns_ - 1);
    } else {
      const int cost = served ? tiles + kOverhead : 0, end = warp_inclusive_scan(cost, lane);
      start_ = end - cost;
      range_ = larger(ceil_divide(__shfl_sync(kFullWarp, end, 31), columns_), kLeastUnits);
      first_ = column_at(start_);
      last_ = column_at(start_ + (tiles > 0 ? tiles - 1 : 0));
    }
    sequences_ = __ballot_sync(kFullWarp, served && first_ <= column_ && column_ <= last_);
  }

  // Those that the column has a part of, as bits.
  __device__ uint32_t sequences() const { return sequences_; }

  // Of the first of these sequences.
  __device__ ColumnSegment segment(uint32_t sequences) const {
    const auto kv_head = static_cast<int>(blockIdx.y);
    if (alone_) {
      return {{seq_, kv_head, 0, 0, keys_, tiles_, 0},
              tiles_.begin + (column_ << kDeal),
              kDeal,
              columns_ << kDeal,
              tiles_.end,
              last_ + 1,
              column_};
    }
    const int lane = __ffs(static_cast<int>(sequences)) - 1;
    const auto get = [&](int x) { return __shfl_sync(kFullWarp, x, lane); };
    const Range tiles{get(tiles_.begin), get(tiles_.end)}, keys{get(keys_.begin), get(keys_.end)};
    const Sequence seq{lane, get(seq_.first_token), get(seq_.num_queries), get(seq_.length)};
    const int begin = tiles.begin + column_ * range_ - get(start_), first = get(first_);
    return {{seq, kv_head, 0, 0, keys, tiles, 0},
            larger(begin, tiles.begin),
            3,
            kFewSequencesWarps,
            smaller(begin + range_, tiles.end),
            get(last_) - first + 1,
            column_ - first};
  }

 private:
  static_assert(kFewSequencesWarps == 8, "whose log 2 a segment has where tiles are not dealt out");

  __device__ static Sequence sequence_of(const Batch &batch, int index, int length) {
    Sequence seq{index, index, 1, clamp_to(length, 0, batch.max_length)};
    if (batch.query_start_loc != nullptr) {
      seq.first_token = clamp_to(batch.query_start_loc[index], 0, batch.num_tokens);
      seq.num_queries = clamp_to(batch.query_start_loc[index + 1], seq.first_token, batch.num_tokens) - seq.first_token;
    }
    return seq;
  }
  __device__ int column_at(int position) const {
    return static_cast<int>(static_cast<uint32_t>(position) / static_cast<uint32_t>(range_));
  }

  bool alone_;
  int columns_;
  int column_;
  int range_ = 0;  // units of a column
  // Of the lane's sequence.
  Sequence seq_;
  Range keys_;
  Range tiles_;
  int start_ = 0;  // on the line
  int first_ = 0;  // columns
  int last_ = 0;
  uint32_t sequences_;
};

}  // namespace pagedattn::cuda
