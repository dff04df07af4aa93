// How tiles of keys and of values come to the Hopper prefill kernels.
//
// SPDX-License-Identifier: Apache-2.0
//
// A tile comes in boxes of the copy engine, each of one block or of a part of one.  Every lane finds a box of a tile, a
// tile ahead, so that nothing but the requests themselves comes between room and data.  Where blocks of 8 or 16 tokens
// make many boxes, one lane makes all requests, of what the warp shares: if each lane made its own, the compiler would
// write a loop of a dozen instructions a request, and these take their time from the warps that compute.
#pragma once

#include "hopper_prefill_segments.cuh"
#include "hopper_prefill_traits.cuh"

namespace pagedattn::cuda {

// Asks for the tiles of K, or of V, into their ring.
template <class Traits>
class TileCopier {
  static constexpr int kTokens = Traits::kTokens;
  static constexpr int kColumns = Traits::kBoxColumns;
  // Blocks that registers have room for.
  static constexpr int kMostAtOnce = Traits::kProducerRegisters < 40 ? 4 : Traits::kProducerRegisters < 48 ? 8 : 16;

 public:
  __device__ TileCopier(const HopperParams &params, typename Traits::Shared &shared, bool keys)
      : params_(params),
        map_(keys ? &params.maps.k : &params.maps.v),
        ring_(Traits::ring(shared, keys)),
        whole_rows_(params.maps.box_columns == kColumns),
        block_tokens_(box_is_block() ? params.maps.box_tokens : 0) {}

  // The first tile of the first segment, in few instructions.
  __device__ void ask_for_first(const PrefillSegment &segment) const {
    const WorkItem &item = segment.item;
    const int32_t *const table = params_.block_tables + item.seq.index * params_.block_table_stride;
    ask_for_each(find_box(segment.tiles.end - 1, table, item.keys, item.kv_head), shared_address(ring_.rooms),
                 &ring_.full[0]);
  }

  // The tiles of a segment, from the last on.  Calls before(n) ahead of a tile with n behind it.
  template <class Before>
  __device__ void copy(const WorkItem &item, Range tiles, Before &&before) {
    const int32_t *const table = params_.block_tables + item.seq.index * params_.block_table_stride;
    const Range keys = item.keys;
    const int kv_head = item.kv_head;
    Box box = find_box(larger(tiles.end - 1, tiles.begin), table, keys, kv_head);
#pragma unroll 1
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile, ++count_) {
      before(tile - tiles.begin);
      // The same in all lanes, of which the compiler is to know.
      const uint32_t stage = __shfl_sync(kFullWarp, count_ % Traits::kKvStages, 0);
      wait(&ring_.empty[stage], (count_ / Traits::kKvStages & 1) ^ 1);
      __syncwarp();
      ask(box, shared_address(ring_.rooms) + stage * Traits::KvTile::kBytes, &ring_.full[stage]);
      box = find_box(larger(tile - 1, tiles.begin), table, keys, kv_head);
    }
  }

 private:
  struct Box {
    int place;  // in its block
    int head;
    int block;
  };

  // Kept where registers are enough.
  __device__ static int lane() {
    return (Traits::kProducerRegisters < 48 ? thread_index() : static_cast<int>(threadIdx.x)) % 32;
  }

  // Is a box all of a block, at coordinates that differ in the block alone?
  __device__ bool box_is_block() const {
    return params_.maps.box_tokens == static_cast<int>(params_.block_size.divisor) && whole_rows_ &&
           (kColumns == 1 || params_.maps.heads_to_block > 0);
  }

  // The lane's of a tile.
  __device__ Box find_box(int tile, const int32_t *table, Range keys, int kv_head) const {
    const int box_tokens = params_.maps.box_tokens, heads = kColumns > 1 ? params_.maps.heads_to_block : 0;
    const int row = lane() * box_tokens, token = tile * kTokens + row;
    const int number = params_.block_size.divide(token);
    const int place = token - number * static_cast<int>(params_.block_size.divisor);
    // What no row sees comes from behind the last block, as zeros.
    const int block = row < kTokens && token < keys.end && token + box_tokens > keys.begin
                          ? clamp_to(table[number], 0, params_.last_block)
                          : params_.last_block + 1;
    return {heads > 0 ? 0 : place, heads > 0 ? place / 8 : kv_head, heads > 0 ? block * heads + kv_head : block};
  }

  __device__ void ask(const Box &box, SharedAddress room, Barrier *full) const {
    if (ask_for_blocks<kTokens / 16>(box, room, full) || ask_for_blocks<kTokens / 8>(box, room, full)) return;
    ask_for_each(box, room, full);
  }

  // Each lane for its own.
  __device__ void ask_for_each(const Box &box, SharedAddress room, Barrier *full) const {
    if (lane() == 0) arrive_and_expect(full, Traits::kRawBytes);
    __syncwarp();
    const int row = lane() * params_.maps.box_tokens;
    if (row >= kTokens) return;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      if (column > 0 && whole_rows_) break;
      const int corner[5] = {column * Traits::KvTile::kColumnElements, box.place, 0, box.head, box.block};
      copy_box(room + Traits::raw_row(row, column), map_, corner, full);
    }
  }

  // If blocks are so many to a tile and a box is a block.
  template <int kBlocks>
  __device__ bool ask_for_blocks(const Box &box, SharedAddress room, Barrier *full) const {
    if (block_tokens_ != kTokens / kBlocks) return false;
    constexpr int kRound = smaller(kBlocks, kMostAtOnce);
    const int head = kColumns > 1 ? 0 : __shfl_sync(kFullWarp, box.head, 0);
    const bool asks = elect_lane();
    if (asks) arrive_and_expect(full, Traits::kRawBytes);
#pragma unroll
    for (int first = 0; first < kBlocks; first += kRound) {
      int blocks[kRound];
#pragma unroll
      for (int i = 0; i < kRound; ++i) blocks[i] = __shfl_sync(kFullWarp, box.block, first + i);
      if (asks) {
#pragma unroll
        for (int i = 0; i < smaller(kRound, kBlocks - first); ++i) {
          const int corner[5] = {0, 0, 0, head, blocks[i]};
          copy_box(room + Traits::raw_row((first + i) * (kTokens / kBlocks), 0), map_, corner, full);
        }
      }
      __syncwarp();
    }
    return true;
  }

  const HopperParams &params_;
  const CUtensorMap *map_;
  TileRing ring_;
  bool whole_rows_;     // a box has all columns
  int block_tokens_;    // of the blocks that are a box each, or 0
  uint32_t count_ = 1;  // of the tiles asked for
};

// Brings K, or V, of one segment after the other, but the first tile.  The warp that brings K says when work is to be
// taken: late, shortly before the last tile of a segment, since whoever is first done should have the next; but not so
// late that its queries would be waited for.
template <class Traits>
__device__ void produce_tiles(const HopperParams &params, typename Traits::Shared &shared, bool keys) {
  TileCopier<Traits> copier(params, shared, keys);
#pragma unroll 1
  for (uint32_t number = 0;; ++number) {
    const PrefillSegment &segment = wait_segment<Traits>(shared, number);
    if (!segment.valid) return;
    const int ahead = smaller(segment.tiles.end - segment.tiles.begin - 1, Traits::kTilesAhead);
    const auto before = [&](int left) {
      if (keys && left == ahead && threadIdx.x % 32 == 0) arrive(&shared.wanted);
    };
    Range tiles = segment.tiles;
    if (number == 0) before(--tiles.end - tiles.begin);  // it has been asked for
    copier.copy(segment.item, tiles, before);
    release_segment<Traits>(shared, number);
  }
}

}  // namespace pagedattn::cuda
