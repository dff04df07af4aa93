// One step: blocks, table rows and slots for the tokens that a batch computes next.
//
// Three passes over the batch. The first validates, counts, and finds all memory that the step will need; if the blocks
// do not suffice, the call throws with nothing changed. The second hands out blocks and writes the arrays. The third
// publishes full blocks and releases those behind the window, after every hand-out, so that no block given back in a
// step is written by another sequence of the same step.
//
// A sequence that goes on decoding touches its own two cache lines, the end of its tokens and its row, and divides by
// nothing: everything else waits behind a flag or a comparison that is seldom true.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "blocks/manager_life.h"

namespace pagedattn::blocks {

inline Manager::StepPlan Manager::plan_step(const StepRequest &request) {
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();  // query starts are int32
  gather(request.ids, request.num_seqs, "step");
  tails_.clear();
  StepPlan plan;
  for (size_t i = 0; i < batch_.size(); ++i) {
    Sequence &s = *batch_[i];
    const bool appends = request.appends(i);
    const int64_t num_tokens = s.num_tokens() + appends;
    require_resident(s, "step");
    if (appends) require_can_fit(num_tokens, "step", "token_ids");
    const int64_t count = request.counts[i];
    const int64_t known = num_tokens - s.num_computed;
    if (known == 0) {
      throw InvalidArgument(must("step", "seqs") + "have tokens to compute; append to sequence " +
                            std::to_string(s.id) + " first");
    }
    if (count < 1 || count > known) {
      throw InvalidArgument(must("step", "num_new_tokens") + "lie in 1 ... " + std::to_string(known) +
                            ", the tokens of sequence " + std::to_string(s.id) +
                            " that are known and not computed; got " + std::to_string(count));
    }
    int64_t blocks = s.num_blocks();
    if (s.num_computed + count > blocks * blocks_.size()) {
      blocks = blocks_.holding(s.num_computed + count);
      plan.new_blocks += blocks - s.num_blocks();
      make_room(s.table, blocks);
    }
    if (appends) make_room(s.tokens, num_tokens);
    if (s.shares_tail) tails_.push_back(i);
    plan.num_tokens += count;
    plan.max_blocks = std::max(plan.max_blocks, blocks);
    plan.admits |= !s.started;
  }
  if (plan.num_tokens > kMaxTokens) {
    throw InvalidArgument(must("step", "num_new_tokens") + "sum up to at most " + std::to_string(kMaxTokens) +
                          "; got " + std::to_string(plan.num_tokens));
  }
  return plan;
}

inline int64_t Manager::max_table_blocks(const StepRequest &request) {
  const std::lock_guard lock(mutex_);
  return plan_step(request).max_blocks;
}

// What each sequence does with its last, partly filled block before writing to it. Whoever must copy it lets go of it,
// so that the last of several sharers in one batch finds itself alone and writes in place.
inline void Manager::decide_tails(StepPlan &plan) {
  actions_.assign(batch_.size(), Tail::kWrite);
  borrowed_.clear();
  for (const size_t i : tails_) {
    const Sequence &s = *batch_[i];
    if (s.num_computed == s.num_blocks() * blocks_.size()) continue;
    const int32_t block = s.table.back();
    if (pool_.ref_count(block) > 1) {
      pool_.unshare(block);
      actions_[i] = Tail::kCopy;
      ++plan.num_copies;
    } else if (pool_.published(block)) {
      actions_[i] = Tail::kTakeOver;
    }
  }
}

// A borrowed block that nobody else holds could be written to, but then the cache would lose it: as far as there are
// blocks to spare it is copied instead.
inline void Manager::spend_spare_blocks(StepPlan &plan, const StepArrays &out) {
  int64_t spare = pool_.num_free() - plan.new_blocks - plan.num_copies - (plan.admits ? watermark_blocks_ : 0);
  for (const size_t i : tails_) {
    if (spare <= 0 || plan.num_copies == out.max_copies) return;
    if (actions_[i] != Tail::kTakeOver || !batch_[i]->borrows_tail) continue;
    actions_[i] = Tail::kCopyBorrowed;
    ++plan.num_copies;
    --spare;
  }
}

inline void Manager::require_capacity(const StepPlan &plan, const StepArrays &out) const {
  const auto require = [](int64_t wanted, int64_t capacity, const char *array, const char *what) {
    if (wanted <= capacity) return;
    throw InvalidArgument(must("step", "out") + "hold " + std::to_string(wanted) + " " + what + " in its `" + array +
                          "`; it has room for " + std::to_string(capacity));
  };
  require(static_cast<int64_t>(batch_.size()), out.max_seqs, "seq_lens", "sequences");
  require(plan.max_blocks, out.max_blocks, "block_tables", "blocks a sequence");
  require(plan.num_tokens, out.max_tokens, "slot_mapping", "tokens");
  require(plan.num_copies, out.max_copies, "copies", "copies");
}

inline void Manager::require_free(int64_t needed, bool admits, const char *call) const {
  const int64_t reserve = admits ? watermark_blocks_ : 0;
  if (needed == 0 || needed + reserve <= pool_.num_free()) return;
  if (reserve > 0 && needed <= pool_.num_free()) {
    // With nobody else on the device there is nobody to keep blocks for, and waiting would never end.
    bool alone = batch_.size() == 1;
    sequences_.for_each([&](const Sequence &s) { alone &= s.swapped || s.table.empty() || &s == batch_[0]; });
    if (alone) return;
  }
  const int64_t free = std::max<int64_t>(0, pool_.num_free() - reserve);
  std::string message = std::string("BlockManager.") + call + ": " + std::to_string(needed) +
                        " blocks are needed and " + std::to_string(free) + " are free";
  if (reserve > 0) message += ", besides the " + std::to_string(reserve) + " that the watermark keeps back";
  throw NotEnoughBlocks(message, needed, free);
}

inline void Manager::prepare_tail(Sequence &s, Tail tail, StepArrays &out) {
  s.shares_tail = s.borrows_tail = false;
  if (tail == Tail::kWrite) return;
  int32_t &entry = s.table.back();
  if (tail == Tail::kTakeOver) {
    pool_.withdraw(entry);
    return;
  }
  // Until all blocks of this step have been handed out a borrowed block stays held: it must not become the destination
  // of another copy.
  if (tail == Tail::kCopyBorrowed) borrowed_.push_back(entry);
  out.copies[2 * out.num_copies] = entry;
  entry = pool_.allocate();
  out.copies[2 * out.num_copies + 1] = entry;
  ++out.num_copies;
  ++s.table_version;
  ++counters_.cow_copies;
}

inline void count_up(int64_t *__restrict out, int64_t first, int64_t n) {
  constexpr int64_t kUsual = 16;  // of a whole block, mostly: a constant number needs no loop
  using Two __attribute__((vector_size(16))) = int64_t;
  if (n == kUsual) {
    Two numbers = {first, first + 1};
    for (int64_t i = 0; i < kUsual; i += 2, numbers += 2) std::memcpy(out + i, &numbers, sizeof(numbers));
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = first + i;
}

// The slots of the tokens from `position` to `end`, the first of which lies in the block `table[block]`, and their
// positions.
inline void write_slots(const int32_t *table, int64_t size, int64_t block, int64_t position, int64_t end,
                        int64_t *slots, int64_t *positions) {
  for (; position < end; ++block) {
    const int64_t n = std::min(end, (block + 1) * size) - position;
    count_up(slots, (table[block] - block) * size + position, n);
    count_up(positions, position, n);
    slots += n;
    positions += n;
    position += n;
  }
}

inline void Manager::write_row(const Sequence &s, int64_t i, int64_t count, StepArrays &out) const {
  StepArrays::Row &row = out.rows[static_cast<size_t>(i)];
  const bool same = row.sequence == s.id && row.version == s.table_version && row.num_blocks <= s.num_blocks();
  int32_t *entries = out.block_tables + i * out.max_blocks;
  for (int64_t k = same ? row.num_blocks : 0; k < s.num_blocks(); ++k) {
    entries[k] = std::max(0, s.table[static_cast<size_t>(k)]);  // released ones: any block will do, none is read
  }
  row = {s.id, s.num_blocks(), s.table_version};

  const int64_t start = out.num_tokens;
  const int64_t end = s.num_computed + count;
  out.seq_lens[i] = static_cast<int32_t>(end);
  out.query_start_loc[i] = static_cast<int32_t>(start);
  const int64_t block = count == 1 ? s.num_blocks() - 1 : blocks_.full(s.num_computed);
  write_slots(s.table.data(), blocks_.size(), block, s.num_computed, end, out.slot_mapping + start,
              out.positions + start);
}

inline void Manager::step(const StepRequest &request, StepArrays &out) {
  const std::lock_guard lock(mutex_);
  StepPlan plan = plan_step(request);
  if (out.manager != serial_) {
    out.rows.assign(static_cast<size_t>(out.max_seqs), {});
    out.manager = serial_;
  }
  due_.reserve(batch_.size());
  borrowed_.reserve(tails_.size());
  decide_tails(plan);
  try {
    require_capacity(plan, out);
    require_free(plan.new_blocks + plan.num_copies, plan.admits, "step");
  } catch (...) {
    for (const size_t i : tails_) {
      if (actions_[i] == Tail::kCopy) pool_.share(batch_[i]->table.back());
    }
    throw;
  }
  spend_spare_blocks(plan, out);

  due_.clear();
  out.num_seqs = request.num_seqs;
  out.num_tokens = out.num_copies = 0;
  for (size_t i = 0; i < batch_.size(); ++i) {
    Sequence &s = *batch_[i];
    const int64_t count = request.counts[i];
    if (request.appends(i)) s.tokens.push_back(request.tokens[i]);
    if (s.shares_tail) prepare_tail(s, actions_[i], out);
    if (s.num_computed + count > s.num_blocks() * blocks_.size()) {
      pool_.allocate(blocks_.holding(s.num_computed + count) - s.num_blocks(), s.table);
    }
    write_row(s, static_cast<int64_t>(i), count, out);
    out.num_tokens += count;
    s.num_computed += count;
    s.started = true;
    if (config_.window > 0 || can_publish(s)) due_.push_back(&s);
  }
  out.query_start_loc[batch_.size()] = static_cast<int32_t>(out.num_tokens);

  for (const int32_t block : borrowed_) pool_.release(block);
  for (Sequence *s : due_) {
    if (can_publish(*s)) publish_full_blocks(*s);
    release_behind_window(*s);
  }
}

}  // namespace pagedattn::blocks
