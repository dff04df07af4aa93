// paged_attention on the CPU: how the work is cut.
//
// SPDX-License-Identifier: Apache-2.0
//
// A work item is (sequence, tile of packed query rows, range of KV heads, range of keys).  Decode items take all KV
// heads of a range of keys, so that a block is read once and in one go; prefill items take one head, whose converted
// tiles then serve many rows.  Where one tile's keys are cut into several ranges, the item that finishes last joins the
// partial results in the order of the ranges.
//
// Bits: what an item computes for a row depends on the cut of rows and keys only, whatever the threads do.  With
// `deterministic` that cut is a function of the sequence's own lengths and the call's shapes, so that equal input gives
// equal bits whatever the number of threads and whatever else is in the batch.  Without, ranges of keys are as long as
// the threads' shares allow: each costs a result of its own, and its first keys come from memory without notice.  The
// cut of heads may always follow the number of threads, because it changes no sum.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"
#include "status.h"

namespace pagedattn::cpu {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Ranges of keys that one sequence is cut into, over all of its row tiles: enough for large machines to share one long
// sequence, few enough that partial results stay small beside the keys; more where the longest range asks for them.
constexpr int64_t kMaxRanges = 64;
// Shortest range of keys, a multiple of the kernels' tile.  Each range costs a partial result the size of 2 * rows keys
// or so (fp32, K and V of 16 bits), hence a length in proportion to the rows, within bounds.
constexpr int64_t kMinRange = 256;
constexpr int64_t kMaxMinRange = 1024;
constexpr int64_t kRangeStep = 64;
// Longest range: sums of float32 lose what is small beside them, the more the longer they are.  So many keys keep them
// within 1e-5, and what their partial result costs is nothing beside them.
constexpr int64_t kMaxRange = 8192;
// A work item begins with a multiple of so many keys where those lie in one block: kernels take keys in such groups,
// and pass over those that nobody sees.
constexpr int64_t kKeyGroup = 16;
// Items for each thread, so that uneven ones even out; but none smaller than this many bytes of work, since setting one
// up takes as long as reading some KiB.
constexpr int64_t kItemsPerThread = 4;
// As many by cutting heads, where ranges of keys give fewer: that costs more than a range.
constexpr int64_t kHeadItemsPerThread = 2;
// Tiles of many rows for each thread, whose times differ with what they see.
constexpr int64_t kTilesPerThread = 8;
constexpr int64_t kMinItemWork = 48 * 1024;
// Work of attention that is shared among threads: short calls follow each other closely, layer by layer, so that the
// threads mostly watch for it and need not be woken.
constexpr int64_t kMinSharedWork = 96 * 1024;

// The rows and keys of one tile, before heads and ranges of keys are cut.
struct RowTile {
  AttentionWork work;  // all heads, all visible keys
  int64_t range;       // keys of one range
  int64_t num_ranges;  // at least 1
};

// The partial results of one tile and one range of heads.
struct Merge {
  AttentionWork work;
  int64_t offset;  // floats from the start of the partial results
  int64_t stride;  // floats of one partial result
  int64_t count;
  int32_t missing;  // partial results yet to come; atomic while items run
};

struct Item {
  AttentionWork work;
  int64_t merge;  // index, or -1
  int64_t range;  // which of the merge's ranges
};

// Kept by each calling thread, so that a call in steady state allocates nothing.
struct Plan {
  std::vector<RowTile> tiles;
  std::vector<Item> items;
  std::vector<Merge> merges;
  std::vector<int64_t> left;  // items that a thread without memory of its own left to the caller
  int64_t partial_floats = 0;
  int64_t cost = 0;  // in bytes of cache read, computing counted as the bytes that take as long

  void clear() {
    tiles.clear();
    items.clear();
    merges.clear();
    partial_floats = 0;
    cost = 0;
  }
};

// Rows of a tile: tiles of one sequence are of about equal size, and hold whole tokens where a token's rows fit in.
int64_t tile_rows(int64_t num_rows, int64_t group, int64_t most) {
  const int64_t even = ceil_div(num_rows, ceil_div(num_rows, most));
  const int64_t whole_tokens = ceil_div(even, group) * group;
  return whole_tokens <= most ? whole_tokens : even;
}

// Rows of a tile, at most: many share what is packed for them, but each thread is to have several items.
int64_t most_rows(const AttentionParams &p) {
  const int64_t most = kernels().max_head_rows(p);
  if (p.deterministic) return most;
  const int64_t num_rows = p.num_tokens * p.num_q_heads;
  return std::clamp(num_rows / (kTilesPerThread * num_threads()), std::min(kernels().max_rows, most), most);
}

void add_tiles(const AttentionParams &p, int32_t seq, int64_t most, std::vector<RowTile> &tiles) {
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  const int64_t query_start = p.query_start_loc == nullptr ? seq : p.query_start_loc[seq];
  const int64_t query_len = p.query_start_loc == nullptr ? 1 : p.query_start_loc[seq + 1] - query_start;
  const int64_t seq_len = p.seq_lens[seq];
  const int64_t num_rows = query_len * group;
  if (num_rows == 0) return;
  const int64_t rows = tile_rows(num_rows, group, most);
  const int64_t num_tiles = ceil_div(num_rows, rows);
  // The last tiles see the most keys, so they go first.
  for (int64_t tile = num_tiles - 1; tile >= 0; --tile) {
    RowTile t;
    AttentionWork &w = t.work;
    w.seq = seq;
    w.query_start = query_start;
    w.query_len = query_len;
    w.seq_len = seq_len;
    w.row_begin = tile * rows;
    w.row_end = std::min(num_rows, w.row_begin + rows);
    const int64_t first_position = seq_len - query_len + w.row_begin / group;
    const int64_t last_position = seq_len - query_len + (w.row_end - 1) / group;
    const int64_t first_end = p.causal ? first_position + 1 : seq_len;
    w.kv_end = std::max<int64_t>(0, p.causal ? last_position + 1 : seq_len);
    w.kv_begin = p.window > 0 ? std::max<int64_t>(0, first_end - p.window) : 0;
    if (p.block_size % kKeyGroup == 0) w.kv_begin = std::min(w.kv_begin, w.kv_end) / kKeyGroup * kKeyGroup;
    const int64_t shortest = std::clamp(rows * 16, kMinRange, std::max(kMaxMinRange, rows * 4));
    const int64_t even = ceil_div(w.kv_end - w.kv_begin, std::max<int64_t>(1, kMaxRanges / num_tiles));
    t.range = std::max(shortest, even);
    tiles.push_back(t);
  }
}

// Cuts keys into ranges of at least `range` and of what a tile asks for.
void cut_keys(std::vector<RowTile> &tiles, int64_t range) {
  for (RowTile &t : tiles) {
    const int64_t num_keys = t.work.kv_end - t.work.kv_begin;
    t.range = std::min(kMaxRange, ceil_div(std::max(t.range, range), kRangeStep) * kRangeStep);
    t.num_ranges = std::max<int64_t>(1, ceil_div(num_keys, t.range));
    // Of about equal length.
    t.range = std::max(kRangeStep, ceil_div(ceil_div(num_keys, t.num_ranges), kRangeStep) * kRangeStep);
  }
}

void add_items(const AttentionParams &p, const RowTile &tile, int32_t head_begin, int32_t head_end, Plan &plan) {
  AttentionWork work = tile.work;
  work.head_begin = head_begin;
  work.head_end = head_end;
  int64_t merge = -1;
  if (tile.num_ranges > 1) {
    const int64_t rows = (work.row_end - work.row_begin) * (head_end - head_begin);
    const int64_t stride = ceil_div(rows * (p.head_dim + kPartialExtra), 16) * 16;
    merge = static_cast<int64_t>(plan.merges.size());
    plan.merges.push_back({work, plan.partial_floats, stride, tile.num_ranges, static_cast<int32_t>(tile.num_ranges)});
    plan.partial_floats += stride * tile.num_ranges;
  }
  for (int64_t range = 0; range < tile.num_ranges; ++range) {
    Item item{work, merge, range};
    item.work.kv_begin = tile.work.kv_begin + range * tile.range;
    item.work.kv_end = std::min(tile.work.kv_end, item.work.kv_begin + tile.range);
    plan.items.push_back(item);
  }
}

void make_plan(const AttentionParams &p, Plan &plan) {
  plan.clear();
  const int64_t most = most_rows(p);
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) add_tiles(p, seq, most, plan.tiles);
  const auto heads_that_fit = [&](const RowTile &tile) {
    const int64_t rows = tile.work.row_end - tile.work.row_begin;
    return std::clamp<int64_t>(kernels().max_rows / rows, 1, p.num_kv_heads);
  };
  int64_t num_keys = 0;
  for (const RowTile &tile : plan.tiles) {
    num_keys += (tile.work.kv_end - tile.work.kv_begin) * ceil_div(p.num_kv_heads, heads_that_fit(tile));
  }
  cut_keys(plan.tiles, p.deterministic ? 0 : num_keys / (kItemsPerThread * num_threads()));

  int64_t num_items = 0;
  for (const RowTile &tile : plan.tiles) {
    const int64_t rows = tile.work.row_end - tile.work.row_begin;
    const int64_t keys = std::max<int64_t>(1, tile.work.kv_end - tile.work.kv_begin);
    num_items += tile.num_ranges * ceil_div(p.num_kv_heads, heads_that_fit(tile));
    // About 5 operations take as long as reading a byte.
    plan.cost += keys * p.num_kv_heads * p.head_dim * (2 * dtype_size(p.kv_dtype) + 4 * rows / 5);
  }
  const int64_t most_items = plan.cost < kMinSharedWork ? 1 : plan.cost / kMinItemWork;
  const int64_t wanted = std::min(kHeadItemsPerThread * num_threads(), most_items);
  const int64_t cut = std::max<int64_t>(1, ceil_div(wanted, std::max<int64_t>(1, num_items)));

  // Tiles of a sequence follow each other head by head, so that the keys they share are found in the cache.
  for (size_t first = 0; first < plan.tiles.size();) {
    size_t last = first;
    while (last < plan.tiles.size() && plan.tiles[last].work.seq == plan.tiles[first].work.seq) ++last;
    int64_t heads = p.num_kv_heads;
    for (size_t i = first; i < last; ++i) heads = std::min(heads, heads_that_fit(plan.tiles[i]));
    heads = std::max<int64_t>(1, heads / cut);
    const auto first_item = static_cast<std::ptrdiff_t>(plan.items.size());
    for (int64_t head = 0; head < p.num_kv_heads; head += heads) {
      const int64_t end = std::min<int64_t>(p.num_kv_heads, head + heads);
      for (size_t i = first; i < last; ++i) {
        add_items(p, plan.tiles[i], static_cast<int32_t>(head), static_cast<int32_t>(end), plan);
      }
    }
    // With a single tile nothing is shared.  Then the heads of a block follow each other, so that a thread reads whole
    // blocks: half of their heads could be half of the sets of a cache.
    if (last - first == 1) {
      std::sort(plan.items.begin() + first_item, plan.items.end(), [](const Item &a, const Item &b) {
        return a.range != b.range ? a.range < b.range : a.work.head_begin < b.work.head_begin;
      });
    }
    first = last;
  }
}

Scratch &scratch_of_thread() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace

void paged_attention(const AttentionParams &p) {
  thread_local Plan plan_of_thread;
  thread_local Scratch partials_of_thread;
  const Kernels &k = kernels();
  Plan &plan = plan_of_thread;
  make_plan(p, plan);
  float *const partials =
      static_cast<float *>(partials_of_thread.get(static_cast<size_t>(plan.partial_floats) * sizeof(float)));
  const size_t scratch_size = k.attention_scratch_size(p);
  const auto num_items = static_cast<int64_t>(plan.items.size());

  // A call that fails has changed nothing: all that the caller needs is there before anything is written, and it can do
  // what the others cannot.
  void *const scratch_of_caller = scratch_of_thread().get(scratch_size);

  const auto run_item = [&](int64_t i, void *scratch) {
    Item &item = plan.items[static_cast<size_t>(i)];
    if (item.merge < 0) {
      k.attend(p, item.work, scratch);
      return;
    }
    Merge &merge = plan.merges[static_cast<size_t>(item.merge)];
    float *const first = partials + merge.offset;
    item.work.partial = first + item.range * merge.stride;
    k.attend(p, item.work, scratch);
    // Whoever takes the count to zero sees all partial results.
    if (std::atomic_ref(merge.missing).fetch_sub(1, std::memory_order_acq_rel) == 1) {
      k.merge_partials(p, merge.work, first, merge.count, merge.stride, scratch);
    }
  };
  if (plan.cost < kMinSharedWork) {
    parallel_for(1, [&](int64_t, int) {
      for (int64_t i = 0; i < num_items; ++i) run_item(i, scratch_of_caller);
    });
  } else {
    plan.left.resize(static_cast<size_t>(num_items));
    std::atomic<size_t> num_left{0};
    parallel_for(num_items, [&](int64_t i, int) {
      if (void *const scratch = scratch_of_thread().try_get(scratch_size)) {
        run_item(i, scratch);
      } else {
        plan.left[num_left.fetch_add(1, std::memory_order_relaxed)] = i;
      }
    });
    for (size_t i = 0; i < num_left; ++i) run_item(plan.left[i], scratch_of_caller);
  }
  record_kernel("paged_attention", k.attention_name);
}

}  // namespace pagedattn::cpu
