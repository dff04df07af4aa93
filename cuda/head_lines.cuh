// Which KV heads make a line of work, and which blocks divide it (work_schedule.cuh).
//
// SPDX-License-Identifier: Apache-2.0
//
// One line of all heads gives every block the same, to a tile, but blocks that run at the same time then read different
// sequences, and a token's keys of one head are a small piece of memory.  If each head has a line of its own, cut like
// all others, blocks next to each other read the same tokens of neighbouring heads, for a while at the same time: in
// step.  Over long sequences they lose each other, later where a head has 9 to 32 rows; there two heads an item, on a
// line for each such pair, are better, if there are sequences enough that few are cut: the sooner the more bytes a
// token's keys have.  Short ones want more heads an item (TileShape::kMaxHeadShift).
//
// All blocks decide alike, from the lengths.
#pragma once

#include <cstdint>

#include "attention_params.cuh"

namespace pagedattn::cuda {

// The cost of one head of all sequences, in units of KV tiles; and were none longer than it takes to be in step, so
// that one long sequence says nothing of many short ones.
struct HeadCost {
  int64_t all;
  int64_t clipped;
};

// To which a sequence's cost is clipped.
template <class Shape>
__host__ __device__ int clip_cost(const Batch &batch, int cost) {
  const int most = 2 * Shape::kLeastTilesInStep >> batch.unit_shift;
  return cost < most ? cost : most;
}

// Whether all KV heads have one line in a grid of so many blocks, whatever the lengths are: if heads are few, or
// sequences fewer than the blocks of a line a head.
template <class Shape>
__host__ __device__ bool is_one_line(const Batch &batch, int num_blocks) {
  constexpr int kFewestHeads = 4;
  const int all = batch.num_kv_heads;
  const bool few_sequences = num_blocks >= (int64_t{batch.num_seqs} + 1) * all;
  return !Shape::kHeadsInStep || all < kFewestHeads || few_sequences;
}

// Else how many KV heads a line has.
template <class Shape>
__host__ __device__ int heads_by_lengths(const Batch &batch, const HeadCost &cost, int num_blocks) {
  const int all = batch.num_kv_heads;
  if constexpr (!Shape::kHeadsInStep) {
    return all;
  } else {
    constexpr int kFewRows = 8, kManyRows = 32;
    const bool few_rows = batch.max_rows <= kFewRows, many_rows = batch.max_rows > kManyRows && !Shape::kManyRowsInStep;
    const int64_t seqs = batch.num_seqs, most = int64_t{Shape::kMostTilesInStep} << (few_rows || many_rows ? 0 : 1);
    // Some blocks may have nothing to do: fewer than all read memory as fast.
    const auto columns_of = [&](int heads) { return num_blocks / (all / heads); };
    const auto fit = [&](int heads) {
      return all % heads == 0 && columns_of(heads) * (all / heads) >= num_blocks - num_blocks / 8;
    };
    if (cost.clipped << batch.unit_shift < Shape::kLeastTilesInStep * seqs) return all;
    const int64_t tiles = cost.all << batch.unit_shift;
    if (Shape::kPairsInStep && few_rows && tiles > Shape::kMostTilesBeforePairs * seqs && fit(2) &&
        2 * seqs >= 3 * columns_of(2)) {
      return 2;
    }
    return tiles <= most * seqs && fit(1) ? 1 : all;
  }
}

// A line, and which of its blocks one is.
struct HeadLine {
  int first_head;
  int heads;
  int column;       // the block's number among those of the line,
  int num_columns;  // and how many these are; blocks beyond have nothing to do
  int first_block;  // of all lines' blocks, one line's after the other's, this one's first

  __host__ __device__ static HeadLine of_all(const Batch &batch, int block, int num_blocks) {
    return {0, batch.num_kv_heads, block, num_blocks, 0};
  }

  // Blocks that follow each other have the same column of all lines.
  __host__ __device__ static HeadLine of(const Batch &batch, int heads, int block, int num_blocks) {
    if (heads == batch.num_kv_heads) return of_all(batch, block, num_blocks);
    const int lines = batch.num_kv_heads / heads, columns = num_blocks / lines, line = block % lines;
    return {line * heads, heads, block / lines, columns, line * columns};
  }
};

}  // namespace pagedattn::cuda
