// Attention of 64 query rows in one warpgroup's registers, multiplied in float8.
//
// SPDX-License-Identifier: Apache-2.0
//
// Weights.  A weight is a float8 e4m3 with three bits of mantissa, so its exponential need not be exact: as a number,
// its bits are eight times its logarithm to base 2, but for a straight line between powers of two.  So a multiplication
// and an addition make a weight's bits of a score.  Weights are up to 8 % off and 3.1 % in the mean square, where
// rounded exact exponentials are up to 5.9 and 2.6 %; their mean is right.  What they add up to is the product of the
// same weights and a row of ones behind V.
//
// Sums.  The tensor cores align what they add to its largest term and drop what is 2^13 below that, so that sums over
// many keys would lose more and more of each.  Therefore each tile has a product of its own, which is added to those
// before in float32.
#pragma once

#include "hopper_prefill_float8_products.cuh"
#include "hopper_prefill_rows.cuh"

namespace pagedattn::cuda {

// What is not here is as of 16-bit rows.
template <class Traits>
class Float8Rows : public WarpgroupRows<Traits> {
  using Base = WarpgroupRows<Traits>;
  using V = typename Traits::VTile;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kTokens = Traits::kTokens;
  static constexpr int kSteps = kTokens / 32;
  static constexpr int kProducts = Traits::kProducts, kPartColumns = kHeadDim / kProducts;
  // Log 2 of the weight that the score m gets, and of what a weight may be before m is raised.  A float8 holds up to
  // 2^8.8, but has few small weights, which matter too if there are many.
  static constexpr float kWeightOfM = 5.0f, kMostWeight = 7.9f;
  // From logarithms to base 2 to the bits of a float8: of the largest one, from a power of two to the next, and of one.
  // kCentre makes the mean error zero.
  static constexpr float kMostBits = 126.0f, kBitsOfOctave = 8.0f, kBitsOfOne = 56.0f, kCentre = 0.458f;
  static constexpr uint32_t kToLarge = 0x08080808, kLarge = 0x80808080;  // 2^8 and more, plus the one, has the other

 public:
  using typename Base::Scores;
  using typename Base::Sums;

  __device__ Float8Rows(const HopperParams &params, typename Traits::Shared &shared, int group, int barrier)
      : Base(params, shared, group, barrier) {
    clear_output();
  }

  __device__ void begin(const WorkItem &item, uint32_t q_stage) {
    Base::begin(item, q_stage);
    const HopperParams &params = this->params_;
    this->scale_[0] = this->scale_[1] =
        params.q_scale.of_head(item.kv_head) * params.k_scale.of_head(item.kv_head) * this->transformed_scale();
  }

  // Scores of the keys from `token` on, and an m that fits them.
  __device__ void softmax(Scores &s, int token) {
    this->transform_and_mask(s, token);
    raise(s);
  }

  // Weights of a plain tile that is not a segment's first.  It guesses that m stays, and looks whether a weight is
  // large.
  __device__ void guess_weights(const Scores &s) {
    pack_weights<0, Base::kEights>(s);
    bool wrong = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) wrong |= (large_[i] & kLarge) != 0 && this->most_[i] != ~0u;
    if (__any_sync(kFullWarp, wrong)) [[unlikely]] {
      raise(s);
      rescale();
      pack_weights<0, Base::kEights>(s);
    }
  }

  // Weights, as left operands of products with 32 keys each.
  template <int kFirst, int kEnd>
  __device__ void pack_weights(const Scores &s) {
    const float factor = scale() * (kBitsOfOctave / kMostBits);
    constexpr float kOffset = (kBitsOfOne + kWeightOfM * kBitsOfOctave - kCentre) / kMostBits;
    // Infinite where m is minus infinity, so that all weights but those of masked keys are large.
    const float offset[2] = {kOffset - this->m_[0] * (kBitsOfOctave / kMostBits),
                             kOffset - this->m_[1] * (kBitsOfOctave / kMostBits)};
    large_[0] = large_[1] = 0;
#pragma unroll
    for (int t = kFirst / 4; t < kEnd / 4; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float *const first = &s[4 * t + i / 2 * 2][i % 2 * 2], *const second = first + 4;
        const float x[4] = {first[0], first[1], second[0], second[1]};
        p_[t][i] = float8_powers(x, factor, offset[i % 2]);
        large_[i % 2] |= p_[t][i] + kToLarge;
      }
    }
  }

  // Starts the tile's P V: of the last columns and the sums.
  __device__ void multiply_p_v(const char *v_tile, bool) { start<kProducts - 1>(v_tile); }
  // The other columns, which wait for these to be added.
  __device__ void multiply_other_columns(const char *v_tile) {
    static_assert(kProducts <= 2);
    if constexpr (kProducts == 2) {
      wait_products<0>();
      add<1>();
      start<0>(v_tile);
    }
  }
  // Behind a wait for the last of them: adds it to what was before.
  __device__ void pin_output() { add<0>(); }

  __device__ void rescale() {
    if (!this->rescales_) return;
    scale_output(this->factor_);
  }

  // The latest product is still to come, and with it the rest of the weights.
  __device__ void put_sums_aside() {
    *this->sums_aside() = {this->m_[0], this->m_[1], 0.0f, 0.0f};
    this->m_[0] = this->m_[1] = negative_infinity();
  }

  __device__ void finish(const PrefillSegment &segment) {
    const float4 aside = *this->sums_aside();
    Sums sums = {{aside.x, aside.y}, {}};
    constexpr float kOne = 1.0f / (1 << static_cast<int>(kWeightOfM));  // from a weight of m
    scale_output({kOne, kOne});
    // All lanes of a quad have the sum.
#pragma unroll
    for (int i = 0; i < 2; ++i) sums.l[i] = threadIdx.x % 4 == 0 ? this->l_[i] : 0.0f;
    Base::finish(segment, sums);
    clear_output();
  }

  __device__ void clear_output() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) this->o_[i][j] = 0.0f;
    }
    this->l_[0] = this->l_[1] = 0.0f;
  }

 private:
  template <int kPart>
  static constexpr int kColumnsOf = kPartColumns + (kPart + 1 == kProducts ? Traits::kSumRows : 0);

  template <int kPart>
  __device__ void start(const char *v_tile) {
    constexpr int kColumns = kColumnsOf<kPart>;
    const Operand v = operand<V>(shared_address(v_tile + kPart * kPartColumns / 8 * V::kEightRows));
    fence_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Products<typename Traits::Math, kColumns>::p_v(reinterpret_cast<float (&)[kColumns / 8][4]>(product_), p_[step],
                                                     further(v, V::step_offset(step)), step > 0);
    }
    commit_products();
  }
  template <int kPart>
  __device__ void add() {
    pin(reinterpret_cast<float (&)[kColumnsOf<kPart> / 8][4]>(product_));
    if constexpr (kPart == 0) pin(p_);
#pragma unroll
    for (int i = 0; i < kPartColumns / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) this->o_[kPart * kPartColumns / 8 + i][j] += product_[i][j];
    }
    if constexpr (kPart + 1 == kProducts) {
#pragma unroll
      for (int i = 0; i < 2; ++i) this->l_[i] += product_[kPartColumns / 8][2 * i];
    }
    if constexpr (kProducts > 1)
      pin(reinterpret_cast<float (&)[kPartColumns / 8][4]>(this->o_[kPart * kPartColumns / 8]));
  }

  __device__ void scale_output(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) this->o_[i][j] *= factor[j / 2];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) this->l_[i] *= factor[i];
  }

  // What turns s into units of log 2.
  __device__ float scale() const { return this->scores_are_plain() ? this->scale_[0] : 1.0f; }

  // Brings m to the largest score where weights would be too large.
  __device__ void raise(const Scores &s) {
    float largest[2][2];
    this->find_largest(s, largest);
    bool changes = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float most = this->quad_max(fmaxf(largest[i][0], largest[i][1])) * scale(), before = this->m_[i];
      this->factor_[i] = 1.0f;
      if (most - before > kMostWeight - kWeightOfM) {
        this->m_[i] = most;
        this->factor_[i] = exp2_fast(before - most);
        changes = true;
      }
    }
    this->rescales_ = __any_sync(kFullWarp, changes);
  }

  // exp2(x / kBitsOfOctave), but for factors and offsets.  Times the smallest number, the bits come out as an integer.
  __device__ static uint32_t float8_powers(const float (&x)[4], float factor, float offset) {
    int bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float share = __saturatef(fmaf(x[i], factor, offset));  // of the largest one's bits; of NaN 0
      bits[i] = __float_as_int(__fmul_rn(share, __int_as_float(static_cast<int>(kMostBits))));
    }
    return pack_bytes(bits);
  }
  // The first in the lowest byte.
  __device__ static uint32_t pack_bytes(const int (&x)[4]) {
    uint32_t packed;
    asm("{\n"
        ".reg .b32 upper;\n"
        "cvt.pack.sat.u8.s32.b32 upper, %4, %3, 0;\n"
        "cvt.pack.sat.u8.s32.b32 %0, %2, %1, upper;\n"
        "}"
        : "=r"(packed)
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]));
    return packed;
  }

  uint32_t p_[kSteps][4];
  uint32_t large_[2];                                        // of the weights of a row, as a mask
  float product_[(kPartColumns + Traits::kSumRows) / 8][4];  // the latest
};

}  // namespace pagedattn::cuda
