// Copies rows of the paged caches to shared memory: one warp, a few tokens of one KV head, K and V.
//
// SPDX-License-Identifier: Apache-2.0
//
// Each lane looks up one token's row (lanes below 16 in K, the others in V); for the copies, which want neighbouring
// lanes on neighbouring bytes, the row's address comes from its lane by a shuffle, or where all rows are of one block
// from that of the first row.  The block-table entries of the next tile are loaded one tile ahead, so that their
// latency hides behind the arithmetic.
//
// Tokens outside the visible range are not read and become zeros: zero rows of V keep 0 * NaN out of the output, and
// what zero rows of K score is masked.  Dimensions past D are zeros too.
#pragma once

#include "attention_params.cuh"
#include "ptx.cuh"
#include "work_schedule.cuh"

namespace pagedattn::cuda {

// Rows of kRowBytes in 16-byte chunks, permuted so that ldmatrix, which reads one chunk of eight neighbouring rows,
// touches every bank once.
template <int kRowBytes_>
struct SwizzledTile {
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kChunks = kRowBytes / 16;
  static_assert(kChunks == 4 || kChunks % 8 == 0, "a power of two of chunks that the swizzle can permute");

  __host__ __device__ static constexpr int permutation(int row) { return kChunks == 4 ? (row >> 1) & 3 : row & 7; }

  __host__ __device__ static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ permutation(row)) * 16;
  }

  // From a chunk's address in a tile that is aligned to kRowBytes, by exclusive-or with constants: the address `rows`
  // further down, where `rows` is a multiple of a power of two above the row it starts from, and of the chunk `chunks`
  // further on, likewise.
  __device__ static SharedAddress down(SharedAddress address, int rows) {
    return (address ^ static_cast<SharedAddress>(permutation(rows) * 16)) +
           static_cast<SharedAddress>(rows * kRowBytes);
  }
  __device__ static SharedAddress along(SharedAddress address, int chunks) {
    return address ^ static_cast<SharedAddress>(chunks * 16);
  }
};

template <int kRows, class Layout, class Element>
class KvLoader {
  static_assert(kRows == 8 || kRows == 16, "a lane for each row of K and of V");
  static constexpr int kChunks = Layout::kChunks;

 public:
  __device__ explicit KvLoader(const AttentionKernelParams &params)
      : params_(params),
        lane_(static_cast<int>(threadIdx.x) % 32),
        row_bytes_(params.head_dim * static_cast<int>(sizeof(Element))) {}

  // To be followed by look_up.
  __device__ void begin(const WorkItem &item) {
    const CachePointer &cache = lane_ < 16 ? params_.k_cache : params_.v_cache;
    head_ = cache.data + item.kv_head * cache.head_stride;
    table_ = params_.block_tables + item.seq.index * params_.block_table_stride;
    item_ = &item;
  }

  // Starts to load the block numbers of the next rows to copy, those of tokens from `token` on.
  __device__ void look_up(int token) {
    token_ = token + lane_ % kRows;
    whole_ = token >= item_->keys.begin && token + kRows <= item_->keys.end;
    visible_ = token_ >= item_->keys.begin && token_ < item_->keys.end;
    if (visible_) block_ = table_[params_.block_size.divide(token_)];
  }

  // Turns what look_up has loaded into addresses.
  __device__ void locate() {
    const CachePointer &cache = lane_ < 16 ? params_.k_cache : params_.v_cache;
    row_ = nullptr;
    is_run_ = false;
    if (!visible_) return;
    const int slot = token_ - params_.block_size.divide(token_) * static_cast<int>(params_.block_size.divisor);
    const int block = clamp_to(block_, 0, params_.last_block);
    row_ = head_ + block * cache.block_stride + slot * cache.token_stride;
    is_run_ = whole_ && params_.kv_copy_bytes == 16 && params_.block_size.divisor % kRows == 0;
  }

  __device__ void copy_k(char *tile) const { copy(tile, 0); }
  __device__ void copy_v(char *tile) const { copy(tile, 16); }

 private:
  __device__ const char *row_of_lane(int lane) const {
    return reinterpret_cast<const char *>(__shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(row_), lane));
  }

  __device__ void copy(char *tile, int first_lane) const {
    if constexpr (kChunks <= 32) {
      if (__any_sync(kFullWarp, is_run_)) {
        copy_run(shared_address(tile), first_lane);
        return;
      }
    }
    if (params_.kv_copy_bytes == 16) {
      copy_chunks(shared_address(tile), first_lane);
    } else if (params_.kv_copy_bytes == 8) {
      copy_half_chunks(shared_address(tile), first_lane);
    } else {
      copy_elements(tile, first_lane);
    }
  }

  // Where look_up's rows follow each other at one stride, and all are visible.
  __device__ void copy_run(SharedAddress tile, int first_lane) const {
    constexpr int kRowsAtOnce = 32 / kChunks;
    const int row = lane_ / kChunks, chunk = lane_ % kChunks;
    const SharedAddress destination = tile + Layout::offset(row, chunk);
    const int64_t stride = first_lane == 0 ? params_.k_cache.token_stride : params_.v_cache.token_stride;
    const int bytes = chunk * 16 < row_bytes_ ? 16 : 0;
    const char *source = row_of_lane(first_lane) + row * stride + (bytes == 0 ? 0 : chunk * 16);
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      copy_async<16>(Layout::down(destination, i), source, bytes);
      source += kRowsAtOnce * stride;
    }
  }

  __device__ void copy_chunks(SharedAddress tile, int first_lane) const {
    if constexpr (kChunks <= 32) {
      constexpr int kRowsAtOnce = 32 / kChunks;
      const int row = lane_ / kChunks, chunk = lane_ % kChunks;
      const SharedAddress destination = tile + Layout::offset(row, chunk);
#pragma unroll
      for (int i = 0; i < kRows; i += kRowsAtOnce) {
        copy_chunk(Layout::down(destination, i), first_lane + row + i, chunk);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows * (kChunks / 32); ++i) {
        const int row = i / (kChunks / 32), chunk = i % (kChunks / 32) * 32 + lane_;
        copy_chunk(tile + Layout::offset(row, chunk), first_lane + row, chunk);
      }
    }
  }

  __device__ void copy_chunk(SharedAddress destination, int lane, int chunk) const {
    const char *source = row_of_lane(lane);
    const bool valid = source != nullptr && chunk * 16 < row_bytes_;
    copy_async<16>(destination, valid ? source + chunk * 16 : params_.k_cache.data, valid ? 16 : 0);
  }

  // Where rows are only 8-byte aligned, as those of float8 caches with D = 72.
  __device__ void copy_half_chunks(SharedAddress tile, int first_lane) const {
#pragma unroll 1
    for (int i = 0; i < kRows * kChunks * 2 / 32; ++i) {
      const int index = i * 32 + lane_, row = index / (kChunks * 2), half = index % (kChunks * 2);
      const char *source = row_of_lane(first_lane + row);
      const bool valid = source != nullptr && half * 8 < row_bytes_;
      // The source of an empty copy need not be readable, but must be aligned.
      copy_async<8>(tile + Layout::offset(row, half / 2) + half % 2 * 8,
                    valid ? source + half * 8 : params_.k_cache.data, valid ? 8 : 0);
    }
  }

  // Any alignment: plain loads and stores of single elements.
  __device__ void copy_elements(char *tile, int first_lane) const {
    constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
#pragma unroll 1
    for (int i = 0; i < kRows * kChunks * kPerChunk / 32; ++i) {
      const int index = i * 32 + lane_, row = index / (kChunks * kPerChunk), column = index % (kChunks * kPerChunk);
      const char *source = row_of_lane(first_lane + row);
      const bool valid = source != nullptr && column < params_.head_dim;
      auto *destination = reinterpret_cast<Element *>(tile + Layout::offset(row, column / kPerChunk));
      destination[column % kPerChunk] = valid ? reinterpret_cast<const Element *>(source)[column] : Element{};
    }
  }

  const AttentionKernelParams &params_;
  int lane_;
  int row_bytes_;
  const char *head_ = nullptr;  // the head's first slot in block 0, of the lane's cache
  const int32_t *table_ = nullptr;
  const WorkItem *item_ = nullptr;
  int token_ = 0;
  bool visible_ = false;
  bool whole_ = false;   // the rows of all lanes are visible
  bool is_run_ = false;  // and at one stride
  int block_ = 0;
  const char *row_ = nullptr;  // of the lane's token, null where it is not visible
};

}  // namespace pagedattn::cuda
