// Random batches, shapes of tiles, and the items that a batch has, for tests of how work is divided.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <vector>

#ifndef __CUDACC__
#define __host__  // the header, as a host compiler reads it
#define __device__
#endif
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

  explicit RandomBatch(int seed, int most_seqs = 0) {
    std::mt19937 random(static_cast<unsigned>(seed));
    const auto up_to = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n + 1)); };
    const int num_seqs = up_to(most_seqs > 0 ? most_seqs : seed % 7 == 0 ? 300 : 12), longest = 1 << (4 + up_to(11));
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

  // For a kernel that serves sequences of so many rows, and whose items, if `heads` > 1, always have so many heads.
  void serve(int seed, int min_rows, int max_rows, int heads) {
    batch.min_rows = min_rows;
    batch.max_rows = max_rows;
    if (max_rows <= 8) batch.group = FastDivisor::of(1);  // or most sequences would have too many rows
    if (heads == 1) return;
    batch.num_kv_heads = heads * (1 + seed % 3);
    batch.max_head_shift = std::countr_zero(static_cast<unsigned>(heads));
    batch.deterministic = false;
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

struct InStepShape : HopperShape<32, 2, 8> {
  static constexpr bool kHeadsInStep = true;
  static constexpr int kLeastTilesInStep = 1;
  static constexpr int kMostTilesInStep = 6;
  static constexpr bool kPairsInStep = true;
  static constexpr int kMostTilesBeforePairs = 5;
};

struct TallShape : TileShape<128, 64, false> {
  static constexpr int kItemOverhead = 4;
};

struct ShortSegmentsShape : TileShape<192, 96, false> {
  static constexpr int kMinSegmentTiles = 2;
};

template <class Shape>
HeadCost head_cost(const Batch &batch) {
  HeadCost cost{0, 0};
  for (int i = 0; i < batch.num_seqs; ++i) {
    const Sequence seq = load_sequence(batch, i);
    for (int tile = 0; tile < num_query_tiles<Shape>(batch, seq); ++tile) {
      const int units = tile_cost<Shape>(batch, seq, tile);
      cost.all += units;
      cost.clipped += clip_cost<Shape>(batch, units);
    }
  }
  return cost;
}

// Of a line.
template <class Shape>
std::vector<WorkItem> items_of(const Batch &batch, const WorkCut<Shape> &cut, const HeadLine &line) {
  std::vector<WorkItem> items;
  int start = 0;
  for (int i = 0; i < batch.num_seqs; ++i) {
    const Sequence seq = load_sequence(batch, i);
    const int tiles = num_query_tiles<Shape>(batch, seq);
    if (tiles == 0) continue;
    const int heads = 1 << make_item(batch, cut, seq, 0).head_shift;
    for (int head = line.first_head; head < line.first_head + line.heads; head += heads) {
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

// How many KV heads a line has, as a block's cursor finds it.
template <class Shape>
int heads_of_line(const Batch &batch, const HeadCost &cost, int num_blocks) {
  return is_one_line<Shape>(batch, num_blocks) ? batch.num_kv_heads : heads_by_lengths<Shape>(batch, cost, num_blocks);
}

}  // namespace
