// The whole state of a manager: the proof of its invariants, its picture, and its snapshot as plain arrays.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "blocks/manager_swap.h"

namespace pagedattn::blocks {

constexpr int64_t kSnapshotVersion = 1;
constexpr int32_t kMaxNamespaces = 1 << 24;  // so that a damaged snapshot cannot ask for all of the memory

// Plain arrays; `sequences` has kSequenceFields numbers a sequence, the ragged ones follow each other without a gap.
struct Snapshot {
  static constexpr int64_t kHeaderFields = 9;
  static constexpr int64_t kSequenceFields = 12;

  std::vector<int64_t> header;  // version, num_blocks, block_size, num_host_blocks, prefix_caching, window, next id,
                                // first block never used, first host block never used
  std::vector<double> watermark;
  std::vector<uint64_t> hash_key;
  std::vector<int64_t> counters;
  std::vector<uint32_t> generations;
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
  std::vector<int32_t> namespaces;
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
  visit("namespaces", "int32", s.namespaces);
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

// What a picture of the cache needs.
struct Layout {
  std::vector<int64_t> sequences;  // id, tokens, computed tokens, table entries, swapped
  std::vector<int32_t> tables;
  std::vector<int32_t> ref_counts;
  std::vector<uint8_t> published;
};

class State {
 public:
  static void check(const Manager &m) {
    const std::lock_guard lock(m.mutex_);
    check_unlocked(m);
  }
  static Layout layout(const Manager &m);
  static Snapshot snapshot(const Manager &m);
  static std::unique_ptr<Manager> restore(const Snapshot &snapshot);

 private:
  // --- check ---
  [[noreturn]] static void broken(const std::string &what) { throw CorruptState("BlockManager.check: " + what); }
  static void expect(bool holds, const char *what, int64_t which) {
    if (!holds) broken(std::string(what) + " (" + std::to_string(which) + ")");
  }
  static std::string block_text(int64_t block) { return "block " + std::to_string(block); }

  static void check_unlocked(const Manager &m) {
    std::vector<int32_t> count(static_cast<size_t>(m.config_.num_blocks));
    std::vector<int32_t> host_count(static_cast<size_t>(m.config_.num_host_blocks));
    std::vector<int64_t> users(static_cast<size_t>(m.pool_.namespaces().num_slots()));
    m.sequences_.for_each([&](const Sequence &s) { check_sequence(m, s, s.swapped ? host_count : count, users); });
    check_places(m.pool_, count);
    check_index(m.pool_, users);
    check_host(m.host_, host_count);
    for (int32_t space = 0; space < m.pool_.namespaces().num_slots(); ++space) {
      expect(m.pool_.namespaces().users(space) == users[static_cast<size_t>(space)],
             "a namespace has the wrong number of users", space);
    }
  }

  static void check_sequence(const Manager &m, const Sequence &s, std::vector<int32_t> &count,
                             std::vector<int64_t> &users) {
    const int64_t size = m.config_.block_size;
    expect(s.id >= 0 && s.id < m.next_id_, "a sequence has an id that was never handed out", s.id);
    expect(s.num_tokens() >= 1, "a sequence has no tokens", s.id);
    expect(s.num_computed >= 0 && s.num_computed <= s.num_tokens(), "a sequence computed tokens it does not have",
           s.id);
    expect(s.num_cached >= 0 && s.num_cached <= s.num_computed, "a sequence found more cached than it has", s.id);
    expect(s.num_blocks() == m.blocks_for(s.num_computed), "a block table does not match the computed tokens", s.id);
    expect(s.num_released >= 0 && s.num_released <= s.num_blocks(), "a window released blocks that never were", s.id);
    expect(m.pool_.namespaces().live(s.space), "a sequence is in no live namespace", s.id);
    ++users[static_cast<size_t>(s.space)];
    for (int64_t i = 0; i < s.num_blocks(); ++i) {
      const int32_t block = s.table[static_cast<size_t>(i)];
      expect((block == kNone) == (i < s.num_released), "a released block is not at the head of its table", s.id);
      if (block == kNone) continue;
      expect(block >= 0 && static_cast<size_t>(block) < count.size(), "a block table points outside the pool", s.id);
      ++count[static_cast<size_t>(block)];
    }
    expect(s.num_published >= 0 && s.num_published <= s.num_computed / size, "a published block is not full", s.id);
    if (s.swapped) expect(s.num_published == 0, "a swapped sequence claims device blocks in the cache", s.id);
    check_chain(m, s);
  }

  // The published blocks of a sequence hold its tokens and descend from each other and from its namespace.
  static void check_chain(const Manager &m, const Sequence &s) {
    Parent parent = Namespaces::root(s.space);
    bool known = true;
    for (int64_t i = 0; i < s.num_published; ++i) {
      const int32_t block = s.table[static_cast<size_t>(i)];
      if (block == kNone) {
        known = false;
        continue;
      }
      expect(m.pool_.published(block), "a sequence's published block is not in the cache", block);
      expect(m.pool_.same_tokens(block, s.tokens.data() + i * m.config_.block_size),
             "a cached block holds other tokens than the sequence that uses it", block);
      expect(!known || m.pool_.nodes_[block].parent == parent, "a cached block has the wrong parent", block);
      parent = m.pool_.node(block);
      known = true;
    }
    if (known && !s.chain_broken) expect(s.tip == parent, "a sequence continues the wrong chain", s.id);
  }

  // Every block is held, free or evictable, and only one of these.
  static void check_places(const BlockPool &pool, const std::vector<int32_t> &count) {
    std::vector<char> listed(static_cast<size_t>(pool.num_blocks_));
    const auto visit = [&](int32_t block, bool published) {
      if (block < 0 || block >= pool.next_unused_)
        broken("a list holds " + block_text(block) + ", which is not in use");
      if (listed[static_cast<size_t>(block)]++) broken(block_text(block) + " is in the free lists twice");
      expect(pool.count_[block] == 0, "a held block is in a free list", block);
      expect(pool.published(block) == published, "a free block is in the wrong list", block);
    };
    int64_t free = 0;
    for (int32_t b = pool.free_top_; b != kNone; b = pool.order_.free_link(b), ++free) visit(b, false);
    expect(free == pool.num_stacked_, "the free blocks are miscounted", free);
    int64_t evictable = 0;
    for (int p = 0; p < EvictionOrder::kNumPriorities; ++p) {
      int32_t previous = kNone;
      for (int32_t b = pool.order_.head(p); b != kNone; previous = b, b = pool.order_.next(b), ++evictable) {
        visit(b, true);
        expect(pool.order_.previous(b) == previous, "an eviction list is torn", b);
        expect(EvictionOrder::index(pool.priority_[b]) == p, "a block waits under another priority", b);
      }
      expect(pool.order_.tail(p) == previous, "an eviction list has lost its tail", previous);
    }
    expect(evictable == pool.order_.size(), "the evictable blocks are miscounted", evictable);
    int64_t held = 0;
    for (int32_t b = 0; b < pool.num_blocks_; ++b) {
      const int32_t expected = count[static_cast<size_t>(b)];
      if (pool.count_[b] != expected) {
        broken(block_text(b) + " counts " + std::to_string(pool.count_[b]) + " references and " +
               std::to_string(expected) + " block-table entries name it");
      }
      held += expected > 0;
      if (b >= pool.next_unused_) expect(expected == 0, "a never-used block is held", b);
      if (b < pool.next_unused_ && expected == 0 && !listed[static_cast<size_t>(b)])
        broken(block_text(b) + " has leaked");
    }
    expect(held == pool.num_held_, "the held blocks are miscounted", held);
  }

  static void check_index(const BlockPool &pool, std::vector<int64_t> &users) {
    if (!pool.caching_) return;
    int64_t indexed = 0;
    std::vector<char> seen(static_cast<size_t>(pool.num_blocks_));
    for (int64_t k = 0; k < pool.num_buckets_; ++k) {
      for (int32_t b = pool.buckets_[k] - 1; b != kNone; b = pool.nodes_[b].chain - 1, ++indexed) {
        expect(b >= 0 && b < pool.num_blocks_, "the prefix index points outside the pool", b);
        if (seen[static_cast<size_t>(b)]++) broken(block_text(b) + " is in the prefix index twice");
        expect(pool.published(b), "the prefix index holds a withdrawn block", b);
        expect(pool.bucket(pool.nodes_[b].hash) == k, "a cached block is in the wrong bucket", b);
        const Parent parent = pool.nodes_[b].parent;
        if (parent.block >= 0) continue;
        expect(pool.namespaces_.live(~parent.block), "a cached block is in no live namespace", b);
        ++users[static_cast<size_t>(~parent.block)];
      }
    }
    expect(indexed == pool.num_published_, "the cached blocks are miscounted", indexed);
    for (int32_t b = 0; b < pool.num_blocks_; ++b) {
      if (pool.published(b)) expect(seen[static_cast<size_t>(b)], "a cached block is missing from the prefix index", b);
    }
  }

  static void check_host(const HostPool &host, const std::vector<int32_t> &count) {
    std::vector<char> listed(static_cast<size_t>(host.num_blocks_));
    for (int32_t b = host.free_top_; b != kNone; b = host.free_link_[b]) {
      expect(b >= 0 && b < host.next_unused_, "the free list of the host pool points outside it", b);
      expect(!listed[static_cast<size_t>(b)]++, "a host block is free twice", b);
    }
    int32_t held = 0;
    for (int32_t b = 0; b < host.num_blocks_; ++b) {
      expect(host.count_[b] == count[static_cast<size_t>(b)], "a host block is miscounted", b);
      held += host.count_[b] > 0;
      const bool is_free = b >= host.next_unused_ || listed[static_cast<size_t>(b)];
      expect(is_free == (host.count_[b] == 0), "a host block is lost, or free and held", b);
    }
    expect(held == host.num_held_, "the held host blocks are miscounted", held);
  }

  // --- restore ---
  [[noreturn]] static void bad(const std::string &what) { throw InvalidArgument("BlockManager.restore: " + what); }
  static void require(bool holds, const char *what) {
    if (!holds) bad(std::string("`snapshot` must be one that BlockManager.snapshot() made; ") + what);
  }
  static Config read_config(const Snapshot &in);
  static void restore_cache(BlockPool &pool, const Snapshot &in);
  static void restore_free_blocks(BlockPool &pool, const Snapshot &in);
  static void restore_host(HostPool &host, const Snapshot &in);
  static void restore_sequences(Manager &m, const Snapshot &in);
};

inline Layout State::layout(const Manager &m) {
  const std::lock_guard lock(m.mutex_);
  Layout out;
  for (const int64_t id : m.sorted_ids()) {
    const Sequence &s = *m.sequences_.find(id);
    out.sequences.insert(out.sequences.end(), {id, s.num_tokens(), s.num_computed, s.num_blocks(), s.swapped});
    out.tables.insert(out.tables.end(), s.table.begin(), s.table.end());
  }
  for (int32_t block = 0; block < m.config_.num_blocks; ++block) {
    out.ref_counts.push_back(m.pool_.ref_count(block));
    out.published.push_back(m.pool_.published(block));
  }
  return out;
}

inline Snapshot State::snapshot(const Manager &m) {
  const std::lock_guard lock(m.mutex_);
  const BlockPool &pool = m.pool_;
  const PoolCounters &p = pool.counters_;
  const Counters &c = m.counters_;
  Snapshot out;
  out.header = {kSnapshotVersion,         m.config_.num_blocks, m.config_.block_size, m.config_.num_host_blocks,
                m.config_.prefix_caching, m.config_.window,     m.next_id_,           pool.next_unused_,
                m.host_.next_unused_};
  out.watermark = {m.config_.watermark};
  out.hash_key.assign(std::begin(pool.key_.words), std::end(pool.key_.words));
  out.counters = {
      p.allocated,         p.freed,      p.evicted,           p.published,       p.peak_held,   c.prefix_queried_tokens,
      c.prefix_hit_tokens, c.cow_copies, c.merged_duplicates, c.window_released, c.preemptions, c.swapped_out_blocks,
      c.swapped_in_blocks};
  for (int32_t block = 0; pool.caching_ && block < pool.next_unused_; ++block) {
    const BlockPool::Node &node = pool.nodes_[block];
    out.generations.push_back(node.generation);
    if (!pool.published(block)) continue;
    out.cached_blocks.push_back(block);
    out.cached_parents.push_back(node.parent.block);
    out.cached_parent_generations.push_back(node.parent.generation);
    out.cached_hashes.insert(out.cached_hashes.end(), {node.hash.lo, node.hash.hi});
    out.cached_priorities.push_back(pool.priority_[block]);
    out.cached_tokens.insert(out.cached_tokens.end(), pool.tokens(block), pool.tokens(block) + pool.block_size_);
  }
  for (int32_t b = pool.free_top_; b != kNone; b = pool.order_.free_link(b)) out.free_blocks.push_back(b);
  for (int i = 0; i < EvictionOrder::kNumPriorities; ++i) {
    for (int32_t b = pool.order_.head(i); b != kNone; b = pool.order_.next(b)) out.evictable_blocks.push_back(b);
  }
  for (int32_t b = m.host_.free_top_; b != kNone; b = m.host_.free_link_[b]) out.free_host_blocks.push_back(b);
  for (const int64_t id : m.sorted_ids()) {
    const Sequence &s = *m.sequences_.find(id);
    const int64_t flags = s.swapped | s.started << 1 | s.chain_broken << 2 | s.queried << 3;
    out.sequences.insert(out.sequences.end(),
                         {id, s.num_tokens(), s.num_blocks(), s.num_computed, s.num_cached, s.num_published,
                          s.num_released, s.tip.block, s.tip.generation, s.space, s.priority, flags});
    out.sequence_tokens.insert(out.sequence_tokens.end(), s.tokens.begin(), s.tokens.end());
    out.sequence_tables.insert(out.sequence_tables.end(), s.table.begin(), s.table.end());
  }
  for (int32_t space = 0; space < pool.namespaces_.num_slots(); ++space) {
    if (!pool.namespaces_.live(space)) continue;
    const std::string &key = pool.namespaces_.key(space);
    out.namespaces.push_back(space);
    out.namespace_lengths.push_back(static_cast<int64_t>(key.size()));
    out.namespace_keys.insert(out.namespace_keys.end(), key.begin(), key.end());
  }
  return out;
}

inline Config State::read_config(const Snapshot &in) {
  require(!in.header.empty(), "its header is empty");
  if (in.header[0] != kSnapshotVersion) {
    bad("`snapshot` must have version " + std::to_string(kSnapshotVersion) + "; got " + std::to_string(in.header[0]));
  }
  require(static_cast<int64_t>(in.header.size()) == Snapshot::kHeaderFields && in.watermark.size() == 1 &&
              in.hash_key.size() == HashKey::kNumWords && in.counters.size() == 13,
          "its header is incomplete");
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  for (const size_t i : {1u, 2u, 3u, 7u, 8u})
    require(in.header[i] >= 0 && in.header[i] <= kMax, "a size is out of range");
  require(in.header[1] > 0 && in.header[2] > 0 && in.header[5] >= 0 && in.header[6] >= 0, "a size is out of range");
  require(in.header[7] <= in.header[1] && in.header[8] <= in.header[3], "it uses more blocks than there are");
  require(in.watermark[0] >= 0 && in.watermark[0] < 1, "its watermark is out of range");
  Config config;
  config.num_blocks = static_cast<int32_t>(in.header[1]);
  config.block_size = static_cast<int32_t>(in.header[2]);
  config.num_host_blocks = static_cast<int32_t>(in.header[3]);
  config.prefix_caching = in.header[4] != 0;
  config.window = in.header[5];
  config.watermark = in.watermark[0];
  std::copy(in.hash_key.begin(), in.hash_key.end(), config.key.words);
  return config;
}

inline void State::restore_cache(BlockPool &pool, const Snapshot &in) {
  size_t at = 0;
  require(in.namespaces.size() == in.namespace_lengths.size(), "its namespaces are incomplete");
  for (size_t i = 0; i < in.namespaces.size(); ++i) {
    const auto length = static_cast<size_t>(in.namespace_lengths[i]);
    require(in.namespace_lengths[i] >= 0 && length <= in.namespace_keys.size() - at, "its namespaces are incomplete");
    require(in.namespaces[i] >= 0 && in.namespaces[i] < kMaxNamespaces && !pool.namespaces_.live(in.namespaces[i]),
            "a namespace is repeated");
    const std::string key(in.namespace_keys.begin() + static_cast<std::ptrdiff_t>(at),
                          in.namespace_keys.begin() + static_cast<std::ptrdiff_t>(at + length));
    require(pool.namespaces_.find(key) == kNone, "a namespace is repeated");
    pool.namespaces_.insert(in.namespaces[i], key, pool.key_);
    at += length;
  }
  pool.namespaces_.rebuild_free_slots();

  const size_t n = in.cached_blocks.size();
  const auto size = static_cast<size_t>(pool.block_size_);
  require(in.generations.size() == (pool.caching_ ? static_cast<size_t>(pool.next_unused_) : 0) &&
              in.cached_parents.size() == n && in.cached_parent_generations.size() == n &&
              in.cached_hashes.size() == 2 * n && in.cached_priorities.size() == n &&
              in.cached_tokens.size() == n * size && (pool.caching_ || n == 0),
          "its cached blocks are incomplete");
  for (size_t i = 0; i < in.generations.size(); ++i) {
    pool.nodes_[static_cast<int64_t>(i)].generation = in.generations[i];
  }
  for (size_t i = 0; i < n; ++i) {
    const int32_t block = in.cached_blocks[i];
    const Parent parent{in.cached_parents[i], in.cached_parent_generations[i]};
    require(
        block >= 0 && block < pool.next_unused_ && (i == 0 || block > in.cached_blocks[i - 1]) && pool.published(block),
        "a cached block is out of range or repeated");
    require(parent.block < 0 ? pool.namespaces_.live(~parent.block) : parent.block < pool.num_blocks_,
            "a cached block has no parent");
    BlockPool::Node &node = pool.nodes_[block];
    node.parent = parent;
    node.hash = {in.cached_hashes[2 * i], in.cached_hashes[2 * i + 1]};
    pool.priority_[block] = in.cached_priorities[i];
    std::memcpy(&pool.tokens_[int64_t{block} * pool.block_size_], &in.cached_tokens[i * size], size * sizeof(int32_t));
    pool.insert_in_bucket(block);
    if (parent.block < 0) pool.namespaces_.retain(~parent.block);
    ++pool.num_published_;
  }
}

inline void State::restore_free_blocks(BlockPool &pool, const Snapshot &in) {
  const auto require_free = [&](int32_t block) {
    require(block >= 0 && block < pool.next_unused_, "a free block is out of range");
  };
  for (size_t i = in.free_blocks.size(); i-- > 0;) {
    require_free(in.free_blocks[i]);
    pool.stack(in.free_blocks[i]);
  }
  for (const int32_t block : in.evictable_blocks) {
    require_free(block);
    pool.order_.push_back(block, pool.priority_[block]);
  }
}

inline void State::restore_host(HostPool &host, const Snapshot &in) {
  for (size_t i = in.free_host_blocks.size(); i-- > 0;) {
    const int32_t block = in.free_host_blocks[i];
    require(block >= 0 && block < host.next_unused_, "a free host block is out of range");
    host.free_link_[block] = host.free_top_;
    host.free_top_ = block;
  }
}

inline void State::restore_sequences(Manager &m, const Snapshot &in) {
  require(in.sequences.size() % Snapshot::kSequenceFields == 0, "its sequences are incomplete");
  size_t token = 0;
  size_t entry = 0;
  for (size_t at = 0; at < in.sequences.size(); at += Snapshot::kSequenceFields) {
    const int64_t *f = &in.sequences[at];
    require(f[1] >= 0 && static_cast<size_t>(f[1]) <= in.sequence_tokens.size() - token && f[2] >= 0 &&
                static_cast<size_t>(f[2]) <= in.sequence_tables.size() - entry,
            "its sequences are incomplete");
    require(f[0] >= 0 && m.sequences_.find(f[0]) == nullptr, "a sequence is repeated");
    require(f[7] < m.config_.num_blocks && m.pool_.namespaces_.live(static_cast<int32_t>(f[9])),
            "a sequence is in no namespace");
    auto s = std::make_unique<Sequence>();
    s->id = f[0];
    s->tokens.assign(&in.sequence_tokens[token], &in.sequence_tokens[token] + f[1]);
    s->table.assign(in.sequence_tables.begin() + static_cast<std::ptrdiff_t>(entry),
                    in.sequence_tables.begin() + static_cast<std::ptrdiff_t>(entry) + f[2]);
    token += static_cast<size_t>(f[1]);
    entry += static_cast<size_t>(f[2]);
    s->num_computed = f[3];
    s->num_cached = f[4];
    s->num_published = f[5];
    s->num_released = f[6];
    s->tip = {static_cast<int32_t>(f[7]), static_cast<uint32_t>(f[8])};
    s->space = static_cast<int32_t>(f[9]);
    s->priority = static_cast<int8_t>(f[10]);
    s->swapped = (f[11] & 1) != 0;
    s->started = (f[11] & 2) != 0;
    s->chain_broken = (f[11] & 4) != 0;
    s->queried = (f[11] & 8) != 0;
    for (const int32_t block : s->table) {
      if (block == kNone) continue;
      require(block >= 0 && block < (s->swapped ? m.config_.num_host_blocks : m.config_.num_blocks),
              "a block table points outside the pool");
      int32_t &count = s->swapped ? m.host_.count_[block] : m.pool_.count_[block];
      if (count++ == 0) s->swapped ? ++m.host_.num_held_ : ++m.pool_.num_held_;
    }
    m.pool_.namespaces_.retain(s->space);
    m.sequences_.insert(std::move(s));
  }
}

inline std::unique_ptr<Manager> State::restore(const Snapshot &in) {
  auto m = std::make_unique<Manager>(read_config(in));
  m->next_id_ = in.header[6];
  m->pool_.next_unused_ = static_cast<int32_t>(in.header[7]);
  m->host_.next_unused_ = static_cast<int32_t>(in.header[8]);
  restore_cache(m->pool_, in);
  restore_free_blocks(m->pool_, in);
  restore_host(m->host_, in);
  restore_sequences(*m, in);
  const auto &c = in.counters;
  m->pool_.counters_ = {c[0], c[1], c[2], c[3], c[4]};
  m->counters_ = {c[5], c[6], c[7], c[8], c[9], c[10], c[11], c[12]};
  try {
    check_unlocked(*m);
  } catch (const CorruptState &error) {
    bad(std::string("`snapshot` contradicts itself: ") + error.what());
  }
  return m;
}

}  // namespace pagedattn::blocks
