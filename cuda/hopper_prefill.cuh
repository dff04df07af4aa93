// Paged prefill and append on Hopper: sequences of more than 64 query rows a KV head, 16-bit or float8 queries.
//
// SPDX-License-Identifier: Apache-2.0
//
// A tile of query rows meets a tile of keys after the other, from the last to the first.  Three warps only bring data:
// they ask the copy engine (TMA) for the blocks of K, for those of V, and for queries; the first of them also finds the
// work (prefill_schedule.cuh).  Over float8 caches a warpgroup makes float16 of all that (hopper_prefill_float8.cuh).
// The other warpgroups have 64 rows each and share the tiles of K and V; scores and output stay in their registers.
//
// What keeps the tensor cores busy: the product of the next tile's scores and that of this tile's weights and V run
// while softmax works on scores that are done; the warpgroups take turns, so that one's softmax falls into another's
// products; and all this runs on across the ends of items, since an item's first scores are computed beside the last
// product of the item before, whose results are written while other warpgroups multiply.
//
// Bound: the tensor cores.  One prompt of 8192 tokens, 32 heads of 128 over 8: 734 us on an H100, 749 TFLOP/s, where a
// large matrix product makes 767.  docs/performance/prefill.md tells where the rest goes and what was tried.
#pragma once

#include "hopper_prefill_copies.cuh"
#include "hopper_prefill_float8.cuh"
#include "hopper_prefill_float8_products.cuh"
#include "hopper_prefill_float8_rows.cuh"
#include "hopper_prefill_rows.cuh"
#include "hopper_prefill_segments.cuh"
#include "hopper_prefill_traits.cuh"

namespace pagedattn::cuda {

// ---- the warps that bring data -----------------------------------------------------------------------------------

// Behind every wait the lanes of this warp meet: a barrier's phases count as even and odd, and one that the first lane
// set going might be over twice before another lane looks.

// Tells the others of a segment.  Is there one?
template <class Traits>
__device__ bool announce(typename Traits::Shared &shared, uint32_t number) {
  const uint32_t place = number % Traits::kSegments;
  __syncwarp();
  if (arrives_for_warp(threadIdx.x == 0)) arrive(&shared.segment_full[place]);
  return shared.segments[place].valid;
}

template <class Traits>
__device__ Barrier *queries_full(typename Traits::Shared &shared, uint32_t stage) {
  if constexpr (Traits::kFloat8) return &shared.raw.q[stage];
  return &shared.q_full[stage];
}

// Asks for a segment's queries as soon as there is room.
template <class Traits>
__device__ void ask_for_queries(const HopperParams &params, typename Traits::Shared &shared, uint32_t number) {
  using Tile = typename Traits::QTile;
  const WorkItem &item = shared.segments[number % Traits::kSegments].item;
  const uint32_t stage = number % Traits::kQStages;
  uint32_t phase = number / Traits::kQStages;
  if constexpr (Traits::kSavesRegisters) phase = found_here(phase);
  wait(&shared.q_empty[stage], (phase & 1) ^ 1);
  __syncwarp();
  if (threadIdx.x != 0) return;
  int rows = params.batch.tile_queries;
  if constexpr (Traits::kSavesRegisters) rows = found_here(rows);
  rows *= static_cast<int>(params.batch.group.divisor);
  const int token = item.seq.first_token + item.query_tile * params.batch.tile_queries;
  const bool float8 = Traits::kFloat8 && params.q_is_float8;
  Barrier *const full = queries_full<Traits>(shared, stage);
  expect(full, Tile::kColumns * rows * (float8 ? Tile::kWidth / 2 : Tile::kWidth));
#pragma unroll
  for (int column = 0; column < Tile::kColumns; ++column) {
    const int corner[5] = {column * Tile::kColumnElements, 0, item.kv_head, token, 0};
    const int to = column * Tile::kColumnBytes + (float8 ? Traits::kRawQueryPlace : 0);
    copy_box(shared_address(shared.q[stage] + to), &params.maps.q, corner, full);
  }
}

// Behind that.
template <class Traits>
__device__ void end_queries(const HopperParams &params, typename Traits::Shared &shared, uint32_t number) {
  const uint32_t stage = number % Traits::kQStages;
  tell_of_rows(params.batch, shared.segments[number % Traits::kSegments].item, shared.facts[stage]);
  __syncwarp();
  if (arrives_for_warp(threadIdx.x == 0)) arrive(queries_full<Traits>(shared, stage));
}

// Finds the segments behind the first, tells all others of each, and brings its queries.
template <class Traits>
__device__ void produce_queries(const HopperParams &params, typename Traits::Shared &shared,
                                typename Traits::Source &source) {
#pragma unroll 1
  for (uint32_t number = 1;; ++number) {
    wait(&shared.wanted, (number - 1) & 1);
    __syncwarp();
    const uint32_t place = number % Traits::kSegments;
    wait(&shared.segment_empty[place], (number / Traits::kSegments & 1) ^ 1);
    __syncwarp();
    source.next(shared.segments[place]);
    if (!announce<Traits>(shared, number)) return;
    ask_for_queries<Traits>(params, shared, number);
    end_queries<Traits>(params, shared, number);
  }
}

// Over float8 caches: makes float16 of what has come, of K or of the rest.
template <class Traits, bool kKeys>
__device__ void widen_data(const HopperParams &params, typename Traits::Shared &shared) {
  Widener<Traits, kKeys> widener(params, shared);
#pragma unroll 1
  for (WidenerProgress<Traits> at;; at.end_segment()) {
    const PrefillSegment &segment = wait_segment<Traits>(shared, at.number());
    if (!segment.valid) return;
    at.begin_segment(segment.tiles.end - segment.tiles.begin);
    const int kv_head = segment.item.kv_head;
    release_segment<Traits>(shared, at.number());
    if constexpr (!kKeys) widener.widen_queries(at.number(), kv_head);
#pragma unroll 1
    for (; at.tiles_left() > 0; at.end_tile()) widener.widen_tile(at.tile());
  }
}

// ---- the warpgroups that compute ---------------------------------------------------------------------------------

// A warpgroup's way through the segments.
template <class Traits>
class PrefillGroup {
  using Rows = std::conditional_t<Traits::kFloat8Products, Float8Rows<Traits>, WarpgroupRows<Traits>>;
  static constexpr int kTokens = Traits::kTokens;
  static constexpr uint32_t kStages = Traits::kKvStages, kQStages = Traits::kQStages;
  static constexpr int kFirstTurn = Traits::kFirstTurn, kFirstOwn = Traits::kFirstOwn;

 public:
  __device__ PrefillGroup(const HopperParams &params, typename Traits::Shared &shared, int group)
      : params_(params),
        shared_(shared),
        rows_(params, shared, group, kFirstOwn + group),
        leads_warp_(threadIdx.x % 32 == 0),
        turn_(kFirstTurn + group),
        next_turn_(kFirstTurn + (group + 1 == Traits::kGroups ? 0 : group + 1)) {}

  __device__ void run() {
    const PrefillSegment &first_segment = wait_segment<Traits>(shared_, 0);
    if (!first_segment.valid) return;
    // All groups take the same steps, so that waits and arrivals at a turn's barrier alternate; the very last arrival
    // is for nobody.
    if (next_turn_ == kFirstTurn) named_barrier_arrive<256>(kFirstTurn);
    bool plain = false;
    if constexpr (Rows::kPlainScores) {
      if (params_.plain_scale > 0.0f) plain = compute_first();
    }
    // The scores computed in a step are of the segment's next tile, or of the first of the next segment; before the
    // first segment there is one that has nothing.
#pragma unroll 1
    while (true) {
#pragma unroll 1
      while (plain) plain = step<true>(false);
      const bool ends = !__any_sync(kFullWarp, left_ > 0);
      const bool last = ends && !__any_sync(kFullWarp, wait_segment<Traits>(shared_, number_ + 1).valid);
      if (ends) rows_.put_sums_aside();
      if (last) {
        multiply_p_v();
        if constexpr (Traits::kFloat8Products) rows_.multiply_other_columns(shared_.v[tile_ % kStages]);
        wait_products<0>();
        rows_.pin_output();
        first_ = true;
      } else {
        step<false>(ends);
      }
      if (first_) {
        if (has_begun()) {
          rows_.finish(segment(number_));
          if (last) break;
          rows_.template join<false>(segment(number_));
          release_segment<Traits>(shared_, number_);
        } else if constexpr (Traits::kFloat8Products) {
          rows_.clear_output();
        }
        ++number_;
      } else {
        rows_.rescale();
      }
      plain = next_is_plain();
      rows_.template pack_weights<0, Rows::kEights>(s_);
    }
    rows_.template join<true>(segment(number_));
  }

 private:
  __device__ const PrefillSegment &segment(uint32_t number) const {
    return shared_.segments[number % Traits::kSegments];
  }
  __device__ void enter(uint32_t number) {
    left_ = segment(number).tiles.end - segment(number).tiles.begin - 1;
    token_ = (segment(number).tiles.end - 1) * kTokens;
  }
  // Computes the scores of the first tile, if they are plain but for masks, in as few instructions as may be: nothing
  // else goes on meanwhile.  Is the next plain?
  __device__ bool compute_first() {
    number_ = tile_ = 0;
    enter(0);
    begin(0);
    wait_k(0);
    rows_.multiply_q_k(s_, shared_.k[0]);
    wait_products<0>();
    pin(s_);
    release(shared_.k_empty[0]);
    const bool plain = next_is_plain();
    rows_.template softmax<true>(s_, token_);
    end_softmax(0);
    wait_v();
    rows_.template pack_weights<0, Rows::kEights>(s_);
    return plain;
  }
  __device__ void begin(uint32_t number) {
    const uint32_t stage = number % kQStages;
    wait(&shared_.q_full[stage], number / kQStages & 1);
    rows_.begin(segment(number).item, stage);
  }
  // `zero` is one, and says what is to be done before.
  __device__ void wait_k(uint32_t tile, uint32_t zero = 0) {
    wait(&shared_.k_full[tile % kStages], (tile / kStages & 1) | zero);
  }
  __device__ void release(Barrier &empty) const {
    if constexpr (Traits::kKeepsLeader) {
      if (arrives_for_warp(leads_warp_)) arrive(&empty);
    } else {
      if (arrives_for_warp(thread_index() % 32 == 0)) arrive(&empty);
    }
  }

  // Is there a tile whose weights are to meet V?
  __device__ bool has_begun() const { return number_ != ~0u; }

  __device__ void multiply_p_v(bool has_begun = true) {
    char *const v = shared_.v[tile_ % kStages];
    if constexpr (!Traits::kFloat8Products) {
      if (has_begun && (first_ || left_ == 0)) rows_.clear_unseen(v, segment(number_).item.keys, token_);
    }
    rows_.multiply_p_v(v, first_);
  }

  // Lets the queries go behind the segment's last scores, or waits for the next keys: here, where its loop keeps the
  // compiler from waiting for P V before softmax.
  __device__ void end_softmax(uint32_t number) {
    pin(s_);
    if (!__any_sync(kFullWarp, left_ > 0)) {
      release(shared_.q_empty[number % kQStages]);
    } else {
      wait_k(tile_ + 1);
    }
  }
  __device__ void wait_v() { wait(&shared_.v_full[tile_ % kStages], tile_ / kStages & 1); }
  __device__ void end_p_v(bool has_begun = true) {
    if constexpr (Traits::kFloat8Products) rows_.multiply_other_columns(shared_.v[(tile_ - 1) % kStages]);
    wait_products<0>();
    rows_.pin_output();
    if (has_begun) release(shared_.v_empty[(tile_ - 1) % kStages]);
    wait_v();
  }

  // Softmax of a plain tile.  P V is over before half of the weights are there: these are packed beside the others. The
  // compiler would wait for P V at once, but for a wait for keys that seems to depend on the first half.
  __device__ void guess_softmax() {
    constexpr int kHalf = Rows::kEights / 4 * 2;
    float sums[2][2] = {};
    rows_.template guess_weights<0, kHalf>(s_, sums);
    pin(s_);
    const bool last = !__any_sync(kFullWarp, left_ > 0);
    if (!last) wait_k(tile_ + 1, rows_.zero_behind(sums));
    end_p_v();
    rows_.template guess_weights<kHalf, Rows::kEights>(s_, sums);
    rows_.template pack_weights<0, kHalf>(s_);
    if (rows_.is_wrong(sums)) [[unlikely]] {
      rows_.correct_guess(s_, sums, token_);
      rows_.rescale();
      rows_.template pack_weights<0, kHalf>(s_);
    }
    rows_.template pack_weights<kHalf, Rows::kEights>(s_);
    if (last) release(shared_.q_empty[number_ % kQStages]);
  }

  // Asked early, since the answer takes long.
  __device__ bool next_is_plain() const { return __any_sync(kFullWarp, left_ > 0 && rows_.is_plain(token_ - kTokens)); }

  // Computes the scores of the segment's next tile, or if it ends, of the first of the next segment, beside this tile's
  // P V.  Is the tile after that plain?
  template <bool kPlain>
  __device__ bool step(bool ends) {
    if (ends) {
      begin(number_ + 1);
      wait_k(tile_ + 1);
    }
    named_barrier<256>(turn_);
    rows_.multiply_q_k(s_, shared_.k[(tile_ + 1) % kStages]);
    multiply_p_v(kPlain || has_begun());
    named_barrier_arrive<256>(next_turn_);
    ++tile_;
    first_ = ends;
    if (ends) {
      enter(number_ + 1);
    } else {
      --left_;
      token_ -= kTokens;
    }
    wait_products<1>();
    pin(s_);
    release(shared_.k_empty[tile_ % kStages]);
    const bool plain = kPlain && next_is_plain();
    if constexpr (kPlain && Traits::kFloat8Products) {
      end_softmax(number_);
      end_p_v();
      rows_.guess_weights(s_);
    } else if constexpr (kPlain) {
      guess_softmax();
    } else {
      rows_.softmax(s_, token_);
      end_softmax(ends ? number_ + 1 : number_);
      end_p_v(has_begun());
    }
    return plain;
  }

  const HopperParams &params_;
  typename Traits::Shared &shared_;
  Rows rows_;
  bool leads_warp_;  // if it is kept
  int turn_;
  int next_turn_;
  uint32_t number_ = ~0u;  // of the segment
  uint32_t tile_ = ~0u;    // from the kernel's first on, the latest whose scores are there; its weights meet V next
  int token_;              // that tile's first
  int left_ = 0;           // tiles that the segment has behind it
  bool first_ = true;      // in its segment
  typename Rows::Scores s_;
};

// ---- the kernel --------------------------------------------------------------------------------------------------

template <class Traits>
__device__ void init_barriers(typename Traits::Shared &shared) {
  constexpr int kMathWarps = 4 * Traits::kGroups * kWarpArrivals;
  // Warps that widen or transpose, and of these, or of the copiers, those that fill a tile of K and one of V.
  constexpr int kChangers = 4 * (Traits::kFirstMathGroup - 1) * kWarpArrivals;
  constexpr int kFillers = Traits::kFloat8 ? kChangers / 2 : 1,
                kVFillers = Traits::kFloat8 ? kFillers : larger(kChangers, 1);
  for (int i = 0; i < Traits::kQStages; ++i) {
    init_barrier(&shared.q_full[i], Traits::kFloat8 ? kFillers : kWarpArrivals);
    if constexpr (Traits::kFloat8) init_barrier(&shared.raw.q[i], kWarpArrivals);
    init_barrier(&shared.q_empty[i], kMathWarps);
  }
  for (int i = 0; i < Traits::kKvStages; ++i) {
    init_barrier(&shared.k_full[i], kFillers);
    init_barrier(&shared.k_empty[i], kMathWarps);
    init_barrier(&shared.v_full[i], kVFillers);
    if constexpr (Traits::kFloat8) {
      init_barrier(&shared.raw.k[i], 1);
      init_barrier(&shared.raw.v[i], 1);
    }
    if constexpr (Traits::kFloat8Products) {
      init_barrier(&shared.v_rows_full[i], 1);
      init_barrier(&shared.v_rows_empty[i], kVFillers);
    }
    init_barrier(&shared.v_empty[i], kMathWarps);
  }
  init_barrier(&shared.wanted, 1);
  for (int i = 0; i < Traits::kSegments; ++i) {
    init_barrier(&shared.segment_full[i], kWarpArrivals);
    init_barrier(&shared.segment_empty[i], kMathWarps + kChangers + 2 * kWarpArrivals);  // and those that bring K and V
  }
  publish_barriers();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    hopper_prefill_kernel(const __grid_constant__ HopperParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char shared_memory[];
  auto &shared = *reinterpret_cast<typename Traits::Shared *>(shared_memory);
  if (threadIdx.x == 32) {
    for (const CUtensorMap *map : {&params.maps.q, &params.maps.k, &params.maps.v}) prefetch_tensor_map(map);
    init_barriers<Traits>(shared);
  }
  if constexpr (Traits::kFloat8Products) Transposer<Traits>::write_ones(shared);
  wait_for_previous_kernels();
  if (threadIdx.x == 64) count_start(params);
  typename Traits::Schedule schedule(params.batch, shared.schedule);
  schedule.begin();
  // The first segment is found here, since instructions that follow each other come sooner from memory than those that
  // are jumped to.
  typename Traits::Source source(schedule, params.arrivals + kTicketCounter);
  int granule = 0;
  if (threadIdx.x < 32) granule = source.begin(shared.segments[0]);
  __syncthreads();
  // And so is the first data asked for.
  const bool has_work = shared.segments[0].valid;
  if (threadIdx.x < 32 && has_work) ask_for_queries<Traits>(params, shared, 0);
  if (threadIdx.x >= 32 && threadIdx.x < 96 && has_work) {
    TileCopier<Traits>(params, shared, threadIdx.x < 64).ask_for_first(shared.segments[0]);
  }
  if (threadIdx.x < 32) {
    if (has_work) source.make_plan(shared.segments[0], granule);
    if (announce<Traits>(shared, 0)) end_queries<Traits>(params, shared, 0);
  }
  let_next_kernel_start();
  const int warpgroup = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    give_registers<Traits::kProducerRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (!has_work) return;
    if (warp == 0) {
      produce_queries<Traits>(params, shared, source);
    } else if (warp < 3) {
      produce_tiles<Traits>(params, shared, warp == 1);
    }
  } else if (warpgroup < Traits::kFirstMathGroup) {
    give_registers<Traits::kChangerRegisters>();
    if constexpr (Traits::kFloat8) {
      if (threadIdx.x < 192) {
        widen_data<Traits, true>(params, shared);
      } else {
        widen_data<Traits, false>(params, shared);
      }
    }
    if constexpr (Traits::kFloat8Products) transpose_values<Traits>(shared, static_cast<int>(threadIdx.x) / 32 % 4);
  } else {
    take_registers<Traits::kMathRegisters>();
    PrefillGroup<Traits>(params, shared, warpgroup - Traits::kFirstMathGroup).run();
  }
#else
  __trap();  // chosen only where it has been built for sm_90a
#endif
}

template <class Traits>
HopperKernel hopper_prefill_of(const char *name) {
  return {{name, reinterpret_cast<const void *>(&hopper_prefill_kernel<Traits>), Traits::kThreads,
           sizeof(typename Traits::Shared), Traits::kRows, Traits::kTokens, Traits::kHeadDim,
           &Traits::Cut::places_per_block, 0, true},
          Traits::kFloat8 ? CacheRowLayout{1, Traits::kHeadDim, false, 1}
                          : CacheRowLayout{Traits::KvTile::kSideBySide ? Traits::KvTile::kColumns : 1,
                                           Traits::KvTile::kWidth, true, 1}};
}

template <class CacheElement, int kHeadDim>
HopperKernel hopper_prefill(const char *name) {
  return hopper_prefill_of<HopperPrefillTraits<CacheElement, kHeadDim>>(name);
}
// Of queries and caches in float8.
template <class Float8, int kHeadDim>
HopperKernel hopper_prefill_products(const char *name) {
  return hopper_prefill_of<HopperPrefillFloat8Traits<Float8, kHeadDim>>(name);
}

}  // namespace pagedattn::cuda
