// gather_kv on the CPU: the pages of each sequence back to contiguous rows, dequantised where the rows are wider.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "status.h"

namespace pagedattn::cpu {
namespace {

struct Side {
  const CacheView &cache;
  const TokensView &out;
  const Scale &scale;
};

void gather_token(const GatherKvParams &p, const Kernels &k, const Side &side, int64_t block, int64_t slot,
                  int64_t row) {
  const int64_t src_size = dtype_size(p.kv_dtype);
  const int64_t dst_size = dtype_size(p.out_dtype);
  const char *src = static_cast<const char *>(side.cache.data) +
                    (block * side.cache.block_stride + slot * side.cache.token_stride) * src_size;
  char *dst = static_cast<char *>(side.out.data) + row * side.out.token_stride * dst_size;
  const bool convert = p.out_dtype != p.kv_dtype;
  const bool one_run =
      side.cache.head_stride == p.head_dim && side.out.head_stride == p.head_dim && !(convert && side.scale.per_head);
  const int64_t runs = one_run ? 1 : p.num_kv_heads;
  const int64_t length = one_run ? static_cast<int64_t>(p.num_kv_heads) * p.head_dim : p.head_dim;
  for (int64_t run = 0; run < runs; ++run) {
    const char *from = src + run * side.cache.head_stride * src_size;
    char *to = dst + run * side.out.head_stride * dst_size;
    if (convert) {
      const float scale = side.scale.ptr == nullptr ? side.scale.value : side.scale.ptr[side.scale.per_head ? run : 0];
      k.dequantize_row(p.out_dtype, to, p.kv_dtype, from, scale, length);
    } else {
      std::memcpy(to, from, static_cast<size_t>(length * dst_size));
    }
  }
}

// Tokens [begin, end) of a sequence, which go to the rows from `row` on.
struct Piece {
  int32_t seq;
  int64_t begin;
  int64_t end;
  int64_t row;
};

std::vector<Piece> cut(const GatherKvParams &p, int64_t tokens_a_piece) {
  std::vector<Piece> pieces;
  int64_t next_row = 0;
  for (int32_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t begin = p.seq_starts == nullptr ? 0 : p.seq_starts[seq];
    const int64_t end = std::max<int64_t>(begin, p.seq_lens[seq]);
    const int64_t row = p.out_start_loc == nullptr ? next_row : p.out_start_loc[seq];
    for (int64_t at = begin; at < end; at += tokens_a_piece) {
      pieces.push_back({seq, at, std::min(end, at + tokens_a_piece), row + at - begin});
    }
    next_row += end - begin;
  }
  return pieces;
}

}  // namespace

void gather_kv(const GatherKvParams &p) {
  const Kernels &k = kernels();
  const int64_t token_bytes = 2 * p.num_kv_heads * p.head_dim * (dtype_size(p.kv_dtype) + dtype_size(p.out_dtype));
  const std::vector<Piece> pieces = cut(p, std::max<int64_t>(1, kMinParallelWork / std::max<int64_t>(1, token_bytes)));

  parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t task, int) {
    const Piece &piece = pieces[static_cast<size_t>(task)];
    const int32_t *table = p.block_tables + piece.seq * p.block_table_stride;
    for (int64_t token = piece.begin; token < piece.end; ++token) {
      const int64_t block = table[token / p.block_size];
      const int64_t slot = token % p.block_size;
      const int64_t row = piece.row + token - piece.begin;
      gather_token(p, k, {p.k_cache, p.k_out, p.k_scale}, block, slot, row);
      gather_token(p, k, {p.v_cache, p.v_out, p.v_scale}, block, slot, row);
    }
  });
  record_kernel("gather_kv", k.gather_kv_name);
}

}  // namespace pagedattn::cpu
