// What depends on a query row but not on its values, for the rows of a work item's tile.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_params.cuh"
#include "scores.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Lies in shared memory: few tiles need more of it than the scale.
template <int kRows>
struct RowTable {
  Range keys[kRows];     // that the row sees
  int position[kRows];   // in the sequence
  float slope[kRows];    // ALiBi's, in units of log 2
  float q_scale[kRows];  // what a bfloat16 row was divided by (float8 caches)
};

// Rows past the sequence's last are given its keys, so that they ask for no masks of their own.  To be called by
// kThreads threads, numbered from zero.
template <class Shape, int kThreads>
__device__ void fill_row_table(const AttentionKernelParams &params, const WorkItem &item, RowTable<Shape::kRows> &rows,
                               int thread) {
  const Batch &batch = params.batch;
  const int last_row = num_rows(batch, item.seq) - 1, group = static_cast<int>(batch.group.divisor);
  for (int row = thread; row < Shape::kRows; row += kThreads) {
    const TileRow place = tile_row<Shape>(batch, item, row);
    const int packed_row = min(item.query_tile * Shape::kRows + place.row, last_row);
    const int query = batch.group.divide(packed_row);
    rows.keys[row] = visible_keys(batch, item.seq, query);
    rows.position[row] = item.seq.length - item.seq.num_queries + query;
    // Rows of no head of the item take its last's place in no result, but must not read past the slopes.
    const int kv_head = item.kv_head + min(place.head, (1 << item.head_shift) - 1);
    const int head = kv_head * group + packed_row - query * group;
    rows.slope[row] = params.alibi_slopes == nullptr ? 0.0f : params.alibi_slopes[head] * kLog2E;
  }
}

}  // namespace pagedattn::cuda
