// The extra keys in use, each with a small number: the roots of the prefix cache's trees.
//
// A namespace lives while a sequence or a published block needs it. Keys are compared byte by byte.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "blocks/block_hash.h"
#include "blocks/prefix_index.h"

namespace pagedattn::blocks {

// Whose child a block is: a node of the tree (block >= 0, with its generation), or a namespace (block < 0).
struct Parent {
  int32_t block = 0;
  uint32_t generation = 0;
  bool operator==(const Parent &) const = default;
};

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
      space = free_slots_.empty() ? num_slots() : free_slots_.back();
      insert(space, key, hash_key);
      if (!free_slots_.empty()) free_slots_.pop_back();
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

  // All memory is found before anything changes, and that for giving the slot back too.
  void insert(int32_t space, const std::string &key, const HashKey &hash_key) {
    Entry entry{key, root_hash(key, hash_key), 0, 0, true};
    const size_t num_entries = std::max(entries_.size(), static_cast<size_t>(space) + 1);
    if (num_entries > free_slots_.capacity()) free_slots_.reserve(2 * num_entries);
    if (num_entries > entries_.capacity()) entries_.reserve(2 * num_entries);
    by_key_.emplace(key, space);
    entries_.resize(num_entries);
    at(space) = std::move(entry);
  }

  static Hash128 root_hash(const std::string &key, const HashKey &hash_key) {
    return hash_bytes(hash_key, Hash128(), key.data(), key.size());
  }

  int32_t num_slots() const { return static_cast<int32_t>(entries_.size()); }
  bool live(int32_t space) const { return space >= 0 && space < num_slots() && at(space).live; }
  int64_t users(int32_t space) const { return at(space).users; }
  const std::string &key(int32_t space) const { return at(space).key; }
  Hash128 root_hash(int32_t space) const { return at(space).root_hash; }
  int32_t &newest_child(int32_t space) { return at(space).newest_child; }
  int32_t newest_child(int32_t space) const { return at(space).newest_child; }

 private:
  struct Entry {
    std::string key;
    Hash128 root_hash;
    int64_t users = 0;
    int32_t newest_child = 0;  // plus one; 0: none
    bool live = false;
  };

  Entry &at(int32_t space) { return entries_[static_cast<size_t>(space)]; }
  const Entry &at(int32_t space) const { return entries_[static_cast<size_t>(space)]; }

  std::vector<Entry> entries_;
  std::vector<int32_t> free_slots_;
  std::unordered_map<std::string, int32_t> by_key_;
};

}  // namespace pagedattn::blocks
