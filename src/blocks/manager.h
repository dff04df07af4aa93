// The block manager: sequences, their block tables and the rules by which blocks move between them.
//
// Invariant: the table of a sequence has ceil(num_computed / block_size) entries, so only its last block can be written
// again; that block is copied first if another sequence refers to it. The first `num_published` blocks are in the
// prefix cache and form a chain of parents from the sequence's namespace.
//
// A call first validates everything it was given and only then changes anything, so a call that throws has changed
// nothing. Calls are serialised by a mutex: they run without Python's lock.
//
// Step and swap are defined in manager_step.h and manager_swap.h, check and snapshot in manager_state.h.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>

#include "blocks/sequence.h"

namespace pagedattn::blocks {

struct InvalidArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct NotEnoughBlocks : std::runtime_error {
  NotEnoughBlocks(const std::string &message, int64_t needed_blocks, int64_t free_blocks)
      : std::runtime_error(message), needed(needed_blocks), free(free_blocks) {}
  int64_t needed;
  int64_t free;
};

// A broken invariant: a bug of the block manager, or memory overwritten by something else.
struct CorruptState : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Config {
  int32_t num_blocks = 0;
  int32_t block_size = 0;
  int32_t num_host_blocks = 0;
  bool prefix_caching = true;
  double watermark = 0.0;
  int64_t window = 0;  // 0: none
  HashKey key;
};

// Where a step writes: arrays of the caller, with their capacities, and what the last step left in them.
struct StepArrays {
  int32_t *block_tables = nullptr;     // [max_seqs, max_blocks]
  int32_t *seq_lens = nullptr;         // [max_seqs]
  int32_t *query_start_loc = nullptr;  // [max_seqs + 1]
  int64_t *slot_mapping = nullptr;     // [max_tokens]
  int64_t *positions = nullptr;        // [max_tokens]
  int64_t *copies = nullptr;           // [max_copies, 2]
  int64_t max_seqs = 0;
  int64_t max_blocks = 0;
  int64_t max_tokens = 0;
  int64_t max_copies = 0;

  int64_t num_seqs = 0;
  int64_t num_tokens = 0;
  int64_t num_copies = 0;

  // Whose table a row holds and how much of it, so that a step writes only what has changed.
  struct Row {
    int64_t sequence = kNone;
    uint32_t version = 0;
    int64_t num_blocks = 0;
  };
  std::vector<Row> rows;
  uint64_t manager = 0;
};

struct Counters {
  int64_t prefix_queried_tokens = 0;
  int64_t prefix_hit_tokens = 0;
  int64_t cow_copies = 0;
  int64_t merged_duplicates = 0;
  int64_t window_released = 0;
  int64_t preemptions = 0;
  int64_t swapped_out_blocks = 0;
  int64_t swapped_in_blocks = 0;
};

class Manager {
  // For the readers below: runs `read` under the lock, on the manager or on one of its sequences.
  template <typename Read>
  auto locked(Read read) const {
    const std::lock_guard lock(mutex_);
    return read(*this);
  }

  template <typename Read>
  auto with(int64_t id, const char *call, Read read) const {
    const std::lock_guard lock(mutex_);
    return read(live(id, call));
  }

 public:
  explicit Manager(const Config &config)
      : config_(config),
        watermark_blocks_(static_cast<int64_t>(config.watermark * config.num_blocks)),
        serial_(next_serial()),
        pool_(config.num_blocks, config.block_size, config.prefix_caching, config.key),
        host_(config.num_host_blocks) {}

  // --- the life of a sequence ---
  int64_t add(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key, int8_t priority);
  int64_t take_prefix(int64_t id);
  int64_t match(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key) const;
  void append(const int64_t *ids, int64_t n, const int64_t *starts, const int32_t *tokens);
  void truncate(int64_t id, int64_t num_tokens);
  std::vector<int64_t> fork(int64_t id, int64_t n);
  void free(const int64_t *ids, int64_t n);
  void preempt(const int64_t *ids, int64_t n);
  void reset_prefix_cache();

  // --- blocks for a batch ---
  int64_t max_table_blocks(const int64_t *ids, const int64_t *counts, int64_t n);
  void step(const int64_t *ids, const int64_t *counts, int64_t n, StepArrays &out);
  std::vector<int64_t> swap_out(const int64_t *ids, int64_t n);
  std::vector<int64_t> swap_in(const int64_t *ids, int64_t n);

  // --- looking ---
  int64_t num_tokens(int64_t id) const {
    return with(id, "num_tokens", [](const Sequence &s) { return s.num_tokens(); });
  }
  int64_t num_computed(int64_t id) const {
    return with(id, "num_computed_tokens", [](const Sequence &s) { return s.num_computed; });
  }
  int64_t num_cached(int64_t id) const {
    return with(id, "num_cached_tokens", [](const Sequence &s) { return s.num_cached; });
  }
  bool swapped(int64_t id) const {
    return with(id, "is_swapped", [](const Sequence &s) { return s.swapped; });
  }
  std::vector<int32_t> token_ids(int64_t id) const {
    return with(id, "token_ids", [](const Sequence &s) { return s.tokens; });
  }
  std::vector<int32_t> block_table(int64_t id) const {
    return with(id, "block_table", [](const Sequence &s) { return s.table; });
  }
  std::vector<int64_t> ids() const {
    const std::lock_guard lock(mutex_);
    return sorted_ids();
  }
  int32_t ref_count(int64_t block) const {
    const std::lock_guard lock(mutex_);
    if (block < 0 || block >= config_.num_blocks) {
      throw InvalidArgument(text("ref_count", "block") + "lie in 0 ... " + std::to_string(config_.num_blocks - 1) +
                            "; got " + std::to_string(block));
    }
    return pool_.ref_count(static_cast<int32_t>(block));
  }
  int64_t num_free() const {
    return locked([](const Manager &m) { return m.pool_.num_free(); });
  }
  int64_t num_free_host() const {
    return locked([](const Manager &m) -> int64_t { return m.host_.num_free(); });
  }
  int64_t num_held() const {
    return locked([](const Manager &m) { return m.pool_.num_held(); });
  }
  int64_t num_published() const {
    return locked([](const Manager &m) { return m.pool_.num_published(); });
  }
  int64_t num_sequences() const {
    return locked([](const Manager &m) { return m.sequences_.size(); });
  }
  Counters counters() const {
    return locked([](const Manager &m) { return m.counters_; });
  }
  PoolCounters pool_counters() const {
    return locked([](const Manager &m) { return m.pool_.counters(); });
  }
  const Config &config() const { return config_; }
  void weaken_hash(int bits) { pool_.weaken_hash(bits); }

 private:
  friend class State;

  static uint64_t next_serial() {
    static std::mutex mutex;
    static uint64_t serial = 0;
    const std::lock_guard lock(mutex);
    return ++serial;
  }

  // "BlockManager.step: `seqs` must "
  static std::string text(const char *call, const char *argument) {
    return std::string("BlockManager.") + call + ": `" + argument + "` must ";
  }

  int64_t blocks_for(int64_t num_tokens) const {
    return num_tokens / config_.block_size + (num_tokens % config_.block_size != 0);
  }

  std::vector<int64_t> sorted_ids() const {
    std::vector<int64_t> ids;
    sequences_.for_each([&](const Sequence &s) { ids.push_back(s.id); });
    std::sort(ids.begin(), ids.end());
    return ids;
  }

  // --- validation ---
  Sequence &live(int64_t id, const char *call) const {
    Sequence *sequence = sequences_.find(id);
    if (sequence == nullptr) {
      throw InvalidArgument(text(call, "seqs") + "name live sequences; " + std::to_string(id) +
                            " was never added or has been freed");
    }
    return *sequence;
  }

  // The sequences of a call in `batch_`, each live and named once.
  void gather(const int64_t *ids, int64_t n, const char *call) {
    batch_.clear();
    const uint64_t mark = ++batch_mark_;
    for (int64_t i = 0; i < n; ++i) {
      Sequence &sequence = live(ids[i], call);
      if (sequence.batch_mark == mark) {
        throw InvalidArgument(text(call, "seqs") + "name each sequence once; " + std::to_string(ids[i]) +
                              " is repeated");
      }
      sequence.batch_mark = mark;
      batch_.push_back(&sequence);
    }
  }

  void require_resident(const Sequence &sequence, const char *call) const {
    if (sequence.swapped) {
      throw InvalidArgument(text(call, "seqs") + "be on the device; " + std::to_string(sequence.id) +
                            " is swapped out");
    }
  }

  void require_can_fit(int64_t num_tokens, const char *call, const char *argument) const {
    constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
    if (num_tokens > kMaxTokens) {
      throw InvalidArgument(text(call, argument) + "keep a sequence within " + std::to_string(kMaxTokens) +
                            " tokens; got " + std::to_string(num_tokens));
    }
    int64_t needed = blocks_for(num_tokens);
    // With a window, what a step of one token can see: the window may straddle one block more than it fills.
    if (config_.window > 0) needed = std::min(needed, blocks_for(config_.window - 1) + 1);
    if (needed > config_.num_blocks) {
      throw InvalidArgument(text(call, argument) + "fit into the pool: " + std::to_string(num_tokens) +
                            " tokens need " + std::to_string(needed) + " blocks of " +
                            std::to_string(config_.block_size) + " tokens and there are " +
                            std::to_string(config_.num_blocks));
    }
  }

  // --- tables ---
  void release_entry(const Sequence &sequence, int32_t block) {
    if (block == kNone) return;
    sequence.swapped ? host_.release(block) : pool_.release(block);
  }

  // Drops the blocks from `keep` on, the last one first: the tail of a prefix is to be evicted before its head.
  void shrink_table(Sequence &s, int64_t keep) {
    for (int64_t i = s.num_blocks(); i-- > keep;) {
      release_entry(s, s.table.back());
      s.table.pop_back();
    }
    s.num_released = std::min(s.num_released, keep);
    ++s.table_version;
  }

  // Back to the state of a sequence that has been added and has found nothing in the cache.
  void forget_computed(Sequence &s) {
    shrink_table(s, 0);
    s.num_computed = s.num_cached = s.num_published = 0;
    s.tip = Namespaces::root(s.space);
    s.swapped = s.started = s.chain_broken = s.queried = false;
  }

  void erase(Sequence &s) {
    shrink_table(s, 0);
    pool_.namespaces().release(s.space);
    sequences_.erase(s.id);
  }

  void shorten(Sequence &s, int64_t num_tokens) {
    s.tokens.resize(static_cast<size_t>(num_tokens));
    s.num_computed = std::min(s.num_computed, num_tokens);
    s.num_cached = std::min(s.num_cached, s.num_computed);
    shrink_table(s, blocks_for(s.num_computed));
    const int64_t full = s.num_computed / config_.block_size;
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

  // --- the prefix cache ---
  // Calls `visit(block)` for each cached block of the prefix that follows `parent`, at most `limit` of them.
  template <typename Visit>
  void walk_prefix(Parent parent, const int32_t *tokens, int64_t limit, Visit visit) const {
    for (int64_t i = 0; i < limit; ++i, tokens += config_.block_size) {
      const int32_t block = pool_.find(parent, pool_.child_hash(parent, tokens), tokens);
      if (block == kNone) return;
      visit(block);
      parent = pool_.node(block);
    }
  }

  void take_cached_blocks(Sequence &s) {
    // A truncated sequence may hold part of a block; there is no whole block to add to that.
    if (!config_.prefix_caching || s.chain_broken || s.num_computed != s.num_published * config_.block_size) return;
    if (!s.queried) counters_.prefix_queried_tokens += s.num_tokens();
    s.queried = true;
    const int64_t before = s.num_computed;
    // The last token is always left to compute: its query gives the logits.
    const int64_t limit = (s.num_tokens() - 1) / config_.block_size - s.num_published;
    walk_prefix(s.tip, s.tokens.data() + s.num_published * config_.block_size, limit, [&](int32_t block) {
      pool_.hold(block, s.priority);
      s.table.push_back(block);
      s.tip = pool_.node(block);
    });
    s.num_published = s.num_blocks();
    s.num_computed = s.num_cached = s.num_published * config_.block_size;
    counters_.prefix_hit_tokens += s.num_computed - before;
    release_behind_window(s);
  }

  // Publishes the blocks that have become full. Where the cache holds the same prefix already, the sequence changes
  // over to the cached block and gives its own back.
  void publish_full_blocks(Sequence &s) {
    if (!config_.prefix_caching) return;
    const int64_t full = s.num_computed / config_.block_size;
    while (s.num_published < full && !s.chain_broken) {
      int32_t &entry = s.table[static_cast<size_t>(s.num_published)];
      const int32_t *tokens = s.tokens.data() + s.num_published * config_.block_size;
      if (entry == kNone || !pool_.alive(s.tip)) {
        s.chain_broken = true;
        return;
      }
      const Hash128 hash = pool_.child_hash(s.tip, tokens);
      const int32_t cached = pool_.find(s.tip, hash, tokens);
      if (cached == kNone) {
        s.chain_broken = !pool_.publish(entry, s.tip, hash, tokens, s.priority);
        if (s.chain_broken) return;
      } else if (cached != entry) {
        pool_.hold(cached, s.priority);
        pool_.release(entry);
        entry = cached;
        ++s.table_version;
        ++counters_.merged_duplicates;
      }
      s.tip = pool_.node(entry);
      ++s.num_published;
    }
  }

  // The next query sits at position num_computed and sees the last `window` positions up to its own.
  int64_t num_blocks_behind_window(int64_t num_computed) const {
    if (config_.window <= 0) return 0;
    return std::max<int64_t>(0, num_computed - config_.window + 1) / config_.block_size;
  }

  void release_behind_window(Sequence &s) {
    const int64_t passed = num_blocks_behind_window(s.num_computed);
    for (; s.num_released < passed; ++s.num_released) {
      int32_t &entry = s.table[static_cast<size_t>(s.num_released)];
      if (entry == kNone) continue;
      pool_.release(entry);
      entry = kNone;
      ++counters_.window_released;
    }
  }

  // --- step ---
  struct StepPlan {
    int64_t num_tokens = 0;
    int64_t max_blocks = 0;
    int64_t new_blocks = 0;
    bool admits = false;
  };
  StepPlan plan_step(const int64_t *ids, const int64_t *counts, int64_t n);
  int64_t unshare_written_blocks();
  void require_capacity(const StepPlan &plan, int64_t num_copies, const StepArrays &out) const;
  void require_free(int64_t needed, bool admits, const char *call) const;
  void extend_table(Sequence &s, int64_t count, bool copy, StepArrays &out);
  void write_row(const Sequence &s, int64_t i, int64_t count, int64_t start, StepArrays &out) const;

  const Config config_;
  const int64_t watermark_blocks_;
  const uint64_t serial_;  // tells managers apart: a batch of another manager holds nothing of ours
  mutable std::mutex mutex_;
  BlockPool pool_;
  HostPool host_;
  SequenceMap sequences_;
  Counters counters_;
  int64_t next_id_ = 0;
  uint64_t batch_mark_ = 0;
  std::vector<Sequence *> batch_;
  std::vector<char> copies_;  // for each sequence of the batch: its last block has to be copied
};

inline int64_t Manager::add(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key, int8_t priority) {
  const std::lock_guard lock(mutex_);
  require_can_fit(num_tokens, "add", "token_ids");
  auto sequence = std::make_unique<Sequence>();
  sequence->tokens.assign(tokens, tokens + num_tokens);
  sequence->priority = priority;
  sequence->id = next_id_;
  Sequence &s = sequences_.insert(std::move(sequence));
  ++next_id_;
  s.space = pool_.namespaces().acquire(extra_key, pool_.key());
  s.tip = Namespaces::root(s.space);
  take_cached_blocks(s);
  return s.id;
}

inline int64_t Manager::take_prefix(int64_t id) {
  const std::lock_guard lock(mutex_);
  Sequence &s = live(id, "take_prefix");
  require_resident(s, "take_prefix");
  if (s.started) {
    throw InvalidArgument(text("take_prefix", "seq") + "not have had a step since it was added or preempted; " +
                          std::to_string(id) + " has computed " + std::to_string(s.num_computed) + " tokens");
  }
  take_cached_blocks(s);
  return s.num_cached;
}

inline int64_t Manager::match(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key) const {
  const std::lock_guard lock(mutex_);
  const int32_t space = pool_.namespaces().find(extra_key);
  if (space == kNone || !config_.prefix_caching) return 0;
  int64_t found = 0;
  walk_prefix(Namespaces::root(space), tokens, (num_tokens - 1) / config_.block_size, [&](int32_t) { ++found; });
  return found * config_.block_size;
}

inline void Manager::append(const int64_t *ids, int64_t n, const int64_t *starts, const int32_t *tokens) {
  const std::lock_guard lock(mutex_);
  gather(ids, n, "append");
  for (int64_t i = 0; i < n; ++i) {
    require_can_fit(batch_[static_cast<size_t>(i)]->num_tokens() + starts[i + 1] - starts[i], "append", "token_ids");
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
    throw InvalidArgument(text("truncate", "num_tokens") + "lie in 1 ... " + std::to_string(s.num_tokens()) +
                          ", the tokens of sequence " + std::to_string(id) + "; got " + std::to_string(num_tokens));
  }
  if (s.num_released > num_blocks_behind_window(std::min(s.num_computed, num_tokens))) {
    throw InvalidArgument(text("truncate", "num_tokens") + "leave what the window then shows: the first " +
                          std::to_string(s.num_released * config_.block_size) + " tokens of sequence " +
                          std::to_string(id) + " have been released; got " + std::to_string(num_tokens));
  }
  shorten(s, num_tokens);
}

inline std::vector<int64_t> Manager::fork(int64_t id, int64_t n) {
  const std::lock_guard lock(mutex_);
  const Sequence &parent = live(id, "fork");
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < n; ++i) {
    auto child = std::make_unique<Sequence>(parent);
    child->id = next_id_++;
    for (const int32_t block : child->table) {
      if (block == kNone) continue;
      child->swapped ? host_.hold(block) : pool_.hold(block, child->priority);
    }
    pool_.namespaces().retain(child->space);
    ids.push_back(child->id);
    sequences_.insert(std::move(child));
  }
  return ids;
}

inline void Manager::free(const int64_t *ids, int64_t n) {
  const std::lock_guard lock(mutex_);
  gather(ids, n, "free");
  for (Sequence *s : batch_) erase(*s);
}

inline void Manager::preempt(const int64_t *ids, int64_t n) {
  const std::lock_guard lock(mutex_);
  gather(ids, n, "preempt");
  for (Sequence *s : batch_) {
    forget_computed(*s);
    ++counters_.preemptions;
  }
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
}

}  // namespace pagedattn::blocks
