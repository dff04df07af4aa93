// The block manager: sequences, their block tables and the rules by which blocks move between them.
//
// Invariant: the table of a sequence has ceil(num_computed / block_size) entries, so only its last block can be written
// again; that block is copied first if somebody else needs it. The first `num_published` blocks are in the prefix cache
// and form a chain of parents from the sequence's namespace.
//
// A call first validates everything it was given and only then changes anything, so a call that throws has changed
// nothing. Calls are serialised by a mutex: they run without Python's lock, and a fork waits for them.
//
// The calls are defined beside this file: manager_life.h, manager_prefix.h, manager_step.h and manager_swap.h; the
// proof of the invariants and the snapshot are check.h and snapshot.h.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <mutex>
#include <string>

#include "blocks/block_arithmetic.h"
#include "blocks/block_pool.h"
#include "blocks/errors.h"
#include "blocks/fork_mutex.h"
#include "blocks/host_pool.h"
#include "blocks/sequence.h"
#include "blocks/step_arrays.h"

namespace pagedattn::blocks {

struct Config {
  int32_t num_blocks = 0;
  int32_t block_size = 0;
  int32_t num_host_blocks = 0;
  bool prefix_caching = true;
  double watermark = 0.0;
  int64_t window = 0;  // 0: none
  int64_t num_events = 0;
  HashKey key;
};

struct Counters {
  int64_t prefix_queried_tokens = 0;
  int64_t prefix_hit_tokens = 0;
  int64_t partial_hit_tokens = 0;
  int64_t cow_copies = 0;
  int64_t merged_duplicates = 0;
  int64_t window_released = 0;
  int64_t preemptions = 0;
  int64_t swapped_out_blocks = 0;
  int64_t swapped_in_blocks = 0;
};

struct Layout;

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
        blocks_(config.block_size),
        watermark_blocks_(static_cast<int64_t>(config.watermark * config.num_blocks)),
        serial_(next_serial()),
        pool_(config.num_blocks, config.block_size, config.prefix_caching, config.num_events, config.key),
        host_(config.num_host_blocks) {}

  // --- the life of a sequence ---
  int64_t add(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key, int8_t priority);
  void append(const int64_t *ids, int64_t n, const int64_t *starts, const int32_t *tokens);
  void truncate(int64_t id, int64_t num_tokens);
  std::vector<int64_t> fork(int64_t id, int64_t n);
  void reorder(const int64_t *ids, int64_t n, const int64_t *parents);
  void free(const int64_t *ids, int64_t n);
  void preempt(const int64_t *ids, int64_t n);

  // --- the prefix cache ---
  int64_t take_prefix(int64_t id);
  int64_t match(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key) const;
  int64_t pin(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key);
  void unpin(const int64_t *ids, int64_t n);
  std::vector<uint64_t> block_hashes(const int32_t *tokens, int64_t num_tokens, const std::string &extra_key) const;
  void reset_prefix_cache();
  std::vector<uint8_t> drain_events() {
    const std::lock_guard lock(mutex_);
    return pool_.events().drain();
  }

  // --- blocks for a batch ---
  int64_t max_table_blocks(const StepRequest &request);
  void step(const StepRequest &request, StepArrays &out);
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
    return locked([](const Manager &m) { return sorted_ids(m.sequences_); });
  }
  std::vector<int64_t> pins() const {
    return locked([](const Manager &m) { return sorted_ids(m.pins_); });
  }
  int64_t num_pinned(int64_t pin) const;
  int32_t ref_count(int64_t block) const {
    const std::lock_guard lock(mutex_);
    if (block < 0 || block >= config_.num_blocks) {
      throw InvalidArgument(must("ref_count", "block") + "lie in 0 ... " + std::to_string(config_.num_blocks - 1) +
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
  int64_t num_dropped_events() const {
    return locked([](const Manager &m) { return m.pool_.events().dropped(); });
  }
  Counters counters() const {
    return locked([](const Manager &m) { return m.counters_; });
  }
  PoolCounters pool_counters() const {
    return locked([](const Manager &m) { return m.pool_.counters(); });
  }
  Layout layout() const;
  const Config &config() const { return config_; }
  void weaken_hash(int bits) { pool_.weaken_hash(bits); }

 private:
  friend class Check;
  friend class SnapshotWriter;
  friend class SnapshotReader;

  static uint64_t next_serial() {
    static std::atomic<uint64_t> serial = 0;
    return ++serial;
  }

  static std::vector<int64_t> sorted_ids(const SequenceMap &map) {
    std::vector<int64_t> ids;
    ids.reserve(static_cast<size_t>(map.size()));
    map.for_each([&](const Sequence &s) { ids.push_back(s.id); });
    std::sort(ids.begin(), ids.end());
    return ids;
  }

  // --- validation ---
  Sequence &live(int64_t id, const char *call) const {
    Sequence *sequence = sequences_.find(id);
    if (sequence == nullptr) throw_unknown(id, call);
    return *sequence;
  }
  [[noreturn]] void throw_unknown(int64_t id, const char *call) const;
  void gather(const int64_t *ids, int64_t n, const char *call);
  void require_resident(const Sequence &sequence, const char *call) const;
  void require_can_fit(int64_t num_tokens, const char *call, const char *argument) const {
    if (num_tokens > most_tokens_) throw_cannot_fit(num_tokens, call, argument);
  }
  [[noreturn]] void throw_cannot_fit(int64_t num_tokens, const char *call, const char *argument) const;

  // Tokens of the longest sequence that can ever be computed.
  int64_t most_tokens() const {
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    // With a window, what a step of one token can see: the window may straddle one block more than it fills.
    const bool slides =
        config_.window > 0 && config_.window <= kMax && blocks_.holding(config_.window - 1) + 1 <= config_.num_blocks;
    return slides ? kMax : std::min<int64_t>(kMax, int64_t{config_.num_blocks} * config_.block_size);
  }

  // --- tables ---
  // One more reference to everything that a copy of a sequence refers to.
  void share_table(const Sequence &copy) {
    copy.swapped ? host_.share(copy.table) : pool_.share(copy.table);
    pool_.namespaces().retain(copy.space);
  }
  std::unique_ptr<Sequence> copy_of(const Sequence &s);
  void shrink_table(Sequence &s, int64_t keep);
  void forget_computed(Sequence &s);
  void shorten(Sequence &s, int64_t num_tokens);

  // --- the prefix cache ---
  template <typename Visit>
  void walk_prefix(Parent parent, const int32_t *tokens, int64_t limit, Visit visit) const;
  struct PartialMatch {
    int32_t block = kNone;
    int64_t num_tokens = 0;
  };
  PartialMatch match_partly(Parent parent, const int32_t *tokens, int64_t num_left) const;
  void take_cached_blocks(Sequence &s);
  bool can_outdo_borrowed_tail(const Sequence &s) const;
  void return_borrowed_tail(Sequence &s);
  bool can_publish(const Sequence &s) const {
    return config_.prefix_caching && !s.chain_broken && s.num_computed >= (s.num_published + 1) * blocks_.size();
  }
  void publish_full_blocks(Sequence &s);
  bool publish_block(Sequence &s, Hash128 hash, bool tip_is_new);
  int64_t num_blocks_behind_window(int64_t num_computed) const;
  void release_behind_window(Sequence &s);

  // --- step ---
  struct StepPlan {
    int64_t num_tokens = 0;
    int64_t max_blocks = 0;
    int64_t new_blocks = 0;
    int64_t num_copies = 0;
    bool admits = false;
  };
  enum class Tail : uint8_t { kWrite, kCopy, kCopyBorrowed, kTakeOver };
  StepPlan plan_step(const StepRequest &request);
  void decide_tails(StepPlan &plan);
  void spend_spare_blocks(StepPlan &plan, const StepArrays &out);
  void require_capacity(const StepPlan &plan, const StepArrays &out) const;
  void require_free(int64_t needed, bool admits, const char *call) const;
  void prepare_tail(Sequence &s, Tail tail, StepArrays &out);
  void write_row(const Sequence &s, int64_t i, int64_t count, StepArrays &out) const;

  const Config config_;
  const BlockArithmetic blocks_;
  const int64_t most_tokens_ = most_tokens();
  const int64_t watermark_blocks_;
  const uint64_t serial_;  // tells managers apart: a batch of another manager holds nothing of ours
  mutable ForkMutex mutex_;
  BlockPool pool_;
  HostPool host_;
  SequenceMap sequences_;
  SequenceMap pins_;  // sequences that only hold blocks
  SpareSequences spares_;
  Counters counters_;
  int64_t next_id_ = 0;

  // Scratch space of a call.
  uint64_t batch_mark_ = 0;
  std::vector<Sequence *> batch_;
  std::vector<size_t> tails_;  // those of the batch that must look at their last block before writing
  std::vector<Tail> actions_;  // what each does with its last block
  std::vector<int32_t> borrowed_;
  std::vector<Sequence *> due_;  // those with blocks to publish or to let go of
};

}  // namespace pagedattn::blocks
