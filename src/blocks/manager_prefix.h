// The prefix cache as sequences see it: taking what is cached, publishing what has been computed, pins, the window.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include "blocks/hashes_ahead.h"
#include "blocks/manager.h"

namespace pagedattn::blocks {

// Generated text is mostly short beside its prompt: an eighth more than now spares most sequences ever moving their
// tokens, and doubling would hold twice the memory.
inline size_t with_room_to_grow(size_t size) { return size + size / 8 + 64; }

// Room for `size` elements: what follows needs no memory and cannot fail.
inline void make_room(std::vector<int32_t> &values, int64_t size) {
  const auto wanted = static_cast<size_t>(size);
  if (wanted > values.capacity()) values.reserve(with_room_to_grow(wanted));
}

// Calls `visit(block)` for each cached block of the prefix that follows `parent`, at most `limit` of them.
template <typename Visit>
void Manager::walk_prefix(Parent parent, const int32_t *tokens, int64_t limit, Visit visit) const {
  HashesAhead<uint64_t> ahead(pool_, pool_.hash_of(parent).lo, tokens, limit);
  for (int64_t i = 0; i < limit; ++i, tokens += blocks_.size()) {
    const auto [hash, guess] = ahead.next();
    const bool right = guess != kNone && pool_.is_child(guess, parent, tokens);
    const int32_t block = right ? guess : pool_.find(parent, hash, tokens);
    if (block == kNone) return;
    visit(block);
    parent = pool_.node(block);
  }
}

// A cached child of `parent` whose first tokens are the next ones of a prompt that has `num_left` tokens to go. It will
// be copied before it is written to, which pays where at least half of the block is of use.
inline Manager::PartialMatch Manager::match_partly(Parent parent, const int32_t *tokens, int64_t num_left) const {
  const int64_t size = blocks_.size();
  const int64_t most = std::min(size, num_left - 1);  // the last token is always left to compute
  if (2 * most < size) return {};
  int32_t block = kNone;
  if (num_left == size) block = pool_.find(parent, pool_.child_hash(pool_.hash_of(parent).lo, tokens), tokens);
  if (block == kNone) block = pool_.newest_child(parent);
  if (block == kNone) return {};
  const int64_t equal = std::mismatch(tokens, tokens + most, pool_.tokens(block)).first - tokens;
  return 2 * equal < size ? PartialMatch() : PartialMatch{block, equal};
}

// Whether the cache by now has more of a sequence than the part of a block that it has borrowed.
inline bool Manager::can_outdo_borrowed_tail(const Sequence &s) const {
  const int64_t size = blocks_.size();
  const int64_t whole = s.num_published * size;
  const int32_t *tokens = s.tokens.data() + whole;
  const int64_t num_left = s.num_tokens() - whole;
  if (num_left > size && pool_.find(s.tip, pool_.child_hash(pool_.hash_of(s.tip).lo, tokens), tokens) != kNone)
    return true;
  return match_partly(s.tip, tokens, num_left).num_tokens > s.num_computed - whole;
}

inline void Manager::return_borrowed_tail(Sequence &s) {
  if (s.counts_hits) counters_.partial_hit_tokens -= s.num_computed - s.num_published * blocks_.size();
  shrink_table(s, s.num_published);
  s.num_computed = s.num_cached = s.num_published * blocks_.size();
}

inline void Manager::take_cached_blocks(Sequence &s) {
  if (!config_.prefix_caching || s.chain_broken) return;
  const int64_t before = s.num_computed;
  make_room(s.table, blocks_.holding(s.num_tokens()));
  if (s.borrows_tail && can_outdo_borrowed_tail(s)) return_borrowed_tail(s);
  // A truncated sequence may hold part of a block; there is no whole block to add to that.
  if (s.num_computed != s.num_published * blocks_.size()) return;
  if (!s.queried) {
    counters_.prefix_queried_tokens += s.num_tokens();
    s.queried = s.counts_hits = true;
  }
  // The last token is always left to compute: its query gives the logits.
  const int64_t limit = blocks_.full(s.num_tokens() - 1) - s.num_published;
  walk_prefix(s.tip, s.tokens.data() + s.num_computed, limit, [&](int32_t block) {
    pool_.hold(block, s.priority);
    s.table.push_back(block);
    s.tip = pool_.node(block);
  });
  s.num_published = s.num_blocks();
  s.num_computed = s.num_published * blocks_.size();
  const PartialMatch part = match_partly(s.tip, s.tokens.data() + s.num_computed, s.num_tokens() - s.num_computed);
  if (part.block != kNone) {
    pool_.hold(part.block, s.priority);
    s.table.push_back(part.block);
    s.num_computed += part.num_tokens;
    s.borrows_tail = s.shares_tail = true;
    if (s.counts_hits) counters_.partial_hit_tokens += part.num_tokens;
  }
  s.num_cached = s.num_computed;
  if (s.counts_hits) counters_.prefix_hit_tokens += s.num_computed - before;
  release_behind_window(s);
}

// Publishes the blocks that have become full.
constexpr int64_t kPublishAhead = 6;
inline void Manager::publish_full_blocks(Sequence &s) {
  s.chain_broken = !pool_.alive(s.tip);
  if (s.chain_broken) return;
  const int64_t full = blocks_.full(s.num_computed);
  HashesAhead<Hash128> ahead(pool_, pool_.hash_of(s.tip), s.tokens.data() + s.num_published * blocks_.size(),
                             full - s.num_published);
  bool tip_is_new = false;  // then it has no children yet, and nothing has to be looked for
  while (s.num_published < full && !s.chain_broken) {
    if (const int64_t later = s.num_published + kPublishAhead; later < full) {
      pool_.prefetch_for_publishing(std::max(0, s.table[static_cast<size_t>(later)]));
    }
    tip_is_new = publish_block(s, ahead.next_hash(), tip_is_new);
  }
}

// Where the cache holds the same prefix already, the sequence changes over to the cached block and gives its own back.
// Whether the block was new.
inline bool Manager::publish_block(Sequence &s, Hash128 hash, bool tip_is_new) {
  int32_t &entry = s.table[static_cast<size_t>(s.num_published)];
  const int32_t *tokens = s.tokens.data() + s.num_published * blocks_.size();
  const int32_t cached = tip_is_new || entry == kNone ? kNone : pool_.find(s.tip, hash.lo, tokens);
  if (cached == kNone) {
    s.chain_broken = entry == kNone || !pool_.publish(entry, s.tip, hash, tokens, s.priority);
    if (s.chain_broken) return false;
  } else if (cached != entry) {
    pool_.hold(cached, s.priority);
    pool_.release(entry);
    entry = cached;
    ++s.table_version;
    ++counters_.merged_duplicates;
  }
  s.tip = pool_.node(entry);
  ++s.num_published;
  return cached == kNone;
}

// The next query sits at position num_computed and sees the last `window` positions up to its own.
inline int64_t Manager::num_blocks_behind_window(int64_t num_computed) const {
  if (config_.window <= 0 || num_computed < config_.window) return 0;
  return blocks_.full(num_computed - config_.window + 1);
}

inline void Manager::release_behind_window(Sequence &s) {
  const int64_t passed = num_blocks_behind_window(s.num_computed);
  for (; s.num_released < passed; ++s.num_released) {
    int32_t &entry = s.table[static_cast<size_t>(s.num_released)];
    if (entry == kNone) continue;
    pool_.release(entry);
    entry = kNone;
    ++counters_.window_released;
  }
}

// --- calls ---

inline int64_t Manager::take_prefix(int64_t id) {
  const std::lock_guard lock(mutex_);
  Sequence &s = live(id, "take_prefix");
  require_resident(s, "take_prefix");
  if (s.started) {
    throw InvalidArgument(must("take_prefix", "seq") + "not have had a step since it was added or preempted; " +
                          std::to_string(id) + " has computed " + std::to_string(s.num_computed) + " tokens");
  }
  take_cached_blocks(s);
  return s.num_cached;
}

inline int64_t Manager::match(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key) const {
  const std::lock_guard lock(mutex_);
  const int32_t space = pool_.namespaces().find(extra_key);
  if (space == kNone || !config_.prefix_caching) return 0;
  Parent tip = Namespaces::root(space);
  int64_t found = 0;
  walk_prefix(tip, tokens, blocks_.full(num_tokens - 1), [&](int32_t block) {
    found += blocks_.size();
    tip = pool_.node(block);
  });
  return found + match_partly(tip, tokens + found, num_tokens - found).num_tokens;
}

inline int64_t Manager::pin(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key) {
  const std::lock_guard lock(mutex_);
  const int32_t space = pool_.namespaces().find(extra_key);
  auto pin = std::make_unique<Sequence>();
  if (space != kNone && config_.prefix_caching) {
    pin->tip = Namespaces::root(space);
    pin->table.reserve(static_cast<size_t>(num_tokens / blocks_.size()));
    walk_prefix(pin->tip, tokens, num_tokens / blocks_.size(), [&](int32_t block) {
      pin->table.push_back(block);
      pin->tip = pool_.node(block);
    });
  }
  if (pin->table.empty()) throw InvalidArgument(must("pin", "token_ids") + "begin with a cached block; none is cached");
  pin->id = next_id_;
  pin->space = space;
  pin->num_published = pin->num_blocks();
  pin->num_computed = pin->num_cached = pin->num_published * blocks_.size();
  pin->tokens.assign(tokens, tokens + pin->num_computed);
  pins_.make_room(1);
  for (const int32_t block : pin->table) pool_.hold(block, std::numeric_limits<int8_t>::min());
  pool_.namespaces().retain(space);
  pins_.insert(std::move(pin));
  return next_id_++;
}

inline void Manager::unpin(const int64_t *ids, int64_t n) {
  const std::lock_guard lock(mutex_);
  const uint64_t mark = ++batch_mark_;
  for (int64_t i = 0; i < n; ++i) {
    Sequence *pin = pins_.find(ids[i]);
    if (pin == nullptr || pin->batch_mark == mark) {
      throw InvalidArgument(must("unpin", "pins") + "name pins, each once; got " + std::to_string(ids[i]));
    }
    pin->batch_mark = mark;
  }
  for (int64_t i = 0; i < n; ++i) {
    Sequence &pin = *pins_.find(ids[i]);
    shrink_table(pin, 0);
    pool_.namespaces().release(pin.space);
    pins_.take(ids[i]);
  }
}

inline int64_t Manager::num_pinned(int64_t pin) const {
  const std::lock_guard lock(mutex_);
  const Sequence *found = pins_.find(pin);
  if (found == nullptr) {
    throw InvalidArgument(must("num_pinned_tokens", "pin") + "be a pin; got " + std::to_string(pin));
  }
  return found->num_computed;
}

inline std::vector<uint64_t> Manager::block_hashes(const int32_t *tokens, int64_t num_tokens,
                                                   const std::string &extra_key) const {
  Hash128 hash = Namespaces::root_hash(extra_key, pool_.key());
  std::vector<uint64_t> hashes(static_cast<size_t>(2 * (num_tokens / blocks_.size())));
  for (size_t i = 0; i < hashes.size(); i += 2, tokens += blocks_.size()) {
    hash = pool_.child_hash(hash, tokens);
    hashes[i] = hash.lo;
    hashes[i + 1] = hash.hi;
  }
  return hashes;
}

inline void Manager::reset_prefix_cache() {
  const std::lock_guard lock(mutex_);
  if (!config_.prefix_caching) return;
  pool_.withdraw_all();
  sequences_.for_each([](Sequence &s) {
    if (s.num_computed == 0 && !s.started) return;
    s.num_published = 0;
    s.chain_broken = true;
  });
  // There is nothing left for a pin to keep.
  pins_.for_each([&](Sequence &pin) { forget_computed(pin); });
}

}  // namespace pagedattn::blocks
