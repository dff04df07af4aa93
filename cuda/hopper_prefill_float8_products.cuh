// Prefill that multiplies in float8: its tiles, and the warps that transpose V.
//
// SPDX-License-Identifier: Apache-2.0
//
// Of float8 operands wgmma sums over what lies side by side in shared memory alone: of Q and K the dimensions, of P and
// V the keys.  V has its dimensions side by side in the cache, so a tile of it is transposed in shared memory: ldmatrix
// gives a lane two dimensions of two keys, byte permutations sort these by dimension, and stmatrix writes them out.
//
// Keys come in an order that suits P.  Of 16 keys a lane holds the scores of 2 c, 2 c + 1, 2 c + 8 and 2 c + 9, c being
// lane % 4, where a float8 left operand has places 4 c ... 4 c + 3.  What ldmatrix gives lane c are the same keys.  So
// place 4 c + i of the transposed V has the key whose weight is there, and no weight goes to another lane.
//
// One prompt of 8192 tokens, 32 heads of 128 over 8: 602 us on an H100, 913 TFLOP/s, where bfloat16 takes 752; of 192
// 943, where it takes 1051.  docs/performance/prefill.md tells what was tried.
#pragma once

#include <numeric>
#include <type_traits>

#include "hopper_prefill_segments.cuh"
#include "hopper_prefill_traits.cuh"
#include "hopper_wgmma.cuh"

namespace pagedattn::cuda {

// Queries and caches are of the same type.
template <class Float8, int kHeadDim_>
struct HopperPrefillFloat8Traits {
  using CacheElement = Float8;
  using Math = Float8;
  static constexpr bool kFloat8 = false;  // nothing is widened
  static constexpr bool kFloat8Products = true;
  static constexpr bool kKeepsLeader = false;
  static constexpr bool kSavesRegisters = false;
  static constexpr bool kClearsJoined = false;
  static constexpr int kStepDims = 32;        // that a product sums over
  static constexpr int kHeadDim = kHeadDim_;  // D is at most this; dimensions past D are zeros
  static_assert(kHeadDim % 32 == 0 && kHeadDim <= 192);
  // Above 128 dimensions registers have no room for output, a product of as many columns, and scores, so P V comes in
  // products of some columns, one after the other.
  static constexpr int kProducts = kHeadDim <= 128 ? 1 : 2;

  static constexpr int kGroups = 2;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kTokens = kHeadDim <= 96 ? 128 : kHeadDim <= 128 ? 96 : 64;
  struct Shape : PrefillShape<kRows, kTokens> {};
  using Cut = WorkCut<Shape>;

  // The first warpgroup brings data; the second transposes V.
  static constexpr int kFirstMathGroup = 2;
  static constexpr int kTransposers = 4;  // warps
  static constexpr int kThreads = 128 * (kFirstMathGroup + kGroups);
  // Of a thread as the kernel starts, and then of the warpgroups that bring data, that transpose V and that compute.
  static constexpr int kRegisters = 128;
  static constexpr int kProducerRegisters = kHeadDim <= 96 ? 40 : 32;
  static constexpr int kChangerRegisters = kHeadDim <= 64 ? 64 : kHeadDim <= 96 ? 40 : 48;
  static constexpr int kMathRegisters = kHeadDim <= 64 ? 200 : 216;
  static_assert(kProducerRegisters + kChangerRegisters + kGroups * kMathRegisters <= 4 * kRegisters);

  // Up to 128 bytes a row, at whose end zeros may stand; beyond, columns that rows fill, so that the copy engine brings
  // them side by side.
  static constexpr int kColumnWidth = kHeadDim == 192 ? 64 : 128;
  using QTile = ColumnTile<kRows, kHeadDim, false, 1, kColumnWidth>;
  using KvTile = ColumnTile<kTokens, kHeadDim, (kHeadDim > 128), 1, kColumnWidth>;
  // Transposed, with rows behind, every other of ones: their product with P is the sum of the weights.
  static constexpr int kSumRows = 8;
  static constexpr int kTransposedWidth = kTokens <= 64 ? 64 : 128;
  using VTile = ColumnTile<kHeadDim + kSumRows, kTokens, false, 1, kTransposedWidth>;
  static constexpr int kRawBytes = KvTile::kBytes;
  static constexpr int kRawQueryPlace = 0;
  static constexpr int kBoxColumns = KvTile::kColumns;
  static constexpr int kQStages = 2;
  static constexpr int kKvStages = kTokens <= 96 ? 4 : 3;  // of K, of V as it comes, and of V transposed

  using Schedule = PrefillSchedule<Shape, kThreads, 2 * kHeadDim>;
  using Source = PrefillSource<Shape, Schedule>;
  // Named barriers, one a group.
  static constexpr int kFirstTurn = 1, kFirstOwn = kFirstTurn + kGroups;
  static constexpr int kSegments = 4;    // in work, and ahead
  static constexpr int kTilesAhead = 3;  // of a segment's last that the next is wanted

  struct Shared {
    char q[kQStages][QTile::kBytes];
    char k[kKvStages][KvTile::kBytes];
    char v_rows[kKvStages][KvTile::kBytes];  // as they come
    char v[kKvStages][VTile::kBytes];
    Barrier q_full[kQStages];
    Barrier q_empty[kQStages];
    Barrier k_full[kKvStages];
    Barrier k_empty[kKvStages];
    Barrier v_rows_full[kKvStages];
    Barrier v_rows_empty[kKvStages];
    Barrier v_full[kKvStages];
    Barrier v_empty[kKvStages];
    Barrier wanted;  // the next segment
    Barrier segment_full[kSegments];
    Barrier segment_empty[kSegments];
    PrefillSegment segments[kSegments];
    RowFacts<kGroups> facts[kQStages];
    ResultsRoom results[4 * kGroups];  // of a warp's rows each
    JoinShare join_share[kGroups];
    typename Schedule::Shared schedule;
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "what a block may have on sm_90");

  __device__ static TileRing ring(Shared &shared, bool keys) {
    return keys ? TileRing{shared.k[0], shared.k_full, shared.k_empty}
                : TileRing{shared.v_rows[0], shared.v_rows_full, shared.v_rows_empty};
  }
  __device__ static constexpr int raw_row(int row, int column) {
    return KvTile::offset(row, column * KvTile::kColumnChunks);
  }
};

// One of the warps that transpose V.
template <class Traits>
class Transposer {
  using Rows = typename Traits::KvTile;
  using Columns = typename Traits::VTile;
  static constexpr int kDimsAtOnce = 32, kKeysAtOnce = 16;
  static constexpr int kSlices = Traits::kHeadDim / kDimsAtOnce, kSixteens = Traits::kTokens / kKeysAtOnce;
  // Some warps share the dimensions among them, and the keys with as many others.
  static constexpr int kBeside = std::gcd(kSlices, Traits::kTransposers);
  static constexpr int kBehind = Traits::kTransposers / kBeside;
  static constexpr int kBatch = kSixteens / kBehind % 4 == 0   ? 4
                                : kSixteens / kBehind % 3 == 0 ? 3
                                                               : 2;  // loads on their way
  static_assert(kSixteens % (kBehind * kBatch) == 0);

 public:
  __device__ Transposer(typename Traits::Shared &shared, int warp)
      : shared_(shared),
        lane_(static_cast<int>(threadIdx.x) % 32),
        first_slice_(warp % kBeside),
        first_sixteen_(warp / kBeside) {
    from_ = static_cast<uint32_t>(Rows::offset(first_sixteen_ * kKeysAtOnce + lane_ % 16, lane_ / 16));
    // Rows that follow each other in a matrix go to different banks: four of even dimensions, then four of odd ones.
    const int row = lane_ % 8, dimension = lane_ / 16 * 16 + row * 2 + ((lane_ / 8 + row / 4) & 1);
    to_ = static_cast<uint32_t>(Columns::offset(dimension, 0));
    first_bytes_ = lane_ / 4 < 4 ? 0x6420 : 0x7531;
  }

  // By the whole block: the rows of ones in all tiles, so that each lane of a quad gets the sum.
  static __device__ void write_ones(typename Traits::Shared &shared) {
    constexpr uint32_t kOnes = std::is_same_v<typename Traits::CacheElement, Float8E4M3> ? 0x38383838 : 0x3c3c3c3c;
    constexpr int kChunks = Columns::kColumnChunks, kOfTile = Traits::kSumRows * kChunks;
    for (int i = static_cast<int>(threadIdx.x); i < Traits::kKvStages * kOfTile; i += Traits::kThreads) {
      const int row = i % kOfTile / kChunks;
      const uint32_t word = row % 2 == 0 ? kOnes : 0;
      char *const chunk = shared.v[i / kOfTile] + Columns::offset(Traits::kHeadDim + row, i % kChunks);
      *reinterpret_cast<uint4 *>(chunk) = {word, word, word, word};
    }
    publish_shared_writes();
  }

  // The tiles of a segment from the last on.  Keys that no query sees may hold anything: zeros take their place.
  __device__ void transpose_segment(Range tiles, Range keys) {
#pragma unroll 1
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile, ++count_) {
      const uint32_t stage = count_ % Traits::kKvStages, phase = count_ / Traits::kKvStages & 1;
      wait(&shared_.v_rows_full[stage], phase);
      wait(&shared_.v_empty[stage], phase ^ 1);
      __syncwarp();
      const int token = tile * Traits::kTokens;
      const SharedAddress from = shared_address(shared_.v_rows[stage]), to = shared_address(shared_.v[stage]);
      if (keys.begin <= token && token + Traits::kTokens <= keys.end) {
        transpose<false>(from, to, {});
      } else {
        transpose<true>(from, to, {keys.begin - token, keys.end - token});
      }
      publish_shared_writes();
      __syncwarp();
      if (arrives_for_warp(lane_ == 0)) {
        arrive(&shared_.v_rows_empty[stage]);
        arrive(&shared_.v_full[stage]);
      }
    }
  }

 private:
  // `keys` are to stay.
  template <bool kMasked>
  __device__ void transpose(SharedAddress from, SharedAddress to, Range keys) const {
#pragma unroll 1
    for (int slice = first_slice_; slice < kSlices; slice += kBeside) {
      constexpr int kOfColumn = Rows::kColumns == 1 ? kSlices : Rows::kColumnSteps;
      const int column = Rows::kColumns == 1 ? 0 : slice / kOfColumn;
      const SharedAddress rows = (from + from_ + static_cast<SharedAddress>(column * Rows::kColumnBytes)) ^
                                 static_cast<SharedAddress>((slice - column * kOfColumn) * kDimsAtOnce);
      const SharedAddress columns =
          to + to_ + static_cast<SharedAddress>(slice * (kDimsAtOnce / 8) * Columns::kEightRows);
#pragma unroll 1
      for (int i = 0; i < kSixteens / kBehind; i += kBatch) {
        uint32_t x[kBatch][4];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          load_matrices_transposed(x[j], rows + static_cast<SharedAddress>((i + j) * kBehind * 2 * Rows::kEightRows));
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int sixteen = first_sixteen_ + (i + j) * kBehind;
          const uint32_t mask = kMasked ? mask_of(sixteen * kKeysAtOnce, keys) : ~0u;
          uint32_t y[4];
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            y[k] = __byte_perm(x[j][k], x[j][k + 1], first_bytes_) & mask;
            y[k + 1] = __byte_perm(x[j][k], x[j][k + 1], first_bytes_ ^ 0x1111) & mask;
          }
          store_matrices(columns ^ static_cast<SharedAddress>(sixteen * 16), y);
        }
      }
    }
  }
  // Bytes of this lane's keys of these 16 that are to stay.
  __device__ uint32_t mask_of(int first, Range keys) const {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + lane_ % 4 * 2 + i / 2 * 8 + i % 2;
      if (key >= keys.begin && key < keys.end) mask |= 0xffu << (8 * i);
    }
    return mask;
  }

  typename Traits::Shared &shared_;
  int lane_;
  int first_slice_;  // of dimensions
  int first_sixteen_;
  uint32_t from_;         // the lane's row in the first 32 dimensions of its first 16 keys
  uint32_t to_;           // and in the first 16 keys transposed
  uint32_t first_bytes_;  // of two words of keys, those of the dimension that goes first
  uint32_t count_ = 0;
};

// As many tiles of V as come, by one of the warps.
template <class Traits>
__device__ void transpose_values(typename Traits::Shared &shared, int warp) {
  Transposer<Traits> transposer(shared, warp);
#pragma unroll 1
  for (uint32_t number = 0;; ++number) {
    const PrefillSegment &segment = wait_segment<Traits>(shared, number);
    if (!segment.valid) return;
    const Range tiles = segment.tiles, keys = segment.item.keys;
    release_segment<Traits>(shared, number);
    transposer.transpose_segment(tiles, keys);
  }
}

}  // namespace pagedattn::cuda
