// The life of a sequence: it is added, grows and shrinks, is forked and reordered, preempted and freed.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <span>
#include <utility>

#include "blocks/manager_prefix.h"

namespace pagedattn::blocks {

// --- validation ---

inline void Manager::throw_unknown(int64_t id, const char *call) const {
  const std::string what = pins_.find(id) == nullptr ? " was never added or has been freed" : " is a pin";
  throw InvalidArgument(must(call, "seqs") + "name live sequences; " + std::to_string(id) + what);
}

// The sequences of a call in `batch_`, each live and named once.
inline void Manager::gather(const int64_t *ids, int64_t n, const char *call) {
  batch_.clear();
  batch_.reserve(static_cast<size_t>(n));
  const uint64_t mark = ++batch_mark_;
  for (int64_t i = 0; i < n; ++i) {
    Sequence &sequence = live(ids[i], call);
    if (sequence.batch_mark == mark) {
      throw InvalidArgument(must(call, "seqs") + "name each sequence once; " + std::to_string(ids[i]) + " is repeated");
    }
    sequence.batch_mark = mark;
    batch_.push_back(&sequence);
  }
}

inline void Manager::require_resident(const Sequence &sequence, const char *call) const {
  if (sequence.swapped) {
    throw InvalidArgument(must(call, "seqs") + "be on the device; " + std::to_string(sequence.id) + " is swapped out");
  }
}

inline void Manager::throw_cannot_fit(int64_t num_tokens, const char *call, const char *argument) const {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (num_tokens > kMax) {
    throw InvalidArgument(must(call, argument) + "keep a sequence within " + std::to_string(kMax) + " tokens; got " +
                          std::to_string(num_tokens));
  }
  int64_t needed = blocks_.holding(num_tokens);
  if (config_.window > 0 && config_.window <= kMax) {
    needed = std::min(needed, blocks_.holding(config_.window - 1) + 1);
  }
  throw InvalidArgument(must(call, argument) + "fit into the pool: " + std::to_string(num_tokens) + " tokens need " +
                        std::to_string(needed) + " blocks of " + std::to_string(config_.block_size) +
                        " tokens and there are " + std::to_string(config_.num_blocks));
}

// --- tables ---

// Drops the blocks from `keep` on, the last one first: the tail of a prefix is to be evicted before its head.
inline void Manager::shrink_table(Sequence &s, int64_t keep) {
  keep = std::min(keep, s.num_blocks());
  const auto dropped = std::span(s.table).subspan(static_cast<size_t>(keep));
  s.swapped ? host_.release(dropped) : pool_.release(dropped);
  if (!dropped.empty()) s.borrows_tail = false;
  s.table.resize(static_cast<size_t>(keep));
  s.num_released = std::min(s.num_released, keep);
  ++s.table_version;
}

// Back to the state of a sequence that has been added and has found nothing in the cache.
inline void Manager::forget_computed(Sequence &s) {
  shrink_table(s, 0);
  s.num_computed = s.num_cached = s.num_published = 0;
  s.tip = Namespaces::root(s.space);
  s.swapped = s.started = s.chain_broken = s.shares_tail = s.queried = false;
}

inline void Manager::shorten(Sequence &s, int64_t num_tokens) {
  s.tokens.resize(static_cast<size_t>(num_tokens));
  s.num_computed = std::min(s.num_computed, num_tokens);
  s.num_cached = std::min(s.num_cached, s.num_computed);
  shrink_table(s, blocks_.holding(s.num_computed));
  s.shares_tail = true;
  const int64_t full = blocks_.full(s.num_computed);
  if (s.num_published <= full) return;
  s.num_published = full;
  if (full == 0) {
    s.tip = Namespaces::root(s.space);
  } else if (const int32_t above = s.table[static_cast<size_t>(full - 1)]; above != kNone) {
    s.tip = pool_.node(above);
  } else {
    s.chain_broken = true;
  }
}

inline std::unique_ptr<Sequence> Manager::copy_of(const Sequence &s) {
  auto copy = spares_.take(with_room_to_grow(s.tokens.size()), s.table.size() + 1);
  *copy = s;
  copy->shares_tail = true;
  copy->counts_hits = false;
  return copy;
}

// --- calls ---

inline int64_t Manager::add(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key, int8_t priority) {
  const std::lock_guard lock(mutex_);
  require_can_fit(num_tokens, "add", "token_ids");
  auto sequence = spares_.take(with_room_to_grow(static_cast<size_t>(num_tokens)),
                               static_cast<size_t>(blocks_.holding(num_tokens) + 1));
  sequence->tokens.assign(tokens, tokens + num_tokens);
  sequence->priority = priority;
  sequence->id = next_id_;
  sequences_.make_room(1);
  sequence->space = pool_.namespaces().acquire(extra_key, pool_.key());
  sequence->tip = Namespaces::root(sequence->space);
  Sequence &s = sequences_.insert(std::move(sequence));
  ++next_id_;
  take_cached_blocks(s);
  return s.id;
}

inline void Manager::append(const int64_t *ids, int64_t n, const int64_t *starts, const int32_t *tokens) {
  const std::lock_guard lock(mutex_);
  gather(ids, n, "append");
  for (int64_t i = 0; i < n; ++i) {
    Sequence &s = *batch_[static_cast<size_t>(i)];
    const int64_t wanted = s.num_tokens() + starts[i + 1] - starts[i];
    require_can_fit(wanted, "append", "token_ids");
    make_room(s.tokens, wanted);
  }
  for (int64_t i = 0; i < n; ++i) {
    auto &known = batch_[static_cast<size_t>(i)]->tokens;
    known.insert(known.end(), tokens + starts[i], tokens + starts[i + 1]);
  }
}

inline void Manager::truncate(int64_t id, int64_t num_tokens) {
  const std::lock_guard lock(mutex_);
  Sequence &s = live(id, "truncate");
  if (num_tokens < 1 || num_tokens > s.num_tokens()) {
    throw InvalidArgument(must("truncate", "num_tokens") + "lie in 1 ... " + std::to_string(s.num_tokens()) +
                          ", the tokens of sequence " + std::to_string(id) + "; got " + std::to_string(num_tokens));
  }
  if (s.num_released > num_blocks_behind_window(std::min(s.num_computed, num_tokens))) {
    throw InvalidArgument(must("truncate", "num_tokens") + "leave what the window then shows: the first " +
                          std::to_string(s.num_released * config_.block_size) + " tokens of sequence " +
                          std::to_string(id) + " have been released; got " + std::to_string(num_tokens));
  }
  shorten(s, num_tokens);
}

inline std::vector<int64_t> Manager::fork(int64_t id, int64_t n) {
  const std::lock_guard lock(mutex_);
  Sequence &parent = live(id, "fork");
  std::vector<int64_t> ids(static_cast<size_t>(n));
  std::vector<std::unique_ptr<Sequence>> children(static_cast<size_t>(n));
  for (auto &child : children) child = copy_of(parent);
  sequences_.make_room(n);
  parent.shares_tail = true;
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = children[i]->id = next_id_++;
    share_table(*children[i]);
    sequences_.insert(std::move(children[i]));
  }
  return ids;
}

// The beams after a step of beam search: sequence i goes on as a copy of what sequence parents[i] was. All shares of
// the new tables are taken before the old tables are let go, so a beam that lives on is never freed in between.
inline void Manager::reorder(const int64_t *ids, int64_t n, const int64_t *parents) {
  const std::lock_guard lock(mutex_);
  std::vector<std::unique_ptr<Sequence>> copies(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const Sequence *parent = sequences_.find(parents[i]);
    if (parent == nullptr) {
      throw InvalidArgument(must("reorder", "parents") + "name live sequences; got " + std::to_string(parents[i]));
    }
    if (parents[i] != ids[i]) copies[static_cast<size_t>(i)] = copy_of(*parent);
  }
  gather(ids, n, "reorder");
  for (int64_t i = 0; i < n; ++i) {
    if (copies[static_cast<size_t>(i)] == nullptr) continue;
    share_table(*copies[static_cast<size_t>(i)]);
    sequences_.find(parents[i])->shares_tail = true;
  }
  for (size_t i = 0; i < batch_.size(); ++i) {
    if (copies[i] == nullptr) continue;
    Sequence &s = *batch_[i];
    shrink_table(s, 0);
    pool_.namespaces().release(s.space);
    Sequence &copy = *copies[i];
    copy.id = s.id;
    copy.batch_mark = s.batch_mark;
    copy.table_version = s.table_version;
    s = std::move(copy);
  }
}

inline void Manager::free(const int64_t *ids, int64_t n) {
  const std::lock_guard lock(mutex_);
  gather(ids, n, "free");
  for (Sequence *s : batch_) {
    shrink_table(*s, 0);
    pool_.namespaces().release(s->space);
    spares_.put(sequences_.take(s->id));
  }
}

inline void Manager::preempt(const int64_t *ids, int64_t n) {
  const std::lock_guard lock(mutex_);
  gather(ids, n, "preempt");
  for (Sequence *s : batch_) {
    forget_computed(*s);
    ++counters_.preemptions;
  }
}

}  // namespace pagedattn::blocks
