// Checks of index values, shared by both backends; see index_checks.h.
//
// SPDX-License-Identifier: Apache-2.0
#include "index_checks.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace pagedattn {
namespace {

std::string num(int64_t value) { return std::to_string(value); }

// "`name`[index]"
std::string entry(const char *name, int64_t index) {
  return std::string("`").append(name).append("`[").append(num(index)).append("]");
}

std::string got(int64_t value) { return "; got " + num(value); }

std::string count(int64_t n, const char *noun) { return num(n) + " " + noun + (n == 1 ? "" : "s"); }

// A block table as the checks see it.
struct BlockTables {
  const int32_t *data;
  int64_t row_stride;
  int64_t max_blocks;
  int64_t block_size;
  int64_t num_blocks;
};

// The first entry of row `seq` among [first, last) that names no block.
std::string block_table_error(const BlockTables &tables, int64_t seq, int64_t first, int64_t last) {
  const int32_t *row = tables.data + seq * tables.row_stride;
  // As unsigned numbers, negative entries are too large as well; and a loop without an exit is one that vectorises.
  const auto limit = static_cast<uint32_t>(std::min<int64_t>(tables.num_blocks, int64_t{1} << 31));
  uint32_t bad = 0;
  for (int64_t i = first; i < last; ++i) bad |= static_cast<uint32_t>(row[i]) >= limit;
  if (!bad) return "";
  const int32_t *where =
      std::find_if(row + first, row + last, [limit](int32_t block) { return static_cast<uint32_t>(block) >= limit; });
  return "`block_tables`[" + num(seq) + ", " + num(where - row) +
         "] must be in 0 ... num_blocks - 1 = " + num(tables.num_blocks - 1) + got(*where);
}

std::string seq_len_error(const int32_t *seq_lens, int64_t seq, const BlockTables &tables) {
  const int64_t capacity = tables.max_blocks * tables.block_size;
  const int64_t len = seq_lens[seq];
  if (len >= 0 && len <= capacity) return "";
  return entry("seq_lens", seq) + " must be in 0 ... " + num(capacity) + got(len);
}

std::string query_start_loc_error(const AttentionParams &p) {
  const char *name = "query_start_loc";
  const int32_t *starts = p.query_start_loc;
  if (starts[0] != 0) return entry(name, 0) + " must be 0" + got(starts[0]);
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t start = starts[seq], next = starts[seq + 1];
    if (next < start) {
      return entry(name, seq + 1) + " must be at least " + entry(name, seq) + " = " + num(start) + got(next);
    }
    if (next - start > p.max_query_len && next <= p.num_tokens) {
      return entry(name, seq + 1) + " must be at most " + entry(name, seq) +
             " + `max_query_len` = " + num(start + p.max_query_len) + got(next);
    }
  }
  if (starts[p.num_seqs] == p.num_tokens) return "";
  return "`query_start_loc`[B] must be T = " + num(p.num_tokens) + got(starts[p.num_seqs]);
}

// The first key that any row of a sequence sees.
int64_t first_visible_key(const AttentionParams &p, int64_t seq_len, int64_t num_query_tokens) {
  if (p.window <= 0) return 0;
  // Row 0 reaches back furthest; without the causal mask every row sees the last `window` keys.
  const int64_t visible_keys = p.causal ? seq_len - num_query_tokens + 1 : seq_len;
  return std::max<int64_t>(0, visible_keys - p.window);
}

int64_t blocks_for(int64_t tokens, int64_t block_size) { return (tokens + block_size - 1) / block_size; }

// A set of non-negative numbers: open addressing at a load of at most one half, so memory follows the number of entries
// and not the size of the cache.
class IndexSet {
 public:
  explicit IndexSet(int64_t max_entries)
      : shift_(64 - static_cast<int>(std::bit_width(2 * static_cast<uint64_t>(max_entries) | 1))),
        places_(size_t{1} << (64 - shift_), kEmpty) {}

  // Whether `value` was new.
  bool insert(int64_t value) {
    int64_t &place = places_[find(value)];
    if (place == value) return false;
    place = value;
    return true;
  }

  bool contains(int64_t value) const { return places_[find(value)] == value; }

 private:
  static constexpr int64_t kEmpty = -1;

  // Where `value` is or belongs.  Fibonacci hashing spreads runs of consecutive slots.
  size_t find(int64_t value) const {
    size_t place = static_cast<size_t>((static_cast<uint64_t>(value) * 0x9E3779B97F4A7C15u) >> shift_);
    while (places_[place] != kEmpty && places_[place] != value) place = (place + 1) & (places_.size() - 1);
    return place;
  }

  int shift_;
  std::vector<int64_t> places_;
};

int64_t source(const CopyBlocksParams &p, int64_t pair) { return p.mapping[2 * pair]; }
int64_t destination(const CopyBlocksParams &p, int64_t pair) { return p.mapping[2 * pair + 1]; }

std::string block_pair_error(const CopyBlocksParams &p, int64_t pair) {
  const auto unknown = [pair](const char *which, int64_t block, int64_t num_blocks) {
    return entry("block_mapping", pair) + " names " + which + " block " + num(block) + "; there are " + num(num_blocks);
  };
  const int64_t src = source(p, pair);
  const int64_t dst = destination(p, pair);
  if (src < 0 || src >= p.num_src_blocks) return unknown("source", src, p.num_src_blocks);
  if (dst < 0 || dst >= p.num_dst_blocks) return unknown("destination", dst, p.num_dst_blocks);
  return "";
}

std::string block_clash(const CopyBlocksParams &p, int64_t pair, int64_t other, const char *verb) {
  return entry("block_mapping", pair) + " writes block " + num(destination(p, pair)) + ", which " +
         entry("block_mapping", other) + " " + verb;
}

std::string block_mapping_error(const CopyBlocksParams &p, bool same_caches, void *packed) {
  // A byte a block of a large mapping's cache is less memory than a set of its entries, and faster.
  constexpr int64_t kBytesPerEntry = 32;
  const bool marked = p.num_dst_blocks <= kBytesPerEntry * p.num_pairs;
  std::vector<uint8_t> marks(marked ? static_cast<size_t>(p.num_dst_blocks) : 0);
  const int number_bytes = packed_number_bytes(p);
  const bool taken =
      number_bytes > 0 && cpu::kernels().take_pairs(p.mapping, p.num_pairs, p.num_src_blocks, p.num_dst_blocks, packed,
                                                    number_bytes, marked ? marks.data() : nullptr);
  if (!taken) {
    for (int64_t pair = 0; pair < p.num_pairs; ++pair) {
      if (std::string error = block_pair_error(p, pair); !error.empty()) return error;
    }
  } else if (marked) {
    uint8_t read_too = 0;
    for (int64_t pair = 0; same_caches && pair < p.num_pairs; ++pair) {
      read_too |= marks[static_cast<size_t>(source(p, pair))];
    }
    if (read_too == 0) return "";
  }
  IndexSet read(same_caches ? p.num_pairs : 0);
  if (same_caches) {
    for (int64_t pair = 0; pair < p.num_pairs; ++pair) read.insert(source(p, pair));
  }
  IndexSet written(p.num_pairs);
  for (int64_t pair = 0; pair < p.num_pairs; ++pair) {
    const int64_t dst = destination(p, pair);
    int64_t other = 0;
    if (!written.insert(dst)) {
      while (destination(p, other) != dst) ++other;
      return block_clash(p, pair, other, "writes too");
    }
    if (same_caches && read.contains(dst)) {
      while (source(p, other) != dst) ++other;
      return block_clash(p, pair, other, "reads");
    }
  }
  return "";
}

// Where the tokens of sequence `seq` go in gather_kv: at least behind those of the sequence before.
std::string out_start_loc_error(const GatherKvParams &p, int64_t seq, int64_t num_tokens) {
  const char *name = "out_start_loc";
  const int64_t start = p.out_start_loc[seq];
  const int64_t next = p.out_start_loc[seq + 1];
  if (start < 0) return entry(name, seq) + " must be at least 0" + got(start);
  if (next < start + num_tokens) {
    return entry(name, seq + 1) + " must be at least " + entry(name, seq) + " + " + count(num_tokens, "token") + " = " +
           num(start + num_tokens) + got(next);
  }
  if (next > p.num_rows) {
    return entry(name, seq + 1) + " must be at most the " + count(p.num_rows, "row") + " of `k_out`" + got(next);
  }
  return "";
}

}  // namespace

std::string attention_index_error(const AttentionParams &p) {
  const BlockTables tables = {p.block_tables, p.block_table_stride, p.max_blocks_per_seq, p.block_size, p.num_blocks};
  const int32_t *starts = p.query_start_loc;
  if (starts != nullptr) {
    if (std::string error = query_start_loc_error(p); !error.empty()) return error;
  }
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    if (std::string error = seq_len_error(p.seq_lens, seq, tables); !error.empty()) return error;
    const int64_t len = p.seq_lens[seq];
    const int64_t num_query_tokens = starts == nullptr ? 1 : int64_t{starts[seq + 1]} - starts[seq];
    if (len == 0 || num_query_tokens == 0) continue;
    if (len < num_query_tokens) {
      return entry("seq_lens", seq) + " must be at least its " + count(num_query_tokens, "query token") + got(len);
    }
    const int64_t first_block = first_visible_key(p, len, num_query_tokens) / p.block_size;
    std::string error = block_table_error(tables, seq, first_block, blocks_for(len, p.block_size));
    if (!error.empty()) return error;
  }
  return "";
}

std::string reshape_and_cache_index_error(const ReshapeAndCacheParams &p) {
  const int64_t num_slots = p.num_blocks * p.block_size;
  const int64_t *slots = p.slot_mapping;
  IndexSet written(p.num_tokens);
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    const int64_t slot = slots[token];
    if (slot < 0) continue;
    if (slot >= num_slots) {
      return entry("slot_mapping", token) + " must be below num_blocks * block_size = " + num(num_slots) + got(slot);
    }
    if (written.insert(slot)) continue;
    const int64_t *other = std::find(slots, slots + token, slot);
    return entry("slot_mapping", token) + " writes slot " + num(slot) + ", which " +
           entry("slot_mapping", other - slots) + " writes too";
  }
  return "";
}

std::string rope_and_cache_index_error(const RopeAndCacheParams &p) {
  for (int64_t token = 0; token < p.write.num_tokens; ++token) {
    const int64_t position = p.position(token);
    if (position >= 0 && position < p.max_position) continue;
    return entry("positions", token) + " must be in 0 ... max_position - 1 = " + num(p.max_position - 1) +
           got(position);
  }
  return reshape_and_cache_index_error(p.write);
}

int packed_number_bytes(const CopyBlocksParams &p) {
  const int64_t num_blocks = std::max(p.num_src_blocks, p.num_dst_blocks);
  return num_blocks <= 1 << 16 ? 2 : num_blocks <= INT32_MAX ? 4 : 0;
}

std::string copy_blocks_index_error(const CopyBlocksParams &p) { return block_mapping_error(p, true, nullptr); }

std::string swap_blocks_index_error(const CopyBlocksParams &p, void *packed) {
  return block_mapping_error(p, false, packed);
}

std::string gather_kv_index_error(const GatherKvParams &p) {
  const BlockTables tables = {p.block_tables, p.block_table_stride, p.max_blocks_per_seq, p.block_size, p.num_blocks};
  int64_t num_rows_needed = 0;
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    if (std::string error = seq_len_error(p.seq_lens, seq, tables); !error.empty()) return error;
    const int64_t len = p.seq_lens[seq];
    const int64_t start = p.seq_starts == nullptr ? 0 : p.seq_starts[seq];
    if (start < 0 || start > len) {
      return entry("seq_starts", seq) + " must be in 0 ... " + entry("seq_lens", seq) + " = " + num(len) + got(start);
    }
    if (p.out_start_loc != nullptr) {
      if (std::string error = out_start_loc_error(p, seq, len - start); !error.empty()) return error;
    }
    num_rows_needed += len - start;
    if (len == start) continue;
    std::string error = block_table_error(tables, seq, start / p.block_size, blocks_for(len, p.block_size));
    if (!error.empty()) return error;
  }
  if (p.out_start_loc != nullptr || num_rows_needed <= p.num_rows) return "";
  return "`k_out` must have at least " + count(num_rows_needed, "row") + got(p.num_rows);
}

}  // namespace pagedattn
