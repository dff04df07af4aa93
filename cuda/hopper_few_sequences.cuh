// Paged decode of few sequences on Hopper: at most 32 of at most 8 query rows a KV head, 16-bit queries and caches of
// head dimension 128.
//
// SPDX-License-Identifier: Apache-2.0
//
// What counts is the way from the start to the first tile and from the last to the result, so there is little of it.
// A warp finds by itself which tiles are its own (few_sequences_plan.cuh) and asks the copy engine (TMA) for them, into
// a ring of its own that runs on across the ends of sequences: nobody waits for another warp before a sequence's end.
// All KV heads are divided alike, so that the device sweeps over the same tokens of all of them together, which lie
// side by side in memory.
//
// The warps of a block join what they have of a sequence in shared memory.  The block that has its last keys waits for
// the parts of the others (announced_parts.cuh), always in the order of the keys.
//
// Bound: for some hundred keys, two dependent reads of memory, length and block table, then keys; for many, their
// bytes. docs/performance/decode.md has the figures.
#pragma once

#include "announced_parts.cuh"
#include "attention_epilogue.cuh"
#include "few_sequences_plan.cuh"
#include "hopper_params.cuh"
#include "hopper_traits.cuh"
#include "mma_queries.cuh"
#include "mma_warp_rows.cuh"

namespace pagedattn::cuda {

template <class CacheElement_, int kHeadDim_>
struct FewSequencesTraits : MmaTypes<CacheElement_> {
  using CacheElement = CacheElement_;
  using Types = MmaTypes<CacheElement>;
  static constexpr int kHeadDim = kHeadDim_;  // D is this
  static constexpr int kElementBytes = sizeof(typename Types::Storage);
  static constexpr int kRows = 16;  // of a tile, the first kFewSequencesRows of which are used
  static constexpr int kTokens = 16;
  static constexpr int kWarpTokens = kTokens;
  static constexpr int kWarpBands = 1;
  static constexpr float kLargestStep = 0.0f;
  static constexpr int kTileHeads = 1;
  static constexpr bool kQInRegisters = true;
  static constexpr bool kHasUnseenRows = true;
  using Shape = TileShape<kRows, kTokens, true>;
  static constexpr int kWarps = kFewSequencesWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQThreads = kThreads;
  static_assert(kWarps == kFewSequencesRows, "a warp joins a row");
  // Log 2 of the tiles of a sequence that is alone that a column gets at once.
  static constexpr int kDeal = 3;

  using QTile = BoxTile<kRows, kHeadDim * 2>;
  using KvTile = BoxTile<kTokens, kHeadDim * kElementBytes>;
  static_assert(KvTile::kCut && kHeadDim == 128, "a lane joins four columns of a row");
  static constexpr int kTileBytes = 2 * KvTile::kBytes;
  static constexpr int kPitch = kHeadDim + 8;  // of states, see Epilogue
  static constexpr int kMaxStages = 3;

  // Behind the ring.
  struct alignas(1024) Shared {
    char q[QTile::kBytes];
    RowTable<kRows> rows;
    Barrier tile_full[kWarps][kMaxStages];
    float m[kWarps * kFewSequencesRows];
    float l[kWarps * kFewSequencesRows];
  };

  // If sequences have at most so many rows a KV head: of the states behind that, tiles of a warp's ring, and all.
  __host__ __device__ static constexpr int state_bytes(int rows) { return kWarps * rows * kPitch * 4; }
  __host__ __device__ static constexpr int stages(int rows) {
    const int rest = 227 * 1024 - static_cast<int>(sizeof(Shared)) - state_bytes(rows);
    return smaller(rest / (kWarps * kTileBytes), kMaxStages);
  }
  __host__ __device__ static constexpr int shared_bytes(int rows) {
    return stages(rows) * kWarps * kTileBytes + static_cast<int>(sizeof(Shared)) + state_bytes(rows);
  }
};

// ---- a warp's ring -----------------------------------------------------------------------------------------------

// One warp fills it and reads it.  A slot is asked for again by lanes that have met behind their last read of its tile,
// so that none of them still reads it, nor waits for the phase that is over.  No more tiles are on their way than there
// are slots, so that no barrier is two phases ahead of who waits for it.
template <class Traits>
class WarpRing {
  using Kv = typename Traits::KvTile;

 public:
  __device__ WarpRing(const HopperParams &params, char *ring, Barrier *full, int stages)
      : params_(params),
        full_(full),
        lane_(static_cast<int>(threadIdx.x) % 32),
        stages_(stages),
        policy_(read_once_policy()) {
    is_v_ = lane_ % 2 != 0;
    first_token_ = lane_ / 2 * params.maps.box_tokens;
    tiles_ = shared_address(ring) +
             static_cast<SharedAddress>(static_cast<int>(threadIdx.x) / 32 * stages * Traits::kTileBytes);
    offset_ = static_cast<SharedAddress>((is_v_ ? Kv::kBytes : 0) + first_token_ / 8 * Kv::kEightRows);
  }

  // The warp's next tiles are `tile` and each `step`-th behind it; the block table is looked up as far as `end_token`.
  __device__ void look_up(int sequence, int tile, int step, int end_token) {
    table_ = params_.block_tables + sequence * params_.block_table_stride;
    tile_ = tile;
    step_ = step;
    end_token_ = end_token;
    ahead_ = 0;
    entries_ = load_entries(0);
    next_entries_ = load_entries(kEntryTiles);
  }

  // Whether there is one more below `end`.
  __device__ bool has_tile(int end) const { return tile_ < end; }

  __device__ void ask(Range keys, int kv_head) {
    if (ahead_ == kEntryTiles) {
      ahead_ = 0;
      entries_ = next_entries_;
      next_entries_ = load_entries(kEntryTiles);
    }
    const int entry = __shfl_sync(kFullWarp, entries_, ahead_ * 2 + (first_token_ >= 8 ? 1 : 0));
    const int block = clamp_to(entry, 0, params_.last_block), token = tile_ * Traits::kTokens + first_token_;
    const int place = token - params_.block_size.divide(token) * static_cast<int>(params_.block_size.divisor);
    const int heads = params_.maps.heads_to_block;
    const int corner[5] = {0, heads > 0 ? 0 : place, 0, heads > 0 ? place / 8 : kv_head,
                           heads > 0 ? block * heads + kv_head : block};
    // Boxes that nobody sees stay as they are.
    const bool seen =
        first_token_ < Traits::kTokens && token < keys.end && token + params_.maps.box_tokens > keys.begin;
    const int boxes = __popc(__ballot_sync(kFullWarp, seen));
    if (lane_ == 0) arrive_and_expect(&full_[asked_], boxes * params_.maps.box_bytes);
    __syncwarp();
    if (seen) {
      copy_box(tiles_ + static_cast<SharedAddress>(asked_ * Traits::kTileBytes) + offset_,
               is_v_ ? &params_.maps.v : &params_.maps.k, corner, &full_[asked_], policy_);
    }
    asked_ = asked_ + 1 == stages_ ? 0 : asked_ + 1;
    tile_ += step_;
    ++ahead_;
  }

  // Waits for the next tile; it stays until the next is asked for.
  __device__ const char *take(char *ring) {
    cuda::wait(&full_[taken_], phase_);
    const char *const tile = ring + (static_cast<int>(threadIdx.x) / 32 * stages_ + taken_) * Traits::kTileBytes;
    if (++taken_ == stages_) {
      taken_ = 0;
      phase_ ^= 1;
    }
    return tile;
  }

 private:
  // The lanes hold the entries of so many tiles, of the first and the last eight tokens of each.
  static constexpr int kEntryTiles = 16;

  __device__ int load_entries(int ahead) const {
    const int token = (tile_ + (ahead + lane_ / 2) * step_) * Traits::kTokens + lane_ % 2 * 8;
    return token >= 0 && token < end_token_ ? table_[params_.block_size.divide(token)] : 0;
  }

  const HopperParams &params_;
  Barrier *full_;
  int lane_;
  int stages_;
  uint64_t policy_;
  bool is_v_;  // the lane's box of every tile
  int first_token_;
  SharedAddress tiles_;
  SharedAddress offset_;
  const int32_t *table_;
  int tile_;
  int step_;
  int end_token_;
  int ahead_;
  int entries_;
  int next_entries_;
  int asked_ = 0;
  int taken_ = 0;
  uint32_t phase_ = 0;
};

// ---- joins -------------------------------------------------------------------------------------------------------

// Joins the states of the block's warps, and the parts of blocks: a warp has a row, a lane four of its columns.
template <class Traits>
class PartJoin {
  using Shared = typename Traits::Shared;

 public:
  static constexpr int kStateColumns = Traits::kHeadDim;

  __device__ PartJoin(const HopperParams &params, Shared &shared)
      : params_(params),
        shared_(shared),
        states_(reinterpret_cast<float *>(&shared + 1)),
        lane_(static_cast<int>(threadIdx.x) % 32),
        row_(static_cast<int>(threadIdx.x) / 32) {}

  __device__ int first_state(int warp) const { return warp * params_.batch.max_rows; }
  __device__ float *state(int index) const { return states_ + index * Traits::kPitch; }
  __device__ void set_row(int index, float m, float l) const {
    shared_.m[index] = m;
    shared_.l[index] = l;
  }

  // The block's part of a sequence, whose states have been stored: writes the result, hands it on to the block that
  // ends the sequence, or keeps it for join_parts.
  __device__ void finish(const ColumnSegment &segment) {
    if (row_ >= num_rows(params_.batch, segment.item.seq)) return;
    const RowState sum = join_states();
    if (segment.num_ranks == 1) {
      write(segment.item, sum);
    } else if (segment.rank + 1 < segment.num_ranks) {
      float *const row = part_row(0);
      announce(reinterpret_cast<float4 *>(row) + lane_, sum.o);
      if (lane_ == 0) announce(reinterpret_cast<float2 *>(row + Traits::kHeadDim), {sum.m, sum.l});
    } else {
      own_ = sum;
      item_ = segment.item;
      num_parts_ = segment.rank;
    }
  }

  // Of the sequence that ends in this block and began in one before, behind all others, so that nobody waits for a
  // block that waits.
  __device__ void join_parts() const {
    if (num_parts_ == 0) return;
    RowState sum;
#pragma unroll 1
    for (int first = num_parts_; first > 0; first -= kJoinedAtOnce) {
      float2 state[kJoinedAtOnce] = {};
      float4 o[kJoinedAtOnce] = {};
      bool all;
      do {
        all = true;
#pragma unroll
        for (int i = 0; i < kJoinedAtOnce; ++i) {
          if (i >= first || (is_there(o[i]) && is_there(state[i]))) continue;
          const float *const row = part_row(first - i);
          o[i] = read_part(reinterpret_cast<const float4 *>(row) + lane_);
          state[i] = read_part(reinterpret_cast<const float2 *>(row + Traits::kHeadDim));
        }
#pragma unroll
        for (int i = 0; i < kJoinedAtOnce; ++i) all = all && (i >= first || (is_there(o[i]) && is_there(state[i])));
      } while (!all);
      __syncwarp();  // all lanes have read m and l
      float largest = sum.m;
#pragma unroll
      for (int i = 0; i < kJoinedAtOnce; ++i) {
        if (i >= first) state[i] = {negative_infinity(), 0.0f};
        largest = fmaxf(largest, state[i].x);
      }
      sum.raise(largest);
#pragma unroll
      for (int i = 0; i < kJoinedAtOnce; ++i) {
        sum.add(state[i].x, state[i].y, o[i]);
        if (i >= first) continue;
        float *const row = part_row(first - i);
        reinterpret_cast<float4 *>(row)[lane_] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (lane_ == 0) *reinterpret_cast<float2 *>(row + Traits::kHeadDim) = {0.0f, 0.0f};
      }
    }
    sum.raise(fmaxf(sum.m, own_.m));
    sum.add(own_.m, own_.l, own_.o);
    write(item_, sum);
  }

 private:
  static constexpr int kJoinedAtOnce = 15;

  __device__ RowState join_states() const {
    RowState sum;
#pragma unroll
    for (int warp = 0; warp < Traits::kWarps; ++warp) sum.m = fmaxf(sum.m, shared_.m[first_state(warp) + row_]);
#pragma unroll
    for (int warp = 0; warp < Traits::kWarps; ++warp) {
      const int index = first_state(warp) + row_;
      sum.add(shared_.m[index], shared_.l[index], reinterpret_cast<const float4 *>(state(index))[lane_]);
    }
    return sum;
  }

  // The warp's row of the part of the column so many before this one.
  __device__ float *part_row(int columns_before) const {
    const int block = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x) - columns_before;
    return params_.announced + (block * kFewSequencesRows + row_) * place_row_floats(Traits::kHeadDim);
  }

  __device__ void write(const WorkItem &item, const RowState &state) const {
    const int group = static_cast<int>(params_.batch.group.divisor), query = params_.batch.group.divide(row_);
    const int64_t token = item.seq.first_token + query;
    const int head = item.kv_head * group + row_ - query * group;
    const float factor = end_row(params_, token, head, item.kv_head, state.m, state.l, lane_ == 0);
    const float4 o = state.o;
    store_output<Traits::kOutput>(params_,
                                  token * params_.out.token_stride + head * params_.out.head_stride + 4 * lane_,
                                  {o.x * factor, o.y * factor, o.z * factor, o.w * factor});
  }

  const HopperParams &params_;
  Shared &shared_;
  float *states_;
  int lane_;
  int row_;
  // What is kept for join_parts.
  RowState own_;
  WorkItem item_;
  int num_parts_ = 0;
};

// ---- the kernel --------------------------------------------------------------------------------------------------

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    hopper_few_sequences_kernel(const __grid_constant__ HopperParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char shared_memory[];
  const Batch &batch = params.batch;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int kv_head = static_cast<int>(blockIdx.y), stages = Traits::stages(batch.max_rows);
  auto &shared =
      *reinterpret_cast<typename Traits::Shared *>(shared_memory + stages * Traits::kWarps * Traits::kTileBytes);
  if (thread == 0) {
    prefetch_tensor_map(&params.maps.k);
    prefetch_tensor_map(&params.maps.v);
  }
  wait_for_previous_kernels();

  // Queries that are known before the lengths are asked for with these, and barriers are made meanwhile.
  const int length = batch.seq_lens[smaller(lane, batch.num_seqs - 1)];
  WarpRing<Traits> ring(params, shared_memory, shared.tile_full[warp], stages);
  QueryChunks<Traits, 1> queries(0, thread);
  const bool queries_known = batch.num_seqs == 1 && batch.query_start_loc == nullptr;
  if (queries_known) queries.fetch(params, {{0, 0, 1, 0}, kv_head, 0, 0, {0, 0}, {0, 0}, 0});
  if (lane == 0) {
    for (int i = 0; i < stages; ++i) init_barrier(&shared.tile_full[warp][i], 1);
    publish_barriers();
  }
  __syncwarp();
  const ColumnPlan<Traits> plan(batch, length);
  let_next_kernel_start();

  uint32_t to_ask = plan.sequences();
  if (to_ask == 0) return;
  ColumnSegment asked = plan.segment(to_ask);
  const auto look_up = [&] {
    ring.look_up(asked.item.seq.index, asked.tile_of(warp), asked.step(), asked.item.keys.end);
  };
  look_up();
  if (!queries_known) queries.fetch(params, asked.item);
  // Asks for the warp's next tile, if there is one.
  const auto ask_next = [&] {
    while (to_ask != 0) {
      if (ring.has_tile(asked.end)) {
        ring.ask(asked.item.keys, kv_head);
        return;
      }
      to_ask &= to_ask - 1;
      if (to_ask == 0) return;
      asked = plan.segment(to_ask);
      look_up();
    }
  };
#pragma unroll 1
  for (int i = 0; i < stages; ++i) ask_next();

  PartJoin<Traits> join(params, shared);
#pragma unroll 1
  for (uint32_t rest = plan.sequences(); rest != 0; rest &= rest - 1) {
    const ColumnSegment segment = plan.segment(rest);
    if (rest != plan.sequences()) queries.fetch(params, segment.item);
    queries.store(params, shared.q, shared.rows);
    fill_row_table<typename Traits::Shape, Traits::kThreads>(params, segment.item, shared.rows, thread);
    __syncthreads();
    WarpRows<Traits> rows(params);
    rows.begin(segment.item, 0, shared.rows, shared.q);
#pragma unroll 1
    for (int tile = segment.tile_of(warp); tile < segment.end; tile += segment.step()) {
      const char *const k_and_v = ring.take(shared_memory);
      const int token = tile * Traits::kTokens;
      typename WarpRows<Traits>::Scores s;
      rows.multiply_q_k(s, k_and_v);
      rows.softmax(s, token);
      rows.multiply_p_v(s, k_and_v + Traits::KvTile::kBytes, token);
      __syncwarp();
      ask_next();
    }
    rows.store_state(join, join.first_state(warp), 0, 1, batch.max_rows);
    __syncthreads();  // and queries may be overwritten
    join.finish(segment);
  }
  join.join_parts();
#else
  __trap();  // chosen only where it has been built for sm_90a
#endif
}

template <class CacheElement, int kHeadDim>
HopperKernel hopper_few_sequences(const char *name) {
  using Traits = FewSequencesTraits<CacheElement, kHeadDim>;
  constexpr auto bytes = [](int rows) { return static_cast<size_t>(Traits::shared_bytes(rows)); };
  constexpr auto no_places = [](bool) { return 0; };
  size_t most = 0;
  for (int rows = 1; rows <= kFewSequencesRows; ++rows) most = most > bytes(rows) ? most : bytes(rows);
  return {{name, reinterpret_cast<const void *>(&hopper_few_sequences_kernel<Traits>), Traits::kThreads, most,
           Traits::kRows, Traits::kTokens, kHeadDim, no_places, 0, false, bytes},
          {Traits::KvTile::kColumns, Traits::KvTile::kRowBytes, Traits::KvTile::kCut, 1}};
}

}  // namespace pagedattn::cuda
