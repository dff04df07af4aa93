// What the Hopper prefill kernels over float8 caches have besides: a warpgroup that widens all that is multiplied.
//
// SPDX-License-Identifier: Apache-2.0
//
// The tensor cores multiply float16, which holds every float8.  The copy engine brings a tile of K or V, as it lies in
// the cache, to the end of the room that it will take.  Then this warpgroup writes it as float16 where the
// 16-bit kernels' copy engine would, so that what computes sees no difference.  It also widens float8 queries, and
// divides rows of bfloat16 queries by a power of two, so that they fit float16; a row's scores take that, and the
// scales of Q and K, as a factor.
//
// Bound: the time from a tile's room being free to its being float16.  One prompt of 8192 tokens, 32 heads of 128 over
// 8: 978 us on an H100, 565 TFLOP/s.
#pragma once

#include <numeric>
#include <utility>

#include "hopper_prefill_traits.cuh"
#include "hopper_wgmma.cuh"
#include "mma_queries.cuh"

namespace pagedattn::cuda {

// How far a warp that widens has come.  Segments and tiles count from the kernel's first on.
template <class Traits, bool kInOneWord = Traits::kSavesRegisters>
class WidenerProgress {
 public:
  __device__ uint32_t number() const { return number_; }  // of the segment
  __device__ uint32_t tile() const { return tile_; }
  __device__ int tiles_left() const { return left_; }

  __device__ void begin_segment(int tiles) { left_ = tiles; }
  __device__ void end_tile() { --left_, ++tile_; }
  __device__ void end_segment() { ++number_; }

 private:
  uint32_t tile_ = 0;
  uint32_t number_ = 0;
  int left_;  // once a segment has begun
};

// The same in one register: both numbers only as far as places and phases are told from them.
template <class Traits>
class WidenerProgress<Traits, true> {
  static constexpr uint32_t kTiles = 2 * Traits::kKvStages, kNumbers = 2 * larger(Traits::kSegments, Traits::kQStages);
  static constexpr uint32_t kLeft = kTiles * kNumbers;
  static_assert((kLeft & (kLeft - 1)) == 0);

 public:
  __device__ uint32_t number() const { return word_ / kTiles % kNumbers; }
  __device__ uint32_t tile() const { return word_ % kTiles; }
  __device__ int tiles_left() const { return static_cast<int>(word_ / kLeft); }

  __device__ void begin_segment(int tiles) { word_ += static_cast<uint32_t>(tiles) * kLeft; }
  __device__ void end_tile() { word_ = (word_ - kLeft) / kTiles * kTiles + (word_ + 1) % kTiles; }
  __device__ void end_segment() { word_ = (word_ / kTiles + 1) % kNumbers * kTiles + word_ % kTiles; }

 private:
  uint32_t word_ = 0;  // from the left: tiles left, number, tile
};

// Half of the warpgroup widens keys, the other half queries and values.
template <class Traits, bool kKeys>
class Widener {
  using Tile = typename Traits::KvTile;
  using Queries = typename Traits::QTile;
  static constexpr int kThreads = 64;
  static constexpr int kChunks = Traits::kHeadDim / 8;  // of eight elements in a row
  // A tile is widened in pieces of so many rows; the next is read while one is written, if registers have room for
  // both.
  static constexpr int kRows = kChunks % 8 == 0 && kChunks > 16 ? 8 : kChunks % 4 == 0 ? 16 : 32;
  static constexpr int kPieces = Traits::kTokens / kRows;
  static constexpr int kOfThread = kRows * kChunks / kThreads;
  static constexpr int kAhead = kOfThread <= 4 && !Traits::kSavesRegisters ? 1 : 0;
  // The places of a thread's chunks are the same again every so many, and so many bytes further on.
  static constexpr int kPlaces = std::lcm(kThreads, Traits::kHeadDim) / kThreads;
  static constexpr int kPlacesBytes = kPlaces * kThreads / Traits::kHeadDim * Tile::kEightRows;
  // Rows of bfloat16 queries that eight lanes widen at once, so that these need not wait for each other, and how far
  // they are apart.
  static constexpr int kQueryRows = larger(4 / Queries::kColumns, 1), kQueryStep = kThreads / 8;
  static_assert(Traits::kTokens % kRows == 0 && kRows * kChunks % kThreads == 0);

  // Pieces in whose place, as they came, float16 of the first so many goes, and how many a thread has read before it
  // writes one.
  static constexpr int overwritten_by(int pieces) {
    const int bytes = pieces * kRows / 8 * Tile::kEightRows - Traits::kRawPlace;
    constexpr int kRawPiece = kRows * Traits::kHeadDim;
    return bytes <= 0 ? 0 : (bytes + kRawPiece - 1) / kRawPiece;
  }
  static constexpr int read_before(int piece) { return smaller(piece + 1 + kAhead, kPieces); }
  // Must all threads have come as far before they write the piece?
  static constexpr bool must_meet(int piece) {
    int known = 0;
    for (int i = 0; i <= piece; ++i) {
      const bool must = overwritten_by(i + 1) > known;
      if (must) known = read_before(i);
      if (i == piece) return must;
    }
    return false;
  }
  static_assert(overwritten_by(kPieces) == kPieces);

 public:
  __device__ Widener(const HopperParams &params, typename Traits::Shared &shared) : params_(params), shared_(shared) {}

  // A segment's queries.
  __device__ void widen_queries(uint32_t number, int kv_head) {
    const uint32_t stage = number % Traits::kQStages;
    float (&factors)[Traits::kRows] = shared_.raw.factors[stage];
    const float scale = params_.q_scale.of_head(kv_head) * params_.k_scale.of_head(kv_head);
    wait(&shared_.raw.q[stage], number / Traits::kQStages & 1);
    const int thread = own_thread();
    if (params_.q_is_bfloat16) {
      if constexpr (Traits::kSavesRegisters) {
        char *first = shared_.q[stage] + Queries::offset(thread / 8, thread % 8);
        float *factor = &factors[thread / 8];
#pragma unroll 1
        for (int rows = Traits::kRows; rows > 0; rows -= kQueryRows * kQueryStep) {
          widen_query_rows(first, factor, scale);
          first += kQueryRows * Queries::kEightRows;
          factor += kQueryRows * kQueryStep;
        }
      } else {
#pragma unroll 1
        for (int row = thread / 8; row < Traits::kRows; row += kQueryRows * kQueryStep) {
          widen_query_rows(shared_.q[stage] + Queries::offset(row, own_thread() % 8), &factors[row], scale);
        }
      }
    } else {
      if (params_.q_is_float8) widen_float8_queries(shared_.q[stage]);
      for (int row = thread; row < Traits::kRows; row += kThreads) factors[row] = scale;
    }
    publish(&shared_.q_full[stage]);
  }

  // A tile of K, or of V, by its number.
  __device__ void widen_tile(uint32_t number) {
    const uint32_t stage = number % Traits::kKvStages;
    const Places places = find_places();
    wait(kKeys ? &shared_.raw.k[stage] : &shared_.raw.v[stage], number / Traits::kKvStages & 1);
    widen_tile(kKeys ? shared_.k[stage] : shared_.v[stage], places);
    publish(kKeys ? &shared_.k_full[stage] : &shared_.v_full[stage]);
  }

 private:
  using Chunks = uint2[kOfThread];
  struct Places {  // of a thread's first chunks in a piece
    uint32_t of[kPlaces];
  };

  // Of the half's threads.
  __device__ static int own_thread() { return static_cast<int>(static_cast<uint32_t>(thread_index()) % kThreads); }

  // For each tile anew, while it is on its way: to keep them takes registers that there are too few of.
  __device__ static Places find_places() {
    Places places;
    const auto thread = static_cast<uint32_t>(own_thread());
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const uint32_t index = thread + kThreads * i, row = index / kChunks;
      places.of[i] =
          static_cast<uint32_t>(Tile::offset(static_cast<int>(row), static_cast<int>(index - row * kChunks)));
    }
    return places;
  }

  __device__ static void widen_tile(char *tile, const Places &places) {
    widen_pieces(tile, places, std::make_integer_sequence<int, kPieces>());
  }
  template <int... kPiece>
  __device__ static void widen_pieces(char *tile, const Places &places, std::integer_sequence<int, kPiece...>) {
    Chunks chunks[1 + kAhead];
    if constexpr (kAhead > 0) load<0>(tile, chunks[0]);
    (widen_piece<kPiece>(tile, places, chunks), ...);
  }
  template <int kPiece>
  __device__ static void widen_piece(char *tile, const Places &places, Chunks (&chunks)[1 + kAhead]) {
    static_assert(overwritten_by(kPiece + 1) <= read_before(kPiece));
    if constexpr (kPiece + kAhead < kPieces) load<kPiece + kAhead>(tile, chunks[(kPiece + kAhead) % (1 + kAhead)]);
    if constexpr (must_meet(kPiece)) meet();
    store<kPiece>(tile, chunks[kPiece % (1 + kAhead)], places);
  }
  template <int kPiece>
  __device__ static void load(const char *tile, Chunks &chunks) {
    const char *const from = tile + Traits::kRawPlace + kPiece * kRows * Traits::kHeadDim;
    const uint2 *const own = reinterpret_cast<const uint2 *>(from) + own_thread();
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) chunks[i] = own[kThreads * i];
  }
  template <int kPiece>
  __device__ static void store(char *tile, const Chunks &chunks, const Places &places) {
    char *const to = tile + kPiece * (kRows / 8) * Tile::kEightRows;
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      uint4 wide;
      widen<typename Traits::CacheElement>(chunks[i].x, wide.x, wide.y);
      widen<typename Traits::CacheElement>(chunks[i].y, wide.z, wide.w);
      *reinterpret_cast<uint4 *>(to + places.of[i % kPlaces] + i / kPlaces * kPlacesBytes) = wide;
    }
  }

  // The half's threads.
  __device__ static void meet() { named_barrier<kThreads>(Traits::kWidenerBarrier + (kKeys ? 0 : 1)); }

  __device__ static void publish(Barrier *full) {
    publish_shared_writes();
    __syncwarp();
    if (arrives_for_warp(thread_index() % 32 == 0)) arrive(full);
  }

  // They come to the end of each column's room.  Rows are widened from the first on, so that what a row takes the place
  // of has been widened, or read, before.  Eight lanes have a row.
  __device__ void widen_float8_queries(char *q) const {
    const int thread = own_thread();
#pragma unroll 1
    for (int row = thread / 8; row < Traits::kRows; row += kThreads / 8) {
      uint2 raw[Queries::kColumns];
#pragma unroll
      for (int column = 0; column < Queries::kColumns; ++column) {
        const char *const column_start = q + column * Queries::kColumnBytes + Traits::kRawQueryPlace;
        raw[column] = *reinterpret_cast<const uint2 *>(column_start + row * 64 + own_thread() % 8 * 8);
      }
      meet();
#pragma unroll
      for (int column = 0; column < Queries::kColumns; ++column) {
        const QChunk wide = widen_q_chunk<typename Traits::CacheElement>(raw[column].x, raw[column].y);
        *reinterpret_cast<uint4 *>(q + Queries::offset(row, column * 8 + own_thread() % 8)) = {
            wide.pairs[0], wide.pairs[1], wide.pairs[2], wide.pairs[3]};
      }
    }
  }

  // Divides rows, every kQueryStep-th from one on of which the lane's first chunk is given, by powers of two, which
  // become part of their factors.  Eight lanes have a row.
  __device__ static void widen_query_rows(char *first, float *factors, float scale) {
    constexpr int kColumns = Queries::kColumns;
    static_assert(kQueryStep == 8, "of eight rows all have their chunks at the same places");
    QChunk x[kQueryRows][kColumns];
#pragma unroll
    for (int i = 0; i < kQueryRows; ++i) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const uint4 words = *query_chunk(first, i, column);
        x[i][column] = {{words.x, words.y, words.z, words.w}};
      }
    }
#pragma unroll
    for (int i = 0; i < kQueryRows; ++i) {
      const float power = normalise_bfloat16_row<8, kColumns>(x[i]);
      if (own_thread() % 8 == 0) factors[i * kQueryStep] = power * scale;
    }
#pragma unroll
    for (int i = 0; i < kQueryRows; ++i) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const uint32_t (&pairs)[4] = x[i][column].pairs;
        *query_chunk(first, i, column) = {pairs[0], pairs[1], pairs[2], pairs[3]};
      }
    }
  }
  __device__ static uint4 *query_chunk(char *first, int i, int column) {
    return reinterpret_cast<uint4 *>(first + i * Queries::kEightRows + column * Queries::kColumnBytes);
  }

  const HopperParams &params_;
  typename Traits::Shared &shared_;
};

}  // namespace pagedattn::cuda
