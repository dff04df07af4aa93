// How the CUDA kernels divide a batch: for random batches, every tile is done once, and partial results never collide.
//
// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <vector>

#define __host__  // the header, as a host compiler reads it
#define __device__
#include "work_schedule.cuh"

namespace {

using namespace pagedattn::cuda;

void require(bool holds, const char *what, int seed) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s (seed %d)\n", what, seed);
  std::exit(1);
}
#define REQUIRE(condition) require((condition), #condition, seed)

struct RandomBatch {
  std::vector<int32_t> lens, starts{0};
  Batch batch{};
  int num_blocks;

  explicit RandomBatch(int seed) {
    std::mt19937 random(static_cast<unsigned>(seed));
    const auto up_to = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n + 1)); };
    const int num_seqs = up_to(seed % 7 == 0 ? 300 : 12), longest = 1 << (4 + up_to(11));
    for (int i = 0; i < num_seqs; ++i) {
      lens.push_back(up_to(3) == 0 ? 0 : up_to(up_to(3) == 0 ? longest : 700));
      starts.push_back(starts.back() + (up_to(3) > 0 ? up_to(5) : up_to(150)));
    }
    num_blocks = 1 + up_to(up_to(1) == 0 ? 5 : 150);
    batch.seq_lens = lens.data();
    batch.query_start_loc = starts.data();
    batch.num_seqs = num_seqs;
    batch.num_tokens = starts.back();
    batch.max_length = 1 << 15;
    const int kv_heads[] = {1, 2, 3, 4, 5, 6, 8};
    batch.num_kv_heads = kv_heads[up_to(6)];
    batch.group = FastDivisor::of(1 + up_to(20));
    batch.window = up_to(1) == 0 ? 0 : 1 + up_to(2000);
    batch.unit_shift = up_to(1) == 0 ? 0 : up_to(6);
    batch.causal = up_to(3) > 0;
    batch.deterministic = up_to(1) == 0;
    batch.max_head_shift =
        batch.deterministic ? 0 : smaller(2, std::countr_zero(static_cast<unsigned>(batch.num_kv_heads)));
  }
};

template <int kTokens, int kHeadShift, int kTiles>
struct HopperShape : TileShape<64, kTokens, true> {
  static constexpr int kMinSegmentTiles = 128 / kTokens;
  static constexpr int kMaxPieces = 8;
  static constexpr int kMinPieceTiles = 512 / kTokens;
  static constexpr int kMaxHeadShift = kHeadShift;
  static constexpr int kMaxTilesOfMany = kTiles;
};
struct FourHeadsShape : HopperShape<16, 2, kMaxUnits> {
  static constexpr int kLeastHeadShift = 2;
};

struct TallShape : TileShape<128, 64, false> {
  static constexpr int kItemOverhead = 4;
};

int shared_items_of_many_heads = 0;  // that the batches had

template <class Shape>
int line_length(const Batch &batch) {
  int length = 0;
  for (int i = 0; i < batch.num_seqs; ++i) {
    const Sequence seq = load_sequence(batch, i);
    for (int tile = 0; tile < num_query_tiles<Shape>(batch, seq); ++tile) {
      length += tile_cost<Shape>(batch, seq, tile) * batch.num_kv_heads;
    }
  }
  return length;
}

template <class Shape>
std::vector<WorkItem> items_of(const Batch &batch, const WorkCut<Shape> &cut) {
  std::vector<WorkItem> items;
  int start = 0;
  for (int i = 0; i < batch.num_seqs; ++i) {
    const Sequence seq = load_sequence(batch, i);
    const int tiles = num_query_tiles<Shape>(batch, seq);
    if (tiles == 0) continue;
    const int heads = 1 << make_item(batch, cut, seq, 0).head_shift;
    for (int head = 0; head < batch.num_kv_heads; head += heads) {
      for (int tile = 0; tile < tiles; ++tile) {
        items.push_back(make_item(batch, cut, seq, tile));
        items.back().kv_head = head;
        items.back().start = start;
        start += tile_cost<Shape>(batch, seq, tile) * heads;
      }
    }
  }
  return items;
}

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
void check(int seed, int min_rows, int max_rows, int heads = 1) {
  RandomBatch random(seed);
  Batch &batch = random.batch;
  if (heads > 1) {  // always so many an item, as such kernels are chosen
    batch.num_kv_heads = heads * (1 + seed % 3);
    batch.max_head_shift = std::countr_zero(static_cast<unsigned>(heads));
    batch.deterministic = false;
  }
  batch.min_rows = min_rows;
  batch.max_rows = max_rows;
  const int total = line_length<Shape>(batch);
  const auto cut = WorkCut<Shape>::of(batch, total, random.num_blocks);
  const std::vector<WorkItem> items = items_of(batch, cut);
  if (!items.empty()) {
    const WorkItem &last = items.back();
    REQUIRE(last.start + (cost_of<Shape>(batch, last.num_kv_tiles()) << last.head_shift) == total);
  }
  const int places_per_block = cut.places_per_block(batch.deterministic);
  std::set<int> places, counters;  // of items that several blocks share
  for (const WorkItem &item : items) {
    check_rows<Shape>(batch, item, seed);
    std::map<int, Range> segments;
    std::set<int> owners;
    SegmentPlan first{};
    for (int block = 0; block < random.num_blocks; ++block) {
      const int begin = block * cut.quantum;
      const LineRange range{block, begin, smaller(begin + cut.quantum, total)};
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
      REQUIRE(place >= 0 && block < random.num_blocks);
      if (first.is_shared) REQUIRE(places.insert(place).second);
      // A block's items of several pieces that are all its own take each other's places, but never a shared item's.
      if (batch.deterministic) REQUIRE((place % places_per_block >= Shape::kMaxPieces) != first.is_shared);
    }
  }
}

}  // namespace

int main() {
  for (int seed = 0; seed < 1500; ++seed) {
    check<HopperShape<32, 2, kMaxUnits>>(seed, 1, 64);
    check<HopperShape<32, 2, 8>>(seed, 1, 64);
    check<HopperShape<16, 0, 0>>(seed, 1, 64);
    check<FourHeadsShape>(seed, 1, 16, 4);
    check<TileShape<16, 64, true>>(seed, 1, 16);
    check<TileShape<64, 32, false>>(seed, 17, 1 << 30);
    check<TallShape>(seed, 17, 1 << 30);
  }
  require(shared_items_of_many_heads > 100, "many items have several heads and owners", -1);
  std::puts("all hold");
}
