// The segments of a block's range of the work, one after the other, for the Hopper kernels.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "work_schedule.cuh"

namespace pagedattn::cuda {

struct Segment {
  bool valid;  // false: there are no more
  WorkItem item;
  Range tiles;
  int granule;  // of the item, the segment's first
};

// For one warp, whose lanes are given the same values.
template <class Cursor>
class SegmentSource {
 public:
  __device__ explicit SegmentSource(const Cursor &cursor) : cursor_(cursor) {
    const LineRange &range = cursor.range();
    more_items_ = range.begin < range.end;
    stop_ = range.end;
  }

  // The next; not valid behind the last.
  __device__ Segment next() {
    const auto &cut = cursor_.cut();
    if (granules_.begin >= granules_.end && !next_item()) return {};
    const int step = cut.deterministic ? 1 : granules_.end - granules_.begin, granule = granules_.begin;
    granules_.begin += step;
    return {true, item_, tiles_of(item_, cut, {granule, granule + step}), granule};
  }

 private:
  // The item that the range ends in, and mostly cuts, comes first: it is joined while others are read, and the kernel's
  // end waits for fewer partial results.
  __device__ bool next_item() {
    do {
      if (!more_items_) return false;
      if (found_ < 2) {
        item_ = cursor_.item_at(found_ == 0);
      } else if (!cursor_.next(item_) || item_.start >= stop_) {
        return false;
      }
      if (found_ == 0) {
        stop_ = item_.start;
        more_items_ = stop_ > cursor_.range().begin;
      }
      if (found_ < 2) ++found_;
      granules_ = granules_of(item_, cursor_.cut(), cursor_.range());
    } while (granules_.begin >= granules_.end);
    return true;
  }

  const Cursor &cursor_;
  WorkItem item_;
  Range granules_{0, 0};  // of the item that are still to come
  int found_ = 0;         // of the range's ends
  int stop_;              // where the items that are still to come end
  bool more_items_;
};

}  // namespace pagedattn::cuda
