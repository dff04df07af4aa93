// How tiles of float8 keys and values come to the Hopper prefill kernels.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hopper_prefill_segments.cuh"
#include "hopper_prefill_traits.cuh"

namespace pagedattn::cuda {

// Brings K, or V, of one segment after the other, as produce_tiles does, in boxes of whole rows, a lane each.
template <class Traits>
__device__ void copy_float8_tiles(const HopperParams &params, typename Traits::Shared &shared, bool keys) {
  constexpr int kTokens = Traits::kTokens;
  const CUtensorMap *const map = keys ? &params.maps.k : &params.maps.v;
  const Float8Ring ring = Traits::ring(shared, keys);
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane * params.maps.box_tokens;
  uint32_t count = 0;
#pragma unroll 1
  for (uint32_t number = 0;; ++number) {
    const PrefillSegment &segment = wait_segment<Traits>(shared, number);
    if (!segment.valid) return;
    const int32_t *const table = params.block_tables + segment.item.seq.index * params.block_table_stride;
    const Range visible = segment.item.keys, tiles = segment.tiles;
    const int kv_head = segment.item.kv_head, ahead = smaller(tiles.end - tiles.begin - 1, Traits::kTilesAhead);
    const auto block_of = [&](int tile) {
      const int token = tile * kTokens + row;
      // What no row sees comes from behind the last block, as zeros.
      return row < kTokens && token < visible.end && token + params.maps.box_tokens > visible.begin
                 ? clamp_to(table[params.block_size.divide(token)], 0, params.last_block)
                 : params.last_block + 1;
    };
    int block = block_of(tiles.end - 1);
#pragma unroll 1
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile, ++count) {
      const int next = block_of(larger(tile - 1, tiles.begin)), token = tile * kTokens + row;
      const int place = token - params.block_size.divide(token) * static_cast<int>(params.block_size.divisor);
      if (keys && tile - tiles.begin == ahead && lane == 0) arrive(&shared.wanted);
      const uint32_t stage = count % Traits::kKvStages;
      wait(&ring.empty[stage], (count / Traits::kKvStages & 1) ^ 1);
      if (lane == 0) arrive_and_expect(&ring.full[stage], Traits::kRawBytes);
      __syncwarp();
      if (row < kTokens) {
        const int corner[5] = {0, place, 0, kv_head, block};
        copy_box(shared_address(ring.rooms + stage * Traits::KvTile::kBytes + Traits::raw_row(row)), map, corner,
                 &ring.full[stage]);
      }
      block = next;
    }
    release_segment<Traits>(shared, number);
  }
}

}  // namespace pagedattn::cuda
