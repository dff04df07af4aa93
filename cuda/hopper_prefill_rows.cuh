// Attention of 64 query rows in one warpgroup's registers: scores, online softmax and output by wgmma.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention_epilogue.cuh"
#include "hopper_params.cuh"
#include "hopper_prefill_join.cuh"
#include "hopper_ptx.cuh"
#include "hopper_row_results.cuh"
#include "hopper_wgmma.cuh"
#include "prefill_schedule.cuh"
#include "scores.cuh"

namespace pagedattn::cuda {

template <class Traits>
class WarpgroupRows {
  using Math = typename Traits::Math;
  using Q = typename Traits::QTile;
  using Kv = typename Traits::KvTile;
  static constexpr int kTokens = Traits::kTokens;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr bool kOwnScales = Traits::kFloat8 || Traits::kFloat8Products;
  // Log 2 of the weight that a key may have before sums are brought to a larger m: far from what a float16 holds.
  static constexpr float kLargestStep = 8.0f;
  static constexpr float kLargestWeight = 256.0f;
  // Weights beyond this, which float32 still holds, are computed anew.
  static constexpr float kFarthestWeight = 1e30f;

 public:
  static constexpr bool kPlainScores = !kOwnScales;  // for all rows, or for none, as the launch says
  static constexpr int kEights = kTokens / 8;        // of keys in a tile
  // Columns that a product with V has: no more than the registers that the kernel starts with have room for.
  static constexpr int kParts = kHeadDim > 192 && Traits::kRegisters < 160 ? 2 : 1, kPartColumns = kHeadDim / kParts;
  using Scores = float[kEights][4];

  // Of the two rows of a thread: the largest score in units of log 2, and the sum of exp2(score - m) over the thread's
  // own keys.
  struct Sums {
    float m[2];
    float l[2];
  };

  __device__ WarpgroupRows(const HopperParams &params, typename Traits::Shared &shared, int group, int barrier)
      : params_(params), shared_(shared), group_(group), barrier_(barrier) {
    reset_sums();
  }

  // The next scores are of this item's queries, its first.
  __device__ void begin(const WorkItem &item, uint32_t q_stage) {
    item_ = &item;
    q_tile_ = shared_.q[q_stage];
    q_ = operand<Q>(shared_address(q_tile_ + Q::offset(64 * group_, 0)));
    const auto &facts = shared_.facts[q_stage];
    visible_to_all_ = facts.visible_to_all[find_group()];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own_row() + 8 * i;
      if constexpr (Traits::kFloat8) scale_[i] = shared_.raw.factors[q_stage][row] * transformed_scale();
      // Rows that no token has hold others' queries, or what was there before: they must not decide.
      most_[i] = row < facts.num_rows ? __float_as_uint(kLargestWeight) : ~0u;
    }
  }

  // Starts s = Q K^T.
  __device__ void multiply_q_k(Scores &s, const char *k_tile) const {
    start_q_k<Math, Q, Kv, kHeadDim / Traits::kStepDims>(s, q_, operand<Kv>(shared_address(k_tile)));
  }

  // Do all rows see all keys of the tile from `token` on, and are scores just products times a positive number?
  __device__ bool is_plain(int token) const {
    return token >= visible_to_all_.begin && token + kTokens <= visible_to_all_.end && scores_are_plain();
  }

  // Scores of the keys from `token` on become exp2(score - m) for the new m.
  template <bool kPlain = false>
  __device__ void softmax(Scores &s, int token) {
    const bool plain = kPlain || scores_are_plain();
    if (!plain) transform(s, token);
    mask(s, token);
    softmax_of_unmasked(s, {plain ? scale_of(0) : 1.0f, plain ? scale_of(1) : 1.0f});
    rescales_ = __any_sync(kFullWarp, factor_[0] != 1.0f || factor_[1] != 1.0f);
  }

  // Products with the keys from `token` on become scores, in units of log 2 unless they are plain.
  __device__ void transform_and_mask(Scores &s, int token) const {
    if (!scores_are_plain()) transform(s, token);
    mask(s, token);
  }
  __device__ void transform(Scores &s, int token) const {
    const float factors[2] = {kOwnScales ? scale_[0] : transformed_scale(),
                              kOwnScales ? scale_[1] : transformed_scale()};
    const float slope[2] = {slope_of(own_row()), slope_of(own_row() + 8)};
    const int position[2] = {position_of(own_row()), position_of(own_row() + 8)};
    transform_scores(s, params_, factors, slope, position, token, lane_of_row());
  }
  __device__ void mask(Scores &s, int token) const {
    if (token >= visible_to_all_.begin && token + kTokens <= visible_to_all_.end) return;
    const Range keys[2] = {keys_of(own_row()), keys_of(own_row() + 8)};
    mask_scores_by_bits(s, keys, token, lane_of_row());
  }

  // The same of a plain tile that is not a segment's first, some eights of keys at a time.  It guesses that m stays,
  // since to find the largest score takes long, and is right but for few tiles, where a row's weights sum up to too
  // much.
  template <int kFirst, int kEnd>
  __device__ void guess_weights(Scores &s, float (&sums)[2][2]) const {
#pragma unroll
    for (int tile = kFirst; tile < kEnd; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[tile][j] = exp2_fast(s[tile][j] * scale_of(j / 2) - m_[j / 2]);
        sums[j / 2][j % 2] += s[tile][j];
      }
    }
  }

  // A zero that the compiler believes to depend on these.
  __device__ uint32_t zero_behind(const float (&sums)[2][2]) const {
    return (__float_as_uint(sums[0][0]) | __float_as_uint(sums[0][1]) | __float_as_uint(sums[1][0]) |
            __float_as_uint(sums[1][1])) &
           params_.zero;
  }

  // Is the guess wrong for one of the warp's rows?  If not, the sums count.
  __device__ bool is_wrong(float (&sums)[2][2]) {
    bool wrong = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i][0] += sums[i][1];
      wrong |= __float_as_uint(sums[i][0]) > most_[i];  // also NaN, where m is minus infinity
    }
    if (__any_sync(kFullWarp, wrong)) [[unlikely]]
      return true;
#pragma unroll
    for (int i = 0; i < 2; ++i) l_[i] += sums[i][0];
    return false;
  }

  // Then s has exp2(score - m) of the keys from `token` on, of which a row's are too large.
  __device__ void correct_guess(Scores &s, const float (&sums)[2][2], int token) {
    rescales_ = true;
    bool redo = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = sums[i][0];
      redo |= __float_as_uint(sum) > most_[i] && (!(sum <= kFarthestWeight) || m_[i] == negative_infinity());
    }
    if (__any_sync(kFullWarp, redo)) {
      multiply_q_k_again(s, token);
      softmax_of_unmasked(s, {scale_of(0), scale_of(1)});
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = s[0][2 * i];
#pragma unroll
      for (int tile = 0; tile < kTokens / 8; ++tile)
        largest = fmaxf(largest, fmaxf(s[tile][2 * i], s[tile][2 * i + 1]));
      largest = quad_max(largest);
      // A row decides by its own weights alone, whatever others' have come to.
      const float step = quad_max(sums[i][0]) > kLargestWeight ? ceilf(__log2f(largest)) : 0.0f;
      factor_[i] = exp2_fast(-step);
      m_[i] += step;
      l_[i] = (l_[i] + sums[i][0]) * factor_[i];
#pragma unroll
      for (int tile = 0; tile < kTokens / 8; ++tile) {
        s[tile][2 * i] *= factor_[i];
        s[tile][2 * i + 1] *= factor_[i];
      }
    }
  }

  // What softmax has made of the scores becomes the left operand of P V.
  template <int kFirst, int kEnd>
  __device__ void pack_weights(const Scores &s) {
#pragma unroll
    for (int t = kFirst / 2; t < kEnd / 2; ++t) pack_keys<Math>(p_[t], s, t);
  }

  // Starts O += P V, or O = P V of an item's first keys.
  __device__ void multiply_p_v(const char *v_tile, bool first) {
    const Operand v = operand<Kv>(shared_address(v_tile));
    fence_products();
#pragma unroll
    for (int step = 0; step < kTokens / 16; ++step) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Products<Math, kPartColumns>::p_v(
            reinterpret_cast<float (&)[kPartColumns / 8][4]>(o_[part * (kPartColumns / 8)]), p_[step],
            further(v, step * 2 * Kv::kEightRows + part * (kPartColumns / Kv::kColumnElements) * Kv::kColumnBytes),
            step > 0 || !first);
      }
    }
    commit_products();
  }

  // Behind a wait for P V.  The weights stay in their registers until then, or the compiler waits where it wants these
  // for something else.
  __device__ void pin_output() {
    pin(o_);
    pin(p_);
  }
  // Brings O to the m of the latest scores, which are of the same item.
  __device__ void rescale() {
    if (!rescales_) return;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) o_[i][j] *= factor_[j / 2];
    }
  }

  // What the item's rows have come to waits for the end in shared memory, which registers have no room for; the next
  // scores are another's first.
  __device__ void put_sums_aside() {
    *sums_aside() = {m_[0], m_[1], l_[0], l_[1]};
    reset_sums();
  }

  // Rows of V that no query sees may hold anything, where their box has others that are seen: zeros take their place.
  // All groups write them, since none waits for another: also while another's product already reads the same zeros, but
  // before the group lets the tile go.
  __device__ void clear_unseen(char *v_tile, Range keys, int token) const {
    const Range seen = {clamp_to(keys.begin - token, 0, kTokens), clamp_to(keys.end - token, 0, kTokens)};
    const int box = params_.maps.box_tokens;
    Range brought = {0, kTokens};  // not as zeros
    if ((box & (box - 1)) == 0) brought = {seen.begin & -box, (seen.end + box - 1) & -box};
    if (seen.begin == brought.begin && seen.end == brought.end) return;
    const int thread = block_thread() % 128;
    const auto clear = [&](int first, int end) {
      constexpr int kChunks = Kv::kColumns * Kv::kColumnChunks;
#pragma unroll 1  // it lies in the loops over tiles, and is for few
      for (int i = thread; i < (end - first) * kChunks; i += 128) {
        *reinterpret_cast<uint4 *>(v_tile + Kv::offset(first + i / kChunks, i % kChunks)) = {};
      }
    };
    clear(brought.begin, seen.begin);
    clear(seen.end, brought.end);
    publish_shared_writes();
    named_barrier<128>(barrier_);
  }

  // Ends a segment: writes the rows' results, or a partial result.
  __device__ void finish(const PrefillSegment &segment) {
    const float4 aside = *sums_aside();
    finish(segment, {{aside.x, aside.y}, {aside.z, aside.w}});
  }
  // Behind that, joins the partial results.  Is the segment the block's last?
  template <bool kLast>
  __device__ void join(const PrefillSegment &segment) {
    if (segment.plan.num_segments <= 1) return;
    parts_of(segment).template join<kLast>();
    // The next product does not read the output, but the compiler would keep it for that while parts are joined.
    if constexpr (Traits::kClearsJoined && !kLast) clear_output();
  }

 protected:
  // The lane's place in its warp's room for results.
  __device__ float4 *sums_aside() const {
    ResultsRoom &room = shared_.results[4 * group_ + block_thread() % 128 / 32];
    return reinterpret_cast<float4 *>(room.bytes) + block_thread() % 32;
  }
  __device__ void reset_sums() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m_[i] = negative_infinity();
      l_[i] = 0.0f;
    }
  }
  __device__ void finish(const PrefillSegment &segment, Sums sums) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums.l[i] += __shfl_xor_sync(kFullWarp, sums.l[i], 1);
      sums.l[i] += __shfl_xor_sync(kFullWarp, sums.l[i], 2);
    }
    if (segment.plan.num_segments > 1) {
      parts_of(segment).store(own_row(), o_, sums.m, sums.l);
    } else {
      write(segment.item, sums);
    }
  }
  __device__ PartialRows<Traits> parts_of(const PrefillSegment &segment) const {
    return {params_, shared_, segment, group_, barrier_, block_thread() % 128};
  }
  __device__ void clear_output() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) o_[i][j] = 0.0f;
    }
    pin(o_);
  }

  // What turns products into units of log 2, or into what transform_scores takes.  Over float8 caches a row has its
  // own; else it is a constant of the launch, which saves a register that each score would read.
  __device__ float scale_of(int i) const {
    if constexpr (kOwnScales) return scale_[i];
    return params_.plain_scale;
  }
  __device__ float transformed_scale() const {
    return params_.softcap > 0.0f ? params_.scale / params_.softcap : params_.scale * kLog2E;
  }
  // Are scores just products times a positive number?  A row's may be too small for one.
  __device__ bool scores_are_plain() const {
    if constexpr (kOwnScales) return params_.plain_scale > 0.0f && scale_[0] > 0.0f && scale_[1] > 0.0f;
    return params_.plain_scale > 0.0f;
  }

  __device__ static int block_thread() {
    const int thread = thread_index();
    // What is told of its range takes instructions and a register from what comes of it.
    if constexpr (Traits::kFloat8 && kHeadDim > 128) {
      __builtin_assume(thread >= 128 * Traits::kFirstMathGroup && thread < Traits::kThreads);
    }
    return thread;
  }
  // Of the four that have a row.
  __device__ static int lane_of_row() {
    return (kHeadDim <= 128 && !Traits::kFloat8 ? static_cast<int>(threadIdx.x) : block_thread()) % 4;
  }
  // The group, where that takes fewer of the uniform registers.
  __device__ int find_group() const {
    if constexpr (kHeadDim <= 128) return group_;
    return block_thread() / 128 - Traits::kFirstMathGroup;
  }
  // Of the item's tile, the thread's first; the other is the eighth after it.
  __device__ static int own_row() {
    const int thread = block_thread() - 128 * Traits::kFirstMathGroup;
    return thread / 32 * 16 + thread % 32 / 4;
  }

  __device__ static float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
    return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
  }

  // The largest scores of a thread's rows, each of two halves: several chains, since a warp has few others to hide its
  // latencies.
  __device__ static void find_largest(const Scores &s, float (&largest)[2][2]) {
#pragma unroll
    for (int tile = 0; tile < kTokens / 8; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float &most = largest[j / 2][j % 2];
        most = tile == 0 ? s[tile][j] : fmaxf(most, s[tile][j]);
      }
    }
  }

  // `scale` turns what s holds into units of log 2.
  __device__ void softmax_of_unmasked(Scores &s, const float (&scale)[2]) {
    float largest[2][2];
    find_largest(s, largest);
    float subtracted[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = quad_max(fmaxf(largest[i][0], largest[i][1])) * scale[i];
      // Small steps are not worth the rescaling.
      if (most - m_[i] <= kLargestStep) most = m_[i];
      subtracted[i] = most == negative_infinity() ? 0.0f : most;
      factor_[i] = exp2_fast(m_[i] - subtracted[i]);
      m_[i] = most;
    }
    float sum[2][2] = {};
#pragma unroll
    for (int tile = 0; tile < kTokens / 8; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[tile][j] = exp2_fast(s[tile][j] * scale[j / 2] - subtracted[j / 2]);
        sum[j / 2][j % 2] += s[tile][j];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) l_[i] = l_[i] * factor_[i] + (sum[i][0] + sum[i][1]);
  }

  // By one warp alone, for its 16 rows, with keys from where they come from: their tile is somebody else's by now.
  __device__ void multiply_q_k_again(Scores &s, int token) const {
    const int lane = block_thread() % 32, first_row = own_row() - lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTokens / 8; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[tile][j] = 0.0f;
    }
#pragma unroll 1
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t q[4];
      load_matrices(q, shared_address(q_tile_ + Q::offset(first_row + lane % 16, 2 * step + lane / 16)));
#pragma unroll
      for (int tile = 0; tile < kTokens / 8; ++tile) {
        if constexpr (Traits::kFindsKeysInTurn) token = found_here(token);
        const char *const k = key(token + tile * 8 + lane / 4);
        const int first = step * 16 + lane % 4 * 2, second = first + 8;
        multiply_add<Math>(s[tile], q, first < params_.head_dim ? load_pair(k, first) : 0,
                           second < params_.head_dim ? load_pair(k, second) : 0);
      }
    }
  }
  // Two neighbours of a row of the cache.
  __device__ static uint32_t load_pair(const char *row, int dimension) {
    if constexpr (Traits::kFloat8) {
      uint32_t pair, unused;
      widen<typename Traits::CacheElement>(*reinterpret_cast<const uint16_t *>(row + dimension), pair, unused);
      return pair;
    }
    return *reinterpret_cast<const uint32_t *>(row + 2 * dimension);
  }
  __device__ const char *key(int token) const {
    const int *const table = params_.block_tables + item_->seq.index * params_.block_table_stride;
    const int block = params_.block_size.divide(token),
              place = token - block * static_cast<int>(params_.block_size.divisor);
    const CachePointer &cache = params_.k_cache;
    return cache.data + clamp_to(table[block], 0, params_.last_block) * cache.block_stride +
           place * cache.token_stride + item_->kv_head * cache.head_stride;
  }

  // Of a row of the current item's tile.
  __device__ Range keys_of(int row) const { return keys_of_row(params_.batch, *item_, row); }
  __device__ int position_of(int row) const {
    return item_->seq.length - item_->seq.num_queries + query_of_row(params_.batch, *item_, row);
  }
  __device__ float slope_of(int row) const {
    return params_.alibi_slopes == nullptr ? 0.0f : params_.alibi_slopes[head_of(*item_, row)] * kLog2E;
  }
  __device__ int head_of(const WorkItem &item, int row) const {
    const int group = static_cast<int>(params_.batch.group.divisor);
    return item.kv_head * group + row - params_.batch.group.divide(row) * group;
  }

  __device__ void write(const WorkItem &item, const Sums &sums) const {
    float factors[2];
    int64_t offsets[2];
    end_rows(item, sums, offsets, factors);
    const SharedAddress room = shared_address(shared_.results[4 * group_ + block_thread() % 128 / 32].bytes);
    // A warp's room is its own.  The group's barrier, since behind __syncwarp ptxas believes that warps part, and keeps
    // operands of products out of the uniform registers.
    const auto meet = [&] { named_barrier<128>(barrier_); };
    if constexpr (!kOwnScales) {
      write_rows<Math>(params_, room, o_, offsets, factors, meet);
    } else if (params_.out_is_bfloat16) {
      write_rows<__nv_bfloat16>(params_, room, o_, offsets, factors, meet);
    } else {
      write_rows<__half>(params_, room, o_, offsets, factors, meet);
    }
  }
  // Where rows' results go, or -1 where no token has one; `factors` are what output is to be multiplied with.
  __device__ void end_rows(const WorkItem &item, const Sums &sums, int64_t (&offsets)[2], float (&factors)[2]) const {
    const int group = static_cast<int>(params_.batch.group.divisor), num_rows = tile_rows(params_.batch, item);
    int64_t tokens[2];
    int heads[2];
    bool exist[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own_row() + 8 * i, query = params_.batch.group.divide(row);
      exist[i] = row < num_rows;
      tokens[i] = item.seq.first_token + item.query_tile * params_.batch.tile_queries + query;
      heads[i] = item.kv_head * group + row - query * group;
    }
    cuda::end_rows(params_, tokens, heads, item.kv_head, sums.m, sums.l, exist, block_thread() % 4 == 0, factors);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      offsets[i] = exist[i] ? tokens[i] * params_.out.token_stride + heads[i] * params_.out.head_stride : -1;
    }
  }

  const HopperParams &params_;
  typename Traits::Shared &shared_;
  int group_;
  int barrier_;
  const WorkItem *item_;
  const char *q_tile_;
  float scale_[2];  // of the rows' products, over float8 caches
  Operand q_;
  Range visible_to_all_;  // of the group's rows
  float m_[2];
  float l_[2];
  bool rescales_;     // is a factor not 1?
  uint32_t most_[2];  // the largest sum of a guess's weights, as a number
  float factor_[2];   // from the m before to this
  uint32_t p_[kTokens / 16][4];
  float o_[kHeadDim / 8][4];
};

}  // namespace pagedattn::cuda
