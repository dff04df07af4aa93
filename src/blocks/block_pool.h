// The pool of device blocks: who holds them, and what the prefix cache knows of them.
//
// A published block is a node of a tree. Its identity is (parent node, tokens), compared exactly on every look-up; a
// node is named by block and generation, and the generation changes whenever a block is published or withdrawn, so a
// child whose parent has been evicted can never be reached through another block that took the parent's place. The
// tree's roots are namespaces: one for each distinct extra key.
//
// A node also remembers its newest child: where a prompt goes on in the middle of a block, that is the one whose first
// tokens it may share.
//
// Book-keeping is under 48 bytes a block: node 32, place 4, priority 1, eviction list 5.05, index 5.93. The tokens come
// on top.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "blocks/block_places.h"
#include "blocks/event_ring.h"
#include "blocks/namespaces.h"

namespace pagedattn::blocks {

struct PoolCounters {
  int64_t allocated = 0;
  int64_t freed = 0;
  int64_t evicted = 0;
  int64_t published = 0;
  int64_t peak_held = 0;
};

class BlockPool {
 public:
  BlockPool(int32_t num_blocks, int32_t block_size, bool prefix_caching, int64_t num_events, const HashKey &key)
      : block_size_(block_size),
        caching_(prefix_caching),
        key_(key),
        places_(num_blocks),
        nodes_(prefix_caching ? num_blocks : 0),
        index_(prefix_caching ? num_blocks : 0),
        tokens_(prefix_caching ? checked_product(num_blocks, block_size) : 0),
        events_(num_events, block_size) {}

  // --- counts ---
  int32_t num_blocks() const { return places_.num_blocks(); }
  int32_t block_size() const { return block_size_; }
  bool caching() const { return caching_; }
  int64_t num_free() const { return num_blocks() - places_.num_held(); }  // free and evictable
  int64_t num_held() const { return places_.num_held(); }
  int64_t num_published() const { return num_published_; }
  int32_t ref_count(int32_t block) const { return places_.ref_count(block); }
  bool published(int32_t block) const { return caching_ && is_odd(nodes_[block].generation); }
  Parent node(int32_t block) const { return {block, nodes_[block].generation}; }
  const int32_t *tokens(int32_t block) const { return &tokens_[int64_t{block} * block_size_]; }
  const HashKey &key() const { return key_; }
  const PoolCounters &counters() const { return counters_; }
  Namespaces &namespaces() { return namespaces_; }
  const Namespaces &namespaces() const { return namespaces_; }
  EventRing &events() { return events_; }
  const EventRing &events() const { return events_; }

  // --- holding ---
  // Blocks of its own for a sequence, appended to its table: free ones first, then the least recently used cached ones.
  // The caller has made sure that num_free() >= n and that the table has room.
  void allocate(int64_t n, std::vector<int32_t> &table) {
    const size_t size = table.size();
    table.resize(size + static_cast<size_t>(n));
    allocate(n, table.data() + size);
  }

  int32_t allocate() {
    int32_t block;
    allocate(1, &block);
    return block;
  }

  // One more sequence refers to a held or evictable block.
  void hold(int32_t block, int8_t priority) {
    if (places_.held(block)) {
      places_.add_reference(block);
    } else {
      places_.take(block);
      count_peak();
    }
    if (priority > places_.priority(block)) places_.set_priority(block, priority);
  }

  void release(int32_t block) {
    if (!places_.drop_reference(block)) return;
    ++counters_.freed;
    published(block) ? places_.put_evictable(block) : places_.put_free(block);
  }

  // The blocks of a table, kNone among them, the last one first.
  void release(std::span<const int32_t> blocks) {
    constexpr size_t kAhead = 12;
    for (size_t i = blocks.size(); i-- > 0;) {
      if (i >= kAhead) prefetch_for_release(std::max(0, blocks[i - kAhead]));
      if (blocks[i] != kNone) release(blocks[i]);
    }
  }

  // A fork refers to what its parent refers to already.
  void share(int32_t block) { places_.add_reference(block); }
  void share(std::span<const int32_t> blocks) {
    for (const int32_t block : blocks) {
      if (block != kNone) share(block);
    }
  }
  // A sequence that is about to copy a shared block lets go of it; share() takes that back.
  void unshare(int32_t block) { places_.drop_reference(block); }

  // --- the prefix cache ---
  bool alive(Parent parent) const {
    return parent.block < 0 ? namespaces_.live(~parent.block) : nodes_[parent.block].generation == parent.generation;
  }

  Hash128 hash_of(Parent parent) const {
    return parent.block < 0 ? namespaces_.root_hash(~parent.block) : nodes_[parent.block].hash;
  }

  // The hash of a block that follows one: its name, or the lane of it that a look-up needs.
  Hash128 child_hash(Hash128 parent, const int32_t *tokens) const {
    const Hash128 hash = hash_bytes(key_, parent, tokens, block_bytes());
    return {hash.lo & hash_mask_, hash.hi & hash_mask_};
  }
  uint64_t child_hash(uint64_t parent_lo, const int32_t *tokens) const {
    return hash_lane<Lane::kLow>(key_, parent_lo, tokens, block_bytes()) & hash_mask_;
  }

  // The published child of `parent` that holds exactly these tokens, or kNone.
  int32_t find(Parent parent, uint64_t hash, const int32_t *tokens) const {
    return index_.find(hash, [&](int32_t block) { return is_child(block, parent, tokens); });
  }
  // Of a block of the index. The hash is not asked: it follows from the two.
  bool is_child(int32_t block, Parent parent, const int32_t *tokens) const {
    return nodes_[block].parent == parent && same_tokens(block, tokens);
  }

  // Look-ups wait for memory: these ask for what find() will read, first the entry, then what the entry leads to.
  void prefetch_entry(uint64_t hash) const { index_.prefetch(hash); }
  void prefetch_entry(Hash128 hash) const { index_.prefetch(hash.lo); }
  int32_t prefetch_guess(uint64_t hash) const {
    const int32_t block = index_.guess(hash);
    if (block != kNone) {
      nodes_.prefetch(block);
      places_.prefetch(block);
      tokens_.prefetch(int64_t{block} * block_size_);
    }
    return block;
  }

  // The child of `parent` that was published last, if it is still there.
  int32_t newest_child(Parent parent) const {
    const int32_t child =
        (parent.block < 0 ? namespaces_.newest_child(~parent.block) : nodes_[parent.block].newest_child) - 1;
    return child != kNone && published(child) && nodes_[child].parent == parent ? child : kNone;
  }

  void prefetch_for_publishing(int32_t block) const {
    nodes_.prefetch_for_writing(block);
    tokens_.prefetch_for_writing(int64_t{block} * block_size_);
  }

  // False where the block's generations are used up: then it stays out of the cache for ever.
  bool publish(int32_t block, Parent parent, Hash128 hash, const int32_t *tokens, int8_t priority) {
    Node &node = nodes_[block];
    if (node.generation >= kLastGeneration) return false;
    copy_tokens(&tokens_[int64_t{block} * block_size_], tokens);
    node = {hash, parent, node.generation + 1, 0};
    places_.set_priority(block, priority);
    index_.insert(block, hash.lo);
    if (parent.block < 0) {
      namespaces_.newest_child(~parent.block) = block + 1;
      namespaces_.retain(~parent.block);
    } else {
      nodes_[parent.block].newest_child = block + 1;
    }
    ++num_published_;
    ++counters_.published;
    if (events_.enabled()) report(EventKind::kStored, block);
    return true;
  }

  // Takes a block out of the cache; who holds it keeps it. Its children become unreachable and age out.
  void withdraw(int32_t block, EventKind reason = EventKind::kRemoved) {
    if (events_.enabled()) report(reason, block);
    Node &node = nodes_[block];
    index_.erase(block, node.hash.lo);
    ++node.generation;
    if (node.parent.block < 0) namespaces_.release(~node.parent.block);
    --num_published_;
  }

  void withdraw_all() {
    for (int32_t block = 0; block < places_.num_used(); ++block) {
      if (!published(block)) continue;
      withdraw(block);
      if (places_.held(block)) continue;
      places_.unlink(block);
      places_.put_free(block);
    }
  }

  // For tests: keeps only the low bits of each lane, so that collisions can be had.
  void weaken_hash(int bits) { hash_mask_ = bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

 private:
  void prefetch_for_release(int32_t block) const {
    places_.prefetch(block);
    if (caching_) nodes_.prefetch(block);
  }

  friend class Check;
  friend class SnapshotWriter;
  friend class SnapshotReader;

  struct Node {
    Hash128 hash;
    Parent parent;
    uint32_t generation = 0;   // odd while published
    int32_t newest_child = 0;  // plus one; 0: none
  };
  static_assert(sizeof(Node) == 32);
  static constexpr uint32_t kLastGeneration = std::numeric_limits<uint32_t>::max() - 1;
  static constexpr int32_t kUsualSize = 16;  // of a block: a constant number of tokens needs no call

  size_t block_bytes() const { return static_cast<size_t>(block_size_) * sizeof(int32_t); }
  static bool is_odd(uint32_t x) { return (x & 1) != 0; }

  void allocate(int64_t n, int32_t *out) {
    counters_.allocated += n;
    const int64_t taken = places_.take_free(n, out);
    if (taken < n) evict(n - taken, out + taken);
    count_peak();
  }

  // What it has to read is asked for some blocks ahead: their nodes, and then the entries that these lead to.
  void evict(int64_t n, int32_t *out) {
    constexpr int64_t kNodes = 16;
    constexpr int64_t kEntries = 8;
    counters_.evicted += n;
    places_.take_oldest(n, out);
    const auto prefetch_entry_of = [&](int32_t block) { index_.prefetch(nodes_[block].hash.lo); };
    for (int64_t i = 0; i < std::min(n, kNodes); ++i) nodes_.prefetch(out[i]);
    for (int64_t i = 0; i < std::min(n, kEntries); ++i) prefetch_entry_of(out[i]);
    for (int64_t i = 0; i < n; ++i) {
      if (i + kNodes < n) nodes_.prefetch(out[i + kNodes]);
      if (i + kEntries < n) prefetch_entry_of(out[i + kEntries]);
      withdraw(out[i], EventKind::kEvicted);
    }
    // Sequences that decode evict a block each: what the next ones need is asked for now.
    int ahead = 0;
    places_.evictable().peek([&](int32_t block) { ++ahead < 3 ? prefetch_entry_of(block) : nodes_.prefetch(block); });
  }

  void count_peak() { counters_.peak_held = std::max(counters_.peak_held, num_held()); }

  void report(EventKind kind, int32_t block) {
    const Node &node = nodes_[block];
    // Of a block whose parent has left the cache only its own name is known.
    const Hash128 parent = alive(node.parent) ? hash_of(node.parent) : Hash128();
    events_.push({node.hash, parent, kind, block}, tokens(block));
  }

  void copy_tokens(int32_t *to, const int32_t *from) const {
    block_size_ == kUsualSize ? std::memcpy(to, from, kUsualSize * sizeof(int32_t))
                              : std::memcpy(to, from, block_bytes());
  }

  bool same_tokens(int32_t block, const int32_t *tokens) const {
    const int32_t *own = this->tokens(block);
    if (block_size_ != kUsualSize) return std::memcmp(own, tokens, block_bytes()) == 0;
    uint64_t difference = 0;
    for (int i = 0; i < kUsualSize; i += 2) {
      uint64_t pairs[2];
      std::memcpy(&pairs[0], own + i, sizeof(uint64_t));
      std::memcpy(&pairs[1], tokens + i, sizeof(uint64_t));
      difference |= pairs[0] ^ pairs[1];
    }
    return difference == 0;
  }

  int32_t block_size_;
  bool caching_;
  HashKey key_;
  uint64_t hash_mask_ = ~uint64_t{0};
  BlockPlaces places_;
  LazyArray<Node> nodes_;
  PrefixIndex index_;
  LazyArray<int32_t> tokens_;  // [num_blocks, block_size], meaningful where published
  Namespaces namespaces_;
  EventRing events_;
  PoolCounters counters_;
  int64_t num_published_ = 0;
};

}  // namespace pagedattn::blocks
