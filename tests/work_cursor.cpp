// What blocks find of a batch on the device, with the kernels' own header in an emulated block: for random batches, the
// items at the ends of each range, those between, and the segments of the kernels that take these.
//
// SPDX-License-Identifier: Apache-2.0
#include "warp_emulation.h"
// Behind what makes a device of the host.
#include "random_batches.h"
#include "segment_source.cuh"

namespace {

bool same(const WorkItem &a, const WorkItem &b) {
  return a.seq.index == b.seq.index && a.seq.first_token == b.seq.first_token &&
         a.seq.num_queries == b.seq.num_queries && a.seq.length == b.seq.length && a.kv_head == b.kv_head &&
         a.head_shift == b.head_shift && a.query_tile == b.query_tile && a.keys.begin == b.keys.begin &&
         a.keys.end == b.keys.end && a.kv_tiles.begin == b.kv_tiles.begin && a.kv_tiles.end == b.kv_tiles.end &&
         a.start == b.start;
}

using Found = std::set<std::pair<int, int>>;  // of segments, where their items start and their first tiles

template <class Shape>
Found segments_of(const std::vector<WorkItem> &items, const WorkCut<Shape> &cut, const LineRange &range) {
  Found segments;
  for (const WorkItem &item : items) {
    const Range granules = granules_of(item, cut, range);
    const int step = cut.deterministic ? 1 : granules.end - granules.begin;
    for (int granule = granules.begin; granule < granules.end; granule += step) {
      segments.emplace(item.start, tiles_of(item, cut, {granule, granule + step}).begin);
    }
  }
  return segments;
}

template <class Shape, int kThreads>
void check_block(const Batch &batch, const std::vector<WorkItem> &items, const WorkCut<Shape> &cut,
                 const LineRange &range, int seed) {
  using Cursor = WorkCursor<Shape, kThreads>;
  typename Cursor::Shared shared{};
  std::vector<WorkItem> walked;
  std::vector<Segment> segments;
  emulation::run(kThreads, [&] {
    Cursor cursor(batch, shared);
    cursor.begin();
    __syncthreads();
    if (threadIdx.x >= 32 || cursor.range().begin >= cursor.range().end) return;
    WorkItem item = cursor.item_at(false);
    do {
      if (threadIdx.x == 0) walked.push_back(item);
    } while (cursor.next(item));
    if constexpr (Shape::kOneTile) {
      SegmentSource<Cursor> source(cursor);
      for (Segment segment = source.next(); segment.valid; segment = source.next()) {
        if (threadIdx.x == 0) segments.push_back(segment);
      }
    }
  });
  REQUIRE(shared.cut.quantum == cut.quantum && shared.range.begin == range.begin && shared.range.end == range.end);
  if (range.begin >= range.end) return;
  std::vector<WorkItem> expected;  // what starts in the range, and the item that it begins in
  for (const WorkItem &item : items) {
    if (item.start <= range.begin) expected.clear();
    if (item.start < range.end) expected.push_back(item);
  }
  REQUIRE(same(shared.ends[0], expected.front()) && same(shared.ends[1], expected.back()));
  REQUIRE(walked.size() == expected.size());
  for (size_t i = 0; i < walked.size(); ++i) REQUIRE(same(walked[i], expected[i]));
  if constexpr (Shape::kOneTile) {
    Found found;
    for (const Segment &segment : segments) found.emplace(segment.item.start, segment.tiles.begin);
    REQUIRE(found.size() == segments.size() && found == segments_of(items, cut, range));
    // Blocks take first what others join: whoever has an item's last keys may wait for all blocks before that share it.
    for (size_t i = 0; i < segments.size(); ++i) {
      const SegmentPlan plan = plan_of(segments[i].item, cut, range, segments[i].granule);
      if (cut.deterministic || !plan.is_shared) continue;
      REQUIRE(i == 0 || plan.segment == plan.num_segments - 1);
      REQUIRE(plan.first_owner + plan.segment == range.first_block + range.block);
    }
  }
}

template <class Shape, int kThreads>
void check(int seed, int min_rows, int max_rows, int most_seqs, int heads = 1) {
  RandomBatch random(seed, most_seqs);
  random.serve(seed, min_rows, max_rows, heads);
  const Batch &batch = random.batch;
  const HeadCost cost = head_cost<Shape>(batch);
  const int line_heads = heads_of_line<Shape>(batch, cost, random.num_blocks);
  const int total = static_cast<int>(cost.all) * line_heads;
  gridDim.x = static_cast<unsigned>(random.num_blocks);
  for (int block = 0; block < random.num_blocks; block += 1 + random.num_blocks / 4) {
    const auto line = HeadLine::of(batch, line_heads, block, random.num_blocks);
    const auto cut = WorkCut<Shape>::of(batch, total, line.num_columns, line_heads);
    const int begin = line.column * cut.quantum;
    const LineRange range{line.column, begin, smaller(begin + cut.quantum, total), line.first_block};
    blockIdx.x = static_cast<unsigned>(block);
    check_block<Shape, kThreads>(batch, items_of(batch, cut, line), cut, range, seed);
  }
}

}  // namespace

int main() {
  for (int seed = 0; seed < 72; ++seed) {
    const int most_seqs = seed % 3 == 0 ? 8 : seed % 3 == 1 ? 200 : 1500;
    switch (seed / 3 % 6) {
      case 0:
        check<HopperShape<32, 2, 8>, 384>(seed, 1, 64, most_seqs);
        break;
      case 1:
        check<FourHeadsShape, 384>(seed, 1, 16, most_seqs, 4);
        break;
      case 2:
        check<TileShape<16, 64, true>, 128>(seed, 1, 16, most_seqs);
        break;
      case 3:
        check<InStepShape, 384>(seed, 1, seed % 2 == 0 ? 8 : 64, most_seqs);
        break;
      case 4:
        check<TileShape<16, 64, false>, 128>(seed, 1, 40, most_seqs);
        break;
      default:
        check<TileShape<64, 64, false>, 128>(seed, 17, 1 << 30, most_seqs);
    }
  }
  for (int seed = 0; seed < 20; ++seed) check<HopperShape<32, 2, 8>, 384>(seed, 1, 64, 1);  // one sequence, or none
  std::puts("all hold");
}
