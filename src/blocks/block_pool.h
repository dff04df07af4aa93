// The pool of device blocks: reference counts, free blocks, the prefix-cache index and the eviction order.
//
// A block is in exactly one of three places. *Held*: one sequence or more refer to it. *Free*: nobody does and its
// contents are worthless; never-used blocks come from a bump counter, given-back ones from a stack, so making a pool
// touches no memory. *Evictable*: nobody refers to it but it is published in the prefix cache; it waits in the least
// recently used list of its priority.
//
// A published block is a node of a tree. Its identity is (parent node, tokens), compared exactly on every look-up; a
// node is named by block and generation, and the generation changes whenever a block is published or withdrawn, so a
// child whose parent has been evicted can never be reached through another block that took the parent's place. The
// tree's roots are namespaces: one for each distinct extra key, compared byte by byte.
//
// Book-keeping is 48 bytes a block: node 32, count 4, list links 8, priority 1 and 3 for the index's buckets.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "blocks/block_hash.h"

namespace pagedattn::blocks {

constexpr int32_t kNone = -1;

// Zeroed memory that the system provides page by page on first touch: a pool may be declared large and cost little.
template <typename T>
class LazyArray {
 public:
  explicit LazyArray(int64_t size) {
    const auto count = static_cast<size_t>(size);
    if (count > std::numeric_limits<size_t>::max() / 2 / sizeof(T)) throw std::bad_alloc();
    data_.reset(static_cast<T *>(std::calloc(count > 0 ? count : 1, sizeof(T))));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  T &operator[](int64_t i) { return data_.get()[i]; }
  const T &operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T *p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// Whose child a block is: a node of the tree (block >= 0, with its generation), or a namespace (block < 0).
struct Parent {
  int32_t block = 0;
  uint32_t generation = 0;
  bool operator==(const Parent &) const = default;
};

// The extra keys in use, each with a small number. A namespace lives while a sequence or a published block needs it.
class Namespaces {
 public:
  static Parent root(int32_t space) { return {~space, 0}; }

  int32_t find(const std::string &key) const {
    const auto it = by_key_.find(key);
    return it == by_key_.end() ? kNone : it->second;
  }

  int32_t acquire(const std::string &key, const HashKey &hash_key) {
    int32_t space = find(key);
    if (space == kNone) {
      space = free_slot();
      insert(space, key, hash_key);
    }
    retain(space);
    return space;
  }

  void retain(int32_t space) { ++at(space).users; }

  void release(int32_t space) {
    Entry &entry = at(space);
    if (--entry.users > 0) return;
    by_key_.erase(entry.key);
    entry = Entry();
    free_slots_.push_back(space);
  }

  // Restoring a snapshot keeps the numbers that published blocks refer to.
  void insert(int32_t space, const std::string &key, const HashKey &hash_key) {
    if (static_cast<size_t>(space) >= entries_.size()) entries_.resize(static_cast<size_t>(space) + 1);
    at(space) = {key, hash_bytes(hash_key, Hash128(), key.data(), key.size()), 0, true};
    by_key_[key] = space;
  }
  void rebuild_free_slots() {
    free_slots_.clear();
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (!entries_[i].live) free_slots_.push_back(static_cast<int32_t>(i));
    }
  }

  int32_t num_slots() const { return static_cast<int32_t>(entries_.size()); }
  bool live(int32_t space) const { return space >= 0 && space < num_slots() && at(space).live; }
  int64_t users(int32_t space) const { return at(space).users; }
  const std::string &key(int32_t space) const { return at(space).key; }
  Hash128 root_hash(int32_t space) const { return at(space).root_hash; }

 private:
  struct Entry {
    std::string key;
    Hash128 root_hash;
    int64_t users = 0;
    bool live = false;
  };

  Entry &at(int32_t space) { return entries_[static_cast<size_t>(space)]; }
  const Entry &at(int32_t space) const { return entries_[static_cast<size_t>(space)]; }

  int32_t free_slot() {
    if (free_slots_.empty()) return num_slots();
    const int32_t space = free_slots_.back();
    free_slots_.pop_back();
    return space;
  }

  std::vector<Entry> entries_;
  std::vector<int32_t> free_slots_;
  std::unordered_map<std::string, int32_t> by_key_;
};

// Doubly linked lists of evictable blocks, one a priority, over links that the pool stores.
class EvictionOrder {
 public:
  static constexpr int kNumPriorities = 256;  // int8

  explicit EvictionOrder(int64_t num_blocks) : previous_(num_blocks), next_(num_blocks) {}

  int64_t size() const { return size_; }

  void push_back(int32_t block, int8_t priority) {
    List &list = lists_[index(priority)];
    previous_[block] = list.tail;
    next_[block] = kNone;
    (list.tail == kNone ? list.head : next_[list.tail]) = block;
    list.tail = block;
    mark(priority, true);
    ++size_;
  }

  void remove(int32_t block, int8_t priority) {
    List &list = lists_[index(priority)];
    (previous_[block] == kNone ? list.head : next_[previous_[block]]) = next_[block];
    (next_[block] == kNone ? list.tail : previous_[next_[block]]) = previous_[block];
    if (list.head == kNone) mark(priority, false);
    --size_;
  }

  // The block to evict next: the least recently used one of the lowest priority.
  int32_t front() const {
    for (int word = 0; word < 4; ++word) {
      if (occupied_[word] != 0) return lists_[word * 64 + std::countr_zero(occupied_[word])].head;
    }
    return kNone;
  }

  int32_t head(int priority_index) const { return lists_[priority_index].head; }
  int32_t tail(int priority_index) const { return lists_[priority_index].tail; }
  int32_t next(int32_t block) const { return next_[block]; }
  int32_t previous(int32_t block) const { return previous_[block]; }
  static int index(int8_t priority) { return priority + 128; }

  // The stack of free blocks borrows `next`: a free block is in no eviction list.
  int32_t &free_link(int32_t block) { return next_[block]; }
  int32_t free_link(int32_t block) const { return next_[block]; }

 private:
  struct List {
    int32_t head = kNone;
    int32_t tail = kNone;
  };

  void mark(int8_t priority, bool occupied) {
    const int i = index(priority);
    const uint64_t bit = uint64_t{1} << (i % 64);
    occupied_[i / 64] = occupied ? occupied_[i / 64] | bit : occupied_[i / 64] & ~bit;
  }

  LazyArray<int32_t> previous_;
  LazyArray<int32_t> next_;
  List lists_[kNumPriorities];
  uint64_t occupied_[4] = {};
  int64_t size_ = 0;
};

struct PoolCounters {
  int64_t allocated = 0;
  int64_t freed = 0;
  int64_t evicted = 0;
  int64_t published = 0;
  int64_t peak_held = 0;
};

class BlockPool {
 public:
  BlockPool(int32_t num_blocks, int32_t block_size, bool prefix_caching, const HashKey &key)
      : num_blocks_(num_blocks),
        block_size_(block_size),
        num_buckets_(prefix_caching ? num_blocks * int64_t{3} / 4 + 1 : 1),
        key_(key),
        count_(num_blocks),
        priority_(num_blocks),
        order_(num_blocks),
        nodes_(prefix_caching ? num_blocks : 0),
        buckets_(num_buckets_),
        tokens_(prefix_caching ? checked_product(num_blocks, block_size) : 0),
        caching_(prefix_caching) {}

  // --- counts ---
  int32_t num_blocks() const { return num_blocks_; }
  int32_t block_size() const { return block_size_; }
  bool caching() const { return caching_; }
  int64_t num_free() const { return num_blocks_ - num_held_; }  // free and evictable
  int64_t num_held() const { return num_held_; }
  int64_t num_published() const { return num_published_; }
  int32_t ref_count(int32_t block) const { return count_[block]; }
  bool published(int32_t block) const { return caching_ && is_odd(nodes_[block].generation); }
  int8_t priority(int32_t block) const { return priority_[block]; }
  Parent node(int32_t block) const { return {block, nodes_[block].generation}; }
  const int32_t *tokens(int32_t block) const { return &tokens_[int64_t{block} * block_size_]; }
  const HashKey &key() const { return key_; }
  const PoolCounters &counters() const { return counters_; }
  Namespaces &namespaces() { return namespaces_; }
  const Namespaces &namespaces() const { return namespaces_; }

  // --- holding ---
  // A block of its own for a sequence. The caller has made sure that num_free() > 0.
  int32_t allocate() {
    int32_t block;
    if (free_top_ != kNone) {
      block = free_top_;
      free_top_ = order_.free_link(block);
      --num_stacked_;
    } else if (next_unused_ < num_blocks_) {
      block = next_unused_++;
    } else {
      block = order_.front();
      order_.remove(block, priority_[block]);
      withdraw(block);
      ++counters_.evicted;
    }
    count_[block] = 1;
    ++counters_.allocated;
    count_held();
    return block;
  }

  // One more sequence refers to a held or evictable block.
  void hold(int32_t block, int8_t priority) {
    if (count_[block]++ == 0) {
      order_.remove(block, priority_[block]);
      count_held();
    }
    if (priority > priority_[block]) priority_[block] = priority;
  }

  void release(int32_t block) {
    if (--count_[block] > 0) return;
    --num_held_;
    ++counters_.freed;
    published(block) ? order_.push_back(block, priority_[block]) : stack(block);
  }

  // A sequence that is about to copy a shared block lets go of it; share() takes that back.
  void unshare(int32_t block) { --count_[block]; }
  void share(int32_t block) { ++count_[block]; }

  // --- the prefix cache ---
  bool alive(Parent parent) const {
    return parent.block < 0 ? namespaces_.live(~parent.block) : nodes_[parent.block].generation == parent.generation;
  }

  Hash128 child_hash(Parent parent, const int32_t *tokens) const {
    const Hash128 above = parent.block < 0 ? namespaces_.root_hash(~parent.block) : nodes_[parent.block].hash;
    const Hash128 hash = hash_tokens(key_, above, tokens, block_size_);
    return {hash.lo & hash_mask_, hash.hi & hash_mask_};
  }

  // The published child of `parent` that holds exactly these tokens, or kNone.
  int32_t find(Parent parent, Hash128 hash, const int32_t *tokens) const {
    for (int32_t i = buckets_[bucket(hash)] - 1; i != kNone; i = nodes_[i].chain - 1) {
      const Node &node = nodes_[i];
      if (node.hash == hash && node.parent == parent && same_tokens(i, tokens)) return i;
    }
    return kNone;
  }

  // False where the block's generations are used up: then it stays out of the cache for ever.
  bool publish(int32_t block, Parent parent, Hash128 hash, const int32_t *tokens, int8_t priority) {
    Node &node = nodes_[block];
    if (node.generation >= kLastGeneration) return false;
    std::memcpy(&tokens_[int64_t{block} * block_size_], tokens, static_cast<size_t>(block_size_) * sizeof(int32_t));
    ++node.generation;
    node.parent = parent;
    node.hash = hash;
    priority_[block] = priority;
    insert_in_bucket(block);
    if (parent.block < 0) namespaces_.retain(~parent.block);
    ++num_published_;
    ++counters_.published;
    return true;
  }

  // Takes a block out of the cache; who holds it keeps it. Its children become unreachable and age out.
  void withdraw(int32_t block) {
    Node &node = nodes_[block];
    remove_from_bucket(block);
    ++node.generation;
    if (node.parent.block < 0) namespaces_.release(~node.parent.block);
    --num_published_;
  }

  void withdraw_all() {
    for (int32_t block = 0; block < next_unused_; ++block) {
      if (!published(block)) continue;
      withdraw(block);
      if (count_[block] > 0) continue;
      order_.remove(block, priority_[block]);
      stack(block);
    }
  }

  // For tests: keeps only the low bits of each lane, so that collisions can be had.
  void weaken_hash(int bits) { hash_mask_ = bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

 private:
  friend class State;  // check() and snapshots

  struct Node {
    Hash128 hash;
    Parent parent;
    uint32_t generation = 0;  // odd while published
    int32_t chain = 0;        // the next block of the bucket, plus one; 0 ends the chain
  };
  static constexpr uint32_t kLastGeneration = std::numeric_limits<uint32_t>::max() - 1;

  static bool is_odd(uint32_t x) { return (x & 1) != 0; }

  static int64_t checked_product(int64_t a, int64_t b) {
    if (a > std::numeric_limits<int64_t>::max() / b) throw std::bad_alloc();
    return a * b;
  }

  void count_held() {
    if (++num_held_ > counters_.peak_held) counters_.peak_held = num_held_;
  }

  void stack(int32_t block) {
    order_.free_link(block) = free_top_;
    free_top_ = block;
    ++num_stacked_;
  }

  int64_t bucket(Hash128 hash) const {
    // The high half of hash x buckets spreads any number of buckets evenly, without a division.
    __extension__ using uint128 = unsigned __int128;
    return static_cast<int64_t>((static_cast<uint128>(hash.lo) * static_cast<uint64_t>(num_buckets_)) >> 64);
  }

  bool same_tokens(int32_t block, const int32_t *tokens) const {
    return std::memcmp(this->tokens(block), tokens, static_cast<size_t>(block_size_) * sizeof(int32_t)) == 0;
  }

  void insert_in_bucket(int32_t block) {
    int32_t &head = buckets_[bucket(nodes_[block].hash)];
    nodes_[block].chain = head;
    head = block + 1;
  }

  void remove_from_bucket(int32_t block) {
    int32_t *link = &buckets_[bucket(nodes_[block].hash)];
    while (*link != block + 1) link = &nodes_[*link - 1].chain;
    *link = nodes_[block].chain;
  }

  int32_t num_blocks_;
  int32_t block_size_;
  int64_t num_buckets_;
  HashKey key_;
  uint64_t hash_mask_ = ~uint64_t{0};
  LazyArray<int32_t> count_;
  LazyArray<int8_t> priority_;
  EvictionOrder order_;
  LazyArray<Node> nodes_;
  LazyArray<int32_t> buckets_;  // the first block of each bucket, plus one
  LazyArray<int32_t> tokens_;   // [num_blocks, block_size], meaningful where published
  Namespaces namespaces_;
  PoolCounters counters_;
  int64_t num_held_ = 0;
  int64_t num_published_ = 0;
  int64_t num_stacked_ = 0;
  int32_t next_unused_ = 0;
  int32_t free_top_ = kNone;
  bool caching_;
};

}  // namespace pagedattn::blocks
