// The snapshot of a manager: its whole state as plain arrays, written and read back.
//
// What a reader is given may be damaged: everything that is used as an index or a size is checked before, and at the
// end the invariants are proved as for any manager, the hashes too, which follow from the key and the tokens.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "blocks/check.h"
#include "blocks/tokens.h"

namespace pagedattn::blocks {

constexpr int64_t kSnapshotVersion = 3;

// Plain arrays; `sequences` has kSequenceFields numbers a sequence, the ragged ones follow each other without a gap.
// Namespaces are numbered in the order of their keys, so that there are as many as there are lengths of keys.
struct Snapshot {
  static constexpr int64_t kHeaderFields = 10;
  static constexpr int64_t kSequenceFields = 12;
  static constexpr size_t kCounters = 14;

  std::vector<int64_t> header;  // version, num_blocks, block_size, num_host_blocks, prefix_caching, window, next id,
                                // first block never used, first host block never used, num_events
  std::vector<double> watermark;
  std::vector<uint64_t> hash_key;
  std::vector<int64_t> counters;
  std::vector<uint32_t> generations;
  std::vector<int32_t> newest_children;
  std::vector<int32_t> cached_blocks, cached_parents;
  std::vector<uint32_t> cached_parent_generations;
  std::vector<uint64_t> cached_hashes;
  std::vector<int8_t> cached_priorities;
  std::vector<int32_t> cached_tokens;
  std::vector<int32_t> free_blocks;       // in the order in which they will be handed out
  std::vector<int32_t> evictable_blocks;  // in the order in which they will be evicted
  std::vector<int32_t> free_host_blocks;
  std::vector<int64_t> sequences;
  std::vector<int32_t> sequence_tokens;
  std::vector<int32_t> sequence_tables;
  std::vector<int32_t> namespace_newest_children;
  std::vector<int64_t> namespace_lengths;
  std::vector<uint8_t> namespace_keys;
};

// The fields by name, for whoever stores them: `visit(name, dtype, vector)`.
template <typename AnySnapshot, typename Visit>
void for_each_field(AnySnapshot &s, Visit visit) {
  visit("header", "int64", s.header);
  visit("watermark", "float64", s.watermark);
  visit("hash_key", "uint64", s.hash_key);
  visit("counters", "int64", s.counters);
  visit("generations", "uint32", s.generations);
  visit("newest_children", "int32", s.newest_children);
  visit("cached_blocks", "int32", s.cached_blocks);
  visit("cached_parents", "int32", s.cached_parents);
  visit("cached_parent_generations", "uint32", s.cached_parent_generations);
  visit("cached_hashes", "uint64", s.cached_hashes);
  visit("cached_priorities", "int8", s.cached_priorities);
  visit("cached_tokens", "int32", s.cached_tokens);
  visit("free_blocks", "int32", s.free_blocks);
  visit("evictable_blocks", "int32", s.evictable_blocks);
  visit("free_host_blocks", "int32", s.free_host_blocks);
  visit("sequences", "int64", s.sequences);
  visit("sequence_tokens", "int32", s.sequence_tokens);
  visit("sequence_tables", "int32", s.sequence_tables);
  visit("namespace_newest_children", "int32", s.namespace_newest_children);
  visit("namespace_lengths", "int64", s.namespace_lengths);
  visit("namespace_keys", "uint8", s.namespace_keys);
}

struct FieldView {
  const char *name;
  const char *dtype;
  const void *data;
  size_t num_bytes;
};

inline std::vector<FieldView> view_fields(const Snapshot &snapshot) {
  std::vector<FieldView> fields;
  for_each_field(snapshot, [&](const char *name, const char *dtype, const auto &values) {
    fields.push_back({name, dtype, values.data(), values.size() * sizeof(values[0])});
  });
  return fields;
}

inline void assign_field(Snapshot &snapshot, std::string_view wanted, const void *data, size_t num_bytes) {
  for_each_field(snapshot, [&](const char *name, const char *, auto &values) {
    if (wanted != name) return;
    values.resize(num_bytes / sizeof(values[0]));
    if (num_bytes > 0) std::memcpy(values.data(), data, num_bytes);
  });
}

class SnapshotWriter {
 public:
  static Snapshot write(const Manager &m) {
    const std::lock_guard lock(m.mutex_);
    Snapshot out;
    write_facts(m, out);
    const std::vector<int32_t> numbers = write_namespaces(m.pool_.namespaces(), out);
    write_cache(m.pool_, numbers, out);
    write_lists(m, out);
    for (const SequenceMap *map : {&m.sequences_, &m.pins_}) {
      for (const int64_t id : Manager::sorted_ids(*map)) write_sequence(*map->find(id), map == &m.pins_, numbers, out);
    }
    return out;
  }

 private:
  static void write_facts(const Manager &m, Snapshot &out) {
    const PoolCounters &p = m.pool_.counters();
    const Counters &c = m.counters_;
    out.header = {kSnapshotVersion,         m.config_.num_blocks, m.config_.block_size, m.config_.num_host_blocks,
                  m.config_.prefix_caching, m.config_.window,     m.next_id_,           m.pool_.places_.num_used(),
                  m.host_.next_unused_,     m.config_.num_events};
    out.watermark = {m.config_.watermark};
    out.hash_key.assign(std::begin(m.pool_.key().words), std::end(m.pool_.key().words));
    out.counters = {p.allocated,
                    p.freed,
                    p.evicted,
                    p.published,
                    p.peak_held,
                    c.prefix_queried_tokens,
                    c.prefix_hit_tokens,
                    c.partial_hit_tokens,
                    c.cow_copies,
                    c.merged_duplicates,
                    c.window_released,
                    c.preemptions,
                    c.swapped_out_blocks,
                    c.swapped_in_blocks};
  }

  static int32_t numbered(int32_t block, const std::vector<int32_t> &numbers) {
    return block < 0 ? ~numbers[static_cast<size_t>(~block)] : block;
  }

  static void write_cache(const BlockPool &pool, const std::vector<int32_t> &numbers, Snapshot &out) {
    for (int32_t block = 0; pool.caching() && block < pool.places_.num_used(); ++block) {
      const BlockPool::Node &node = pool.nodes_[block];
      out.generations.push_back(node.generation);
      out.newest_children.push_back(node.newest_child);
      if (!pool.published(block)) continue;
      out.cached_blocks.push_back(block);
      out.cached_parents.push_back(numbered(node.parent.block, numbers));
      out.cached_parent_generations.push_back(node.parent.generation);
      out.cached_hashes.insert(out.cached_hashes.end(), {node.hash.lo, node.hash.hi});
      out.cached_priorities.push_back(pool.places_.priority(block));
      out.cached_tokens.insert(out.cached_tokens.end(), pool.tokens(block), pool.tokens(block) + pool.block_size());
    }
  }

  static void write_lists(const Manager &m, Snapshot &out) {
    const BlockPlaces &places = m.pool_.places_;
    for (int32_t b = places.free_top_; b != kNone; b = places.states_[b] - 1) out.free_blocks.push_back(b);
    places.evictable().for_each([&](int32_t block, int8_t, int32_t) { out.evictable_blocks.push_back(block); });
    for (int32_t b = m.host_.free_top_; b != kNone; b = m.host_.free_link_[b]) out.free_host_blocks.push_back(b);
  }

  static void write_sequence(const Sequence &s, bool is_pin, const std::vector<int32_t> &numbers, Snapshot &out) {
    const int64_t flags = s.swapped | s.started << 1 | s.chain_broken << 2 | s.queried << 3 | s.borrows_tail << 4 |
                          is_pin << 5 | s.counts_hits << 6;
    out.sequences.insert(
        out.sequences.end(),
        {s.id, s.num_tokens(), s.num_blocks(), s.num_computed, s.num_cached, s.num_published, s.num_released,
         numbered(s.tip.block, numbers), s.tip.generation, numbers[static_cast<size_t>(s.space)], s.priority, flags});
    out.sequence_tokens.insert(out.sequence_tokens.end(), s.tokens.begin(), s.tokens.end());
    out.sequence_tables.insert(out.sequence_tables.end(), s.table.begin(), s.table.end());
  }

  // The number in the snapshot of each slot.
  static std::vector<int32_t> write_namespaces(const Namespaces &namespaces, Snapshot &out) {
    std::vector<int32_t> slots;
    for (int32_t space = 0; space < namespaces.num_slots(); ++space) {
      if (namespaces.live(space)) slots.push_back(space);
    }
    std::sort(slots.begin(), slots.end(), [&](int32_t a, int32_t b) { return namespaces.key(a) < namespaces.key(b); });
    std::vector<int32_t> numbers(static_cast<size_t>(namespaces.num_slots()), kNone);
    for (const int32_t space : slots) {
      const std::string &key = namespaces.key(space);
      numbers[static_cast<size_t>(space)] = static_cast<int32_t>(out.namespace_lengths.size());
      out.namespace_newest_children.push_back(namespaces.newest_child(space));
      out.namespace_lengths.push_back(static_cast<int64_t>(key.size()));
      out.namespace_keys.insert(out.namespace_keys.end(), key.begin(), key.end());
    }
    return numbers;
  }
};

class SnapshotReader {
  // So many are never reached by counting, and there is as much to go until a number overflows.
  static constexpr int64_t kMostIds = int64_t{1} << 62;

 public:
  // With fewer than 64 `hash_bits` it is the snapshot of a manager whose hash has been weakened.
  static std::unique_ptr<Manager> read(const Snapshot &in, int hash_bits = 64) {
    auto m = std::make_unique<Manager>(read_config(in));
    m->weaken_hash(hash_bits);
    m->next_id_ = in.header[6];
    m->pool_.places_.next_unused_ = static_cast<int32_t>(in.header[7]);
    m->host_.next_unused_ = static_cast<int32_t>(in.header[8]);
    read_namespaces(m->pool_, in);
    read_cache(m->pool_, in);
    read_lists(*m, in);
    read_sequences(*m, in);
    read_counters(*m, in);
    try {
      Check::run_structure(*m);
    } catch (const CorruptState &error) {
      bad(std::string("`snapshot` contradicts itself: ") + error.what());
    }
    require(Check::block_with_wrong_hash(m->pool_) == kNone, "cached_hashes",
            "follow from `hash_key`, `cached_parents` and `cached_tokens`");
    require(Check::sequence_with_wrong_prefix(*m) == nullptr, "sequence_tokens",
            "be those of the cached blocks that the sequences use");
    return m;
  }

 private:
  [[noreturn]] static void bad(const std::string &what) { throw InvalidArgument("BlockManager.restore: " + what); }
  static void require(bool holds, const char *field, const char *rule) {
    if (!holds) bad(std::string("`snapshot['") + field + "']` must " + rule);
  }
  static bool lies_in(int64_t low, int64_t x, int64_t high) { return low <= x && x <= high; }

  static void read_counters(Manager &m, const Snapshot &in) {
    const auto &c = in.counters;
    require(std::all_of(c.begin(), c.end(), [](int64_t count) { return lies_in(0, count, kMostIds); }), "counters",
            "lie in 0 ... 2**62");
    m.pool_.counters_ = {c[0], c[1], c[2], c[3], c[4]};
    m.counters_ = {c[5], c[6], c[7], c[8], c[9], c[10], c[11], c[12], c[13]};
    require(lies_in(m.pool_.num_held(), c[4], m.pool_.num_blocks()), "counters",
            "hold a peak between the blocks that are held and all blocks");
  }

  static Config read_config(const Snapshot &in) {
    const auto &h = in.header;
    require(!h.empty(), "header", "hold the version");
    if (in.header[0] != kSnapshotVersion) {
      bad("`snapshot` must have version " + std::to_string(kSnapshotVersion) + "; got " + std::to_string(in.header[0]));
    }
    require(h.size() == Snapshot::kHeaderFields, "header", "hold 10 numbers");
    require(in.watermark.size() == 1, "watermark", "hold one number");
    require(in.hash_key.size() == HashKey::kNumWords, "hash_key", "hold 22 words");
    require(in.counters.size() == Snapshot::kCounters, "counters", "hold 14 numbers");
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    for (const size_t i : {1u, 2u, 3u, 7u, 8u, 9u})
      require(lies_in(0, h[i], kMax), "header", "hold sizes that are in range");
    require(h[1] > 0 && h[2] > 0 && lies_in(0, h[4], 1), "header", "hold sizes that are in range");
    require(lies_in(0, h[5], kMostIds) && lies_in(0, h[6], kMostIds), "header",
            "hold a window and a next id in 0 ... 2**62");
    require(h[7] <= h[1] && h[8] <= h[3], "header", "use no more blocks than there are");
    require(in.watermark[0] >= 0 && in.watermark[0] < 1, "watermark", "lie in [0, 1)");
    Config config;
    config.num_blocks = static_cast<int32_t>(in.header[1]);
    config.block_size = static_cast<int32_t>(in.header[2]);
    config.num_host_blocks = static_cast<int32_t>(in.header[3]);
    config.prefix_caching = in.header[4] != 0;
    config.window = in.header[5];
    config.watermark = in.watermark[0];
    config.num_events = in.header[9];
    std::copy(in.hash_key.begin(), in.hash_key.end(), config.key.words);
    return config;
  }

  static void read_namespaces(BlockPool &pool, const Snapshot &in) {
    Namespaces &namespaces = pool.namespaces();
    require(in.namespace_lengths.size() == in.namespace_newest_children.size() &&
                in.namespace_lengths.size() <= static_cast<size_t>(std::numeric_limits<int32_t>::max()),
            "namespace_lengths", "be as many as `namespace_newest_children`");
    size_t at = 0;
    for (size_t i = 0; i < in.namespace_lengths.size(); ++i) {
      const auto length = static_cast<size_t>(in.namespace_lengths[i]);
      require(in.namespace_lengths[i] >= 0 && length <= in.namespace_keys.size() - at, "namespace_lengths",
              "sum up to the length of `namespace_keys`");
      const auto *bytes = reinterpret_cast<const char *>(in.namespace_keys.data()) + at;
      const std::string key(bytes, length);
      require(i == 0 || namespaces.key(static_cast<int32_t>(i) - 1) < key, "namespace_keys", "ascend");
      const auto space = static_cast<int32_t>(i);
      namespaces.insert(space, key, pool.key());
      require_child(pool, in.namespace_newest_children[i], "namespace_newest_children");
      namespaces.newest_child(space) = in.namespace_newest_children[i];
      at += length;
    }
    require(at == in.namespace_keys.size(), "namespace_lengths", "sum up to the length of `namespace_keys`");
  }

  static void require_child(const BlockPool &pool, int32_t child_plus_one, const char *field) {
    require(lies_in(0, child_plus_one, pool.places_.num_used()), field, "name blocks that are in use");
  }

  // Whether a block had this generation while it was published, be it once: others are nobody's parent.
  static bool was_node(const BlockPool &pool, int64_t block, int64_t generation) {
    return pool.caching() && lies_in(0, block, pool.places_.num_used() - 1) && generation % 2 == 1 &&
           lies_in(1, generation, pool.nodes_[block].generation);
  }

  static void read_cache(BlockPool &pool, const Snapshot &in) {
    const size_t n = in.cached_blocks.size();
    const size_t used = pool.caching() ? static_cast<size_t>(pool.places_.num_used()) : 0;
    const auto size = static_cast<size_t>(pool.block_size());
    const auto require_length = [](size_t got, size_t wanted, const char *field) {
      require(got == wanted, field, "have the length that follows from `header` and `cached_blocks`");
    };
    require(pool.caching() || n == 0, "cached_blocks", "be empty where nothing is cached");
    require_length(in.generations.size(), used, "generations");
    require_length(in.newest_children.size(), used, "newest_children");
    require_length(in.cached_parents.size(), n, "cached_parents");
    require_length(in.cached_parent_generations.size(), n, "cached_parent_generations");
    require_length(in.cached_hashes.size(), 2 * n, "cached_hashes");
    require_length(in.cached_priorities.size(), n, "cached_priorities");
    require_length(in.cached_tokens.size(), n * size, "cached_tokens");
    for (size_t i = 0; i < used; ++i) {
      BlockPool::Node &node = pool.nodes_[static_cast<int64_t>(i)];
      require_child(pool, in.newest_children[i], "newest_children");
      node.generation = in.generations[i];
      node.newest_child = in.newest_children[i];
    }
    for (size_t i = 0; i < n; ++i) {
      const int32_t block = in.cached_blocks[i];
      const Parent parent{in.cached_parents[i], in.cached_parent_generations[i]};
      require(block >= 0 && block < pool.places_.num_used() && (i == 0 || block > in.cached_blocks[i - 1]) &&
                  pool.published(block),
              "cached_blocks", "ascend and be those of an odd number in `generations`");
      require(parent.block < 0 ? pool.namespaces().live(~parent.block) && parent.generation == 0
                               : was_node(pool, parent.block, parent.generation),
              "cached_parents", "name namespaces, and blocks as they were in the cache; a block has no parent");
      BlockPool::Node &node = pool.nodes_[block];
      node.parent = parent;
      node.hash = {in.cached_hashes[2 * i], in.cached_hashes[2 * i + 1]};
      pool.places_.set_priority(block, in.cached_priorities[i]);
      std::memcpy(&pool.tokens_[int64_t{block} * pool.block_size()], &in.cached_tokens[i * size],
                  size * sizeof(int32_t));
      pool.index_.insert(block, node.hash.lo);
      if (parent.block < 0) pool.namespaces().retain(~parent.block);
      ++pool.num_published_;
    }
  }

  static void read_lists(Manager &m, const Snapshot &in) {
    BlockPlaces &places = m.pool_.places_;
    const auto require_used = [](int32_t block, int32_t num_used, const char *field) {
      require(block >= 0 && block < num_used, field, "name blocks that are in use");
    };
    for (size_t i = in.free_blocks.size(); i-- > 0;) {
      require_used(in.free_blocks[i], places.num_used(), "free_blocks");
      places.put_free(in.free_blocks[i]);
    }
    require(in.evictable_blocks.size() <= static_cast<size_t>(places.num_used()), "evictable_blocks",
            "be no more than there are");
    int8_t lowest = std::numeric_limits<int8_t>::min();
    for (const int32_t block : in.evictable_blocks) {
      require_used(block, places.num_used(), "evictable_blocks");
      require(places.priority(block) >= lowest, "evictable_blocks", "ascend in their priority");
      lowest = places.priority(block);
      places.put_evictable(block);
    }
    for (size_t i = in.free_host_blocks.size(); i-- > 0;) {
      const int32_t block = in.free_host_blocks[i];
      require_used(block, m.host_.next_unused_, "free_host_blocks");
      m.host_.free_link_[block] = m.host_.free_top_;
      m.host_.free_top_ = block;
    }
  }

  static void read_sequences(Manager &m, const Snapshot &in) {
    require(in.sequences.size() % Snapshot::kSequenceFields == 0, "sequences", "hold 12 numbers each");
    require(all_tokens(in.sequence_tokens.data(), static_cast<int64_t>(in.sequence_tokens.size())), "sequence_tokens",
            "lie in 0 ... 2147483647");
    size_t token = 0;
    size_t entry = 0;
    for (size_t at = 0; at < in.sequences.size(); at += Snapshot::kSequenceFields) {
      const int64_t *f = &in.sequences[at];
      require_sequence(f[1] >= 0 && static_cast<size_t>(f[1]) <= in.sequence_tokens.size() - token && f[2] >= 0 &&
                           static_cast<size_t>(f[2]) <= in.sequence_tables.size() - entry,
                       "has not as many tokens and blocks as it says");
      require_sequence(f[0] >= 0 && m.sequences_.find(f[0]) == nullptr && m.pins_.find(f[0]) == nullptr, "is repeated");
      require_sequence(f[1] <= m.most_tokens_ && lies_in(0, f[3], f[1]), "is too long");
      require_sequence(f[9] >= 0 && f[9] < m.pool_.namespaces().num_slots(), "is in no namespace");
      require_sequence(f[7] == ~f[9] ? f[8] == 0 : was_node(m.pool_, f[7], f[8]),
                       "continues a block that there is not");
      require_sequence(lies_in(-128, f[10], 127) && lies_in(0, f[11], 127), "has a priority or flags out of range");
      auto s = std::make_unique<Sequence>(read_sequence(f));
      const auto *tokens = in.sequence_tokens.data() + token;
      const auto *table = in.sequence_tables.data() + entry;
      s->tokens.assign(tokens, tokens + f[1]);
      s->table.assign(table, table + f[2]);
      token += static_cast<size_t>(f[1]);
      entry += static_cast<size_t>(f[2]);
      count_references(m, *s);
      ((f[11] & 32) != 0 ? m.pins_ : m.sequences_).insert(std::move(s));
    }
    require(token == in.sequence_tokens.size(), "sequence_tokens", "be those of `sequences` and no more");
    require(entry == in.sequence_tables.size(), "sequence_tables", "be those of `sequences` and no more");
  }

  static void require_sequence(bool holds, const char *what) {
    if (!holds) bad(std::string("`snapshot['sequences']` must be in order; one ") + what);
  }

  static Sequence read_sequence(const int64_t *f) {
    Sequence s;
    s.id = f[0];
    s.num_computed = f[3];
    s.num_cached = f[4];
    s.num_published = f[5];
    s.num_released = f[6];
    s.tip = {static_cast<int32_t>(f[7]), static_cast<uint32_t>(f[8])};
    s.space = static_cast<int32_t>(f[9]);
    s.priority = static_cast<int8_t>(f[10]);
    s.swapped = (f[11] & 1) != 0;
    s.started = (f[11] & 2) != 0;
    s.chain_broken = (f[11] & 4) != 0;
    s.queried = (f[11] & 8) != 0;
    s.borrows_tail = (f[11] & 16) != 0;
    s.counts_hits = (f[11] & 64) != 0;
    s.shares_tail = true;  // the next write looks
    return s;
  }

  static void count_references(Manager &m, const Sequence &s) {
    for (const int32_t block : s.table) {
      if (block == kNone) continue;
      require(block >= 0 && block < (s.swapped ? m.config_.num_host_blocks : m.config_.num_blocks), "sequence_tables",
              "name blocks of the pool");
      BlockPlaces &places = m.pool_.places_;
      if (s.swapped) {
        if (m.host_.count_[block]++ == 0) ++m.host_.num_held_;
      } else if (places.held(block)) {
        places.add_reference(block);
      } else {
        places.hold_first(block);
      }
    }
    m.pool_.namespaces().retain(s.space);
  }
};

}  // namespace pagedattn::blocks
