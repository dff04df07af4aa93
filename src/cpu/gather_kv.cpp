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

// Tokens [first, first + count) of one block, which go to the rows from `row` on.
struct BlockPart {
  int64_t block;
  int64_t slot;
  int64_t count;
  int64_t row;
};

// Runs that lie together on both sides: a part of a block, its tokens, or their heads.
void gather_part(const GatherKvParams &p, const Kernels &k, const Side &side, const BlockPart &part, bool streamed) {
  const int64_t src_size = dtype_size(p.kv_dtype);
  const int64_t dst_size = dtype_size(p.out_dtype);
  const bool convert = p.out_dtype != p.kv_dtype;
  const int64_t token_length = static_cast<int64_t>(p.num_kv_heads) * p.head_dim;
  const bool heads_touch =
      side.cache.head_stride == p.head_dim && side.out.head_stride == p.head_dim && !(convert && side.scale.per_head);
  const bool tokens_touch =
      heads_touch && side.cache.token_stride == token_length && side.out.token_stride == token_length;
  const int64_t tokens = tokens_touch ? 1 : part.count, heads = heads_touch ? 1 : p.num_kv_heads;
  const int64_t length = tokens_touch ? part.count * token_length : heads_touch ? token_length : p.head_dim;
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t src_token = part.block * side.cache.block_stride + (part.slot + token) * side.cache.token_stride;
    const int64_t dst_token = (part.row + token) * side.out.token_stride;
    for (int64_t head = 0; head < heads; ++head) {
      const char *from =
          static_cast<const char *>(side.cache.data) + (src_token + head * side.cache.head_stride) * src_size;
      char *to = static_cast<char *>(side.out.data) + (dst_token + head * side.out.head_stride) * dst_size;
      if (convert) {
        k.dequantize_row(p.out_dtype, to, p.kv_dtype, from, side.scale.of_head(head), length);
      } else if (streamed) {
        k.stream_run(to, from, from + length * dst_size, length * dst_size);
      } else {
        std::memcpy(to, from, static_cast<size_t>(length * dst_size));
      }
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

  int64_t num_tokens = 0;
  for (const Piece &piece : pieces) num_tokens += piece.end - piece.begin;
  const int64_t row_bytes = p.num_kv_heads * p.head_dim * dtype_size(p.out_dtype);
  const bool streamed = p.kv_dtype == p.out_dtype && worth_streaming(2 * num_tokens * row_bytes, row_bytes);

  parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t task, int) {
    const Piece &piece = pieces[static_cast<size_t>(task)];
    const int32_t *table = p.block_tables + piece.seq * p.block_table_stride;
    for (int64_t token = piece.begin; token < piece.end;) {
      const int64_t slot = token % p.block_size;
      const int64_t count = std::min(piece.end - token, p.block_size - slot);
      const BlockPart part = {table[token / p.block_size], slot, count, piece.row + token - piece.begin};
      gather_part(p, k, {p.k_cache, p.k_out, p.k_scale}, part, streamed);
      gather_part(p, k, {p.v_cache, p.v_out, p.v_scale}, part, streamed);
      token += count;
    }
    if (streamed) k.finish_streaming();
  });
  record_kernel("gather_kv", k.gather_kv_name);
}

}  // namespace pagedattn::cpu
