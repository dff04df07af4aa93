// The proof of a manager's invariants, in time proportional to the blocks and the block-table entries.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "blocks/manager_swap.h"

namespace pagedattn::blocks {

class Check {
 public:
  static void run(const Manager &m) {
    const std::lock_guard lock(m.mutex_);
    run_structure(m);
    const int32_t block = block_with_wrong_hash(m.pool_);
    expect(block == kNone, "a cached block has a hash that does not follow from its tokens and its parent", block);
    const Sequence *s = sequence_with_wrong_prefix(m);
    expect(s == nullptr, "a sequence's published blocks are not those of its tokens", s == nullptr ? kNone : s->id);
  }

  // A cached block whose hash is not that of its parent's hash and its tokens, or kNone. That of a block whose parent
  // has left the cache follows from nothing, but nobody can find such a block either.
  static int32_t block_with_wrong_hash(const BlockPool &pool) {
    for (int32_t block = 0; pool.caching() && block < pool.places_.num_used(); ++block) {
      if (!pool.published(block)) continue;
      const BlockPool::Node &node = pool.nodes_[block];
      if (!pool.alive(node.parent)) continue;
      if (pool.child_hash(pool.hash_of(node.parent), pool.tokens(block)) != node.hash) return block;
    }
    return kNone;
  }

  // A sequence or pin whose published blocks have not the hashes of its tokens, or nullptr. Where the window has
  // released blocks, nothing else tells what came before those that are left, or before the next one.
  static const Sequence *sequence_with_wrong_prefix(const Manager &m) {
    const Sequence *wrong = nullptr;
    const auto visit = [&](const Sequence &s) {
      Hash128 hash = m.pool_.hash_of(Namespaces::root(s.space));
      const int32_t *tokens = s.tokens.data();
      for (int64_t i = 0; i < s.num_published; ++i, tokens += m.config_.block_size) {
        hash = m.pool_.child_hash(hash, tokens);
        const int32_t block = s.table[static_cast<size_t>(i)];
        if (block != kNone && m.pool_.nodes_[block].hash != hash) wrong = &s;
      }
      if (m.pool_.caching() && !s.chain_broken && m.pool_.alive(s.tip) && m.pool_.hash_of(s.tip) != hash) wrong = &s;
    };
    m.sequences_.for_each(visit);
    m.pins_.for_each(visit);
    return wrong;
  }

  // All but the hashes.
  static void run_structure(const Manager &m) {
    std::vector<int32_t> count(static_cast<size_t>(m.config_.num_blocks));
    std::vector<int32_t> host_count(static_cast<size_t>(m.config_.num_host_blocks));
    std::vector<int64_t> users(static_cast<size_t>(m.pool_.namespaces().num_slots()));
    m.sequences_.for_each([&](const Sequence &s) { check_sequence(m, s, s.swapped ? host_count : count, users); });
    m.pins_.for_each([&](const Sequence &pin) {
      expect(!pin.swapped && pin.num_published == pin.num_blocks(), "a pin holds what is not cached", pin.id);
      check_sequence(m, pin, count, users);
    });
    check_places(m.pool_, count);
    check_index(m.pool_, users);
    check_host(m.host_, host_count);
    for (int32_t space = 0; space < m.pool_.namespaces().num_slots(); ++space) {
      expect(m.pool_.namespaces().users(space) == users[static_cast<size_t>(space)],
             "a namespace has the wrong number of users", space);
      expect(!m.pool_.namespaces().live(space) || users[static_cast<size_t>(space)] > 0, "nobody uses a namespace",
             space);
    }
  }

 private:
  [[noreturn]] static void broken(const std::string &what) { throw CorruptState("BlockManager.check: " + what); }
  static void expect(bool holds, const char *what, int64_t which) {
    if (!holds) broken(std::string(what) + " (" + std::to_string(which) + ")");
  }
  static std::string block_text(int64_t block) { return "block " + std::to_string(block); }

  static void check_sequence(const Manager &m, const Sequence &s, std::vector<int32_t> &count,
                             std::vector<int64_t> &users) {
    expect(s.id >= 0 && s.id < m.next_id_, "a sequence has an id that was never handed out", s.id);
    expect(s.num_tokens() >= 1, "a sequence has no tokens", s.id);
    expect(s.num_computed >= 0 && s.num_computed <= s.num_tokens(), "a sequence computed tokens it does not have",
           s.id);
    expect(s.num_cached >= 0 && s.num_cached <= s.num_computed, "a sequence found more cached than it has", s.id);
    expect(s.num_blocks() == m.blocks_.holding(s.num_computed), "a block table does not match the computed tokens",
           s.id);
    expect(s.num_released >= 0 && s.num_released <= m.num_blocks_behind_window(s.num_computed),
           "a window released blocks that lie before it", s.id);
    expect(m.pool_.namespaces().live(s.space), "a sequence is in no live namespace", s.id);
    ++users[static_cast<size_t>(s.space)];
    for (int64_t i = 0; i < s.num_blocks(); ++i) {
      const int32_t block = s.table[static_cast<size_t>(i)];
      expect((block == kNone) == (i < s.num_released), "a released block is not at the head of its table", s.id);
      if (block == kNone) continue;
      expect(block >= 0 && static_cast<size_t>(block) < count.size(), "a block table points outside the pool", s.id);
      ++count[static_cast<size_t>(block)];
    }
    expect(s.num_published >= 0 && s.num_published <= m.blocks_.full(s.num_computed), "a published block is not full",
           s.id);
    expect(!m.pool_.caching() || s.chain_broken || s.num_released <= s.num_published,
           "a window released blocks that are still to be published", s.id);
    if (s.swapped) expect(s.num_published == 0, "a swapped sequence claims device blocks in the cache", s.id);
    check_chain(m, s);
    check_tail(m, s);
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

  // Whoever may not write to its last block knows that it has to look.
  static void check_tail(const Manager &m, const Sequence &s) {
    const int64_t filled = s.num_computed - (s.num_blocks() - 1) * m.config_.block_size;
    if (s.swapped || s.table.empty() || filled == m.config_.block_size) return;
    const int32_t block = s.table.back();
    expect(s.shares_tail || (m.pool_.ref_count(block) == 1 && !m.pool_.published(block)),
           "a sequence would write to a block that others use", s.id);
    if (!s.borrows_tail || !m.pool_.published(block)) return;
    expect(
        std::equal(s.tokens.data() + s.num_computed - filled, s.tokens.data() + s.num_computed, m.pool_.tokens(block)),
        "a sequence borrows a block that begins with other tokens", s.id);
  }

  // Every block is held, free or evictable, and only one of these.
  static void check_places(const BlockPool &pool, const std::vector<int32_t> &count) {
    const BlockPlaces &places = pool.places_;
    std::vector<char> listed(static_cast<size_t>(pool.num_blocks()));
    const auto visit = [&](int32_t block, bool published) {
      if (block < 0 || block >= places.num_used())
        broken("a list holds " + block_text(block) + ", which is not in use");
      if (listed[static_cast<size_t>(block)]++) broken(block_text(block) + " is in the free lists twice");
      expect(!places.held(block), "a held block is in a free list", block);
      expect(pool.published(block) == published, "a free block is in the wrong list", block);
    };
    int64_t free = 0;
    for (int32_t b = places.free_top_; b != kNone; b = places.states_[b] - 1, ++free) visit(b, false);
    expect(free == places.num_stacked_, "the free blocks are miscounted", free);
    int64_t evictable = 0;
    const char *wrong = places.evictable_.for_each([&](int32_t block, int8_t priority, int32_t chunk) {
      visit(block, true);
      expect(places.states_[block] == chunk, "a block waits in another place than it knows of", block);
      expect(places.priority(block) == priority, "a block waits under another priority", block);
      ++evictable;
    });
    expect(wrong == nullptr, wrong == nullptr ? "" : wrong, evictable);
    int64_t held = 0;
    for (int32_t b = 0; b < pool.num_blocks(); ++b) {
      const int32_t expected = count[static_cast<size_t>(b)];
      if (pool.ref_count(b) != expected) {
        broken(block_text(b) + " counts " + std::to_string(pool.ref_count(b)) + " references and " +
               std::to_string(expected) + " block-table entries name it");
      }
      held += expected > 0;
      if (b >= places.num_used()) expect(expected == 0, "a never-used block is held", b);
      if (b < places.num_used() && expected == 0 && !listed[static_cast<size_t>(b)])
        broken(block_text(b) + " has leaked");
    }
    expect(held == pool.num_held(), "the held blocks are miscounted", held);
  }

  static void check_index(const BlockPool &pool, std::vector<int64_t> &users) {
    if (!pool.caching()) return;
    int64_t indexed = 0;
    std::vector<char> seen(static_cast<size_t>(pool.num_blocks()));
    const auto hash_of = [&](int32_t block) {
      if (block < 0 || block >= pool.num_blocks()) broken("the prefix index points outside the pool");
      return pool.nodes_[block].hash.lo;
    };
    const bool counted = pool.index_.for_each(hash_of, [&](int32_t block, bool can_be_found) {
      ++indexed;
      if (seen[static_cast<size_t>(block)]++) broken(block_text(block) + " is in the prefix index twice");
      expect(pool.published(block), "the prefix index holds a withdrawn block", block);
      expect(can_be_found, "a cached block lies where no look-up finds it", block);
      const Parent parent = pool.nodes_[block].parent;
      if (parent.block >= 0) return;
      expect(pool.namespaces().live(~parent.block), "a cached block is in no live namespace", block);
      ++users[static_cast<size_t>(~parent.block)];
    });
    expect(counted, "the prefix index miscounts the entries that its buckets had no place for", indexed);
    expect(indexed == pool.num_published(), "the cached blocks are miscounted", indexed);
    for (int32_t b = 0; b < pool.num_blocks(); ++b) {
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
};

}  // namespace pagedattn::blocks
