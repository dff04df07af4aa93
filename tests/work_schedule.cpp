// How the CUDA kernels divide a batch: for random batches, every tile is done once, and partial results never collide.
//
// SPDX-License-Identifier: Apache-2.0
#include "random_batches.h"

namespace {

int shared_items_of_many_heads = 0;  // that the batches had
int batches_in_step[2] = {0, 0};     // a head a line, and two

// Every row that an item's heads have has a place of its own in the item's tile.
template <class Shape>
void check_rows(const Batch &batch, const WorkItem &item, int seed) {
  const int heads = 1 << item.head_shift, rows = num_rows(batch, item.seq);
  REQUIRE(item.kv_head + heads <= batch.num_kv_heads);
  std::set<std::pair<int, int>> found;
  for (int row = 0; row < Shape::kRows; ++row) {
    const TileRow place = tile_row<Shape>(batch, item, row);
    if (place.head < heads && item.query_tile * Shape::kRows + place.row < rows) found.emplace(place.head, place.row);
  }
  REQUIRE(static_cast<int>(found.size()) == heads * smaller(rows - item.query_tile * Shape::kRows, Shape::kRows));
}

template <class Shape>
void check_line(const Batch &batch, const HeadLine &line, int total, int num_blocks, std::set<int> &places,
                std::set<int> &counters, int seed) {
  const auto cut = WorkCut<Shape>::of(batch, total, line.num_columns, line.heads);
  const std::vector<WorkItem> items = items_of(batch, cut, line);
  if (!items.empty()) {
    const WorkItem &last = items.back();
    REQUIRE(last.start + (cost_of<Shape>(batch, last.num_kv_tiles()) << last.head_shift) == total);
  }
  const int places_per_block = cut.places_per_block(batch.deterministic);
  for (const WorkItem &item : items) {
    check_rows<Shape>(batch, item, seed);
    std::map<int, Range> segments;
    std::set<int> owners;
    SegmentPlan first{};
    for (int block = 0; block < line.num_columns; ++block) {
      const int begin = block * cut.quantum;
      const LineRange range{block, begin, smaller(begin + cut.quantum, total), line.first_block};
      if (begin >= total) continue;
      const Range granules = granules_of(item, cut, range);
      const int step = batch.deterministic ? 1 : granules.end - granules.begin;
      for (int granule = granules.begin; granule < granules.end; granule += step) {
        const SegmentPlan plan = plan_of(item, cut, range, granule);
        if (segments.empty()) first = plan;
        REQUIRE(plan.num_segments == first.num_segments && plan.is_shared == first.is_shared);
        REQUIRE(plan.first_owner == first.first_owner && plan.first_place == first.first_place);
        REQUIRE(segments.emplace(plan.segment, tiles_of(item, cut, {granule, granule + step})).second);
        owners.insert(block);
      }
    }
    // In order, the segments are the item's tiles.
    REQUIRE(static_cast<int>(segments.size()) == first.num_segments && first.is_shared == (owners.size() > 1));
    int next = item.kv_tiles.begin;
    for (const auto &[segment, tiles] : segments) {
      REQUIRE(segment >= 0 && segment < first.num_segments && tiles.begin == next);
      REQUIRE(tiles.end > tiles.begin || item.num_kv_tiles() == 0);
      next = tiles.end;
    }
    REQUIRE(next == item.kv_tiles.end);
    if (first.num_segments == 1) continue;
    if (item.head_shift > 0) ++shared_items_of_many_heads;
    REQUIRE(first.is_shared || batch.deterministic);
    if (first.is_shared) REQUIRE(counters.insert(first.first_owner).second);
    for (int i = 0; i < first.num_segments; ++i) {
      const int place = first.first_place + i, block = place / places_per_block;
      REQUIRE(place >= 0 && block < num_blocks);
      if (first.is_shared) REQUIRE(places.insert(place).second);
      // A block's items of several pieces that are all its own take each other's places, but never a shared item's.
      if (batch.deterministic) REQUIRE((place % places_per_block >= Shape::kMaxPieces) != first.is_shared);
    }
  }
}

// Every block is one of one line's, or has nothing to do.
void check_lines(const Batch &batch, int heads, int num_blocks, int seed) {
  std::set<int> found;
  for (int block = 0; block < num_blocks; ++block) {
    const auto line = HeadLine::of(batch, heads, block, num_blocks);
    REQUIRE(line.heads == heads && line.first_head % heads == 0 && line.first_head + heads <= batch.num_kv_heads);
    REQUIRE(line.first_block == line.first_head / heads * line.num_columns);
    if (line.column < line.num_columns) REQUIRE(found.insert(line.first_block + line.column).second);
  }
  const int columns = HeadLine::of(batch, heads, 0, num_blocks).num_columns, lines = batch.num_kv_heads / heads;
  REQUIRE(static_cast<int>(found.size()) == lines * columns && lines * columns <= num_blocks);
}

template <class Shape>
void check(int seed, int min_rows, int max_rows, int heads = 1) {
  RandomBatch random(seed);
  random.serve(seed, min_rows, max_rows, heads);
  const Batch &batch = random.batch;
  const HeadCost cost = head_cost<Shape>(batch);
  const int line_heads = heads_of_line<Shape>(batch, cost, random.num_blocks);
  const int total = static_cast<int>(cost.all) * line_heads;
  if (line_heads < batch.num_kv_heads) ++batches_in_step[line_heads - 1];
  check_lines(batch, line_heads, random.num_blocks, seed);
  std::set<int> places, counters;  // of items that several blocks share
  for (int first = 0; first < batch.num_kv_heads; first += line_heads) {
    const auto line = HeadLine::of(batch, line_heads, first / line_heads, random.num_blocks);
    REQUIRE(line.first_head == first && line.column == 0);
    check_line<Shape>(batch, line, total, random.num_blocks, places, counters, seed);
  }
}

}  // namespace

int main() {
  for (int seed = 0; seed < 1500; ++seed) {
    check<HopperShape<32, 2, kMaxUnits>>(seed, 1, 64);
    check<HopperShape<32, 2, 8>>(seed, 1, 64);
    check<HopperShape<16, 0, 0>>(seed, 1, 64);
    check<FourHeadsShape>(seed, 1, 16, 4);
    check<InStepShape>(seed, 1, 64);
    check<InStepShape>(seed, 1, 8);
    check<TileShape<16, 64, true>>(seed, 1, 16);
    check<TileShape<64, 32, false>>(seed, 17, 1 << 30);
    check<TallShape>(seed, 17, 1 << 30);
    check<ShortSegmentsShape>(seed, 65, 1 << 30);
  }
  require(shared_items_of_many_heads > 100, "many items have several heads and owners", -1);
  require(batches_in_step[0] > 50 && batches_in_step[1] > 20, "many batches have several lines", -1);
  std::puts("all hold");
}
