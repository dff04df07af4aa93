// One step: blocks, table rows and slots for the tokens that a batch computes next.
//
// Three passes over the batch. The first validates and counts, and only counts down the blocks that have to be copied;
// if the blocks do not suffice, that is taken back and the call throws. The second hands out blocks and writes the
// arrays. The third publishes full blocks and releases those behind the window, after every hand-out, so that no block
// given back in a step is written by another sequence of the same step.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "blocks/manager.h"

namespace pagedattn::blocks {

inline Manager::StepPlan Manager::plan_step(const int64_t *ids, const int64_t *counts, int64_t n) {
  gather(ids, n, "step");
  StepPlan plan;
  for (int64_t i = 0; i < n; ++i) {
    const Sequence &s = *batch_[static_cast<size_t>(i)];
    require_resident(s, "step");
    const int64_t known = s.num_tokens() - s.num_computed;
    if (known == 0) {
      throw InvalidArgument(text("step", "seqs") + "have tokens to compute; append to sequence " +
                            std::to_string(ids[i]) + " first");
    }
    if (counts[i] < 1 || counts[i] > known) {
      throw InvalidArgument(text("step", "num_new_tokens") + "lie in 1 ... " + std::to_string(known) +
                            ", the tokens of sequence " + std::to_string(ids[i]) +
                            " that are known and not computed; got " + std::to_string(counts[i]));
    }
    const int64_t blocks = blocks_for(s.num_computed + counts[i]);
    plan.num_tokens += counts[i];
    plan.max_blocks = std::max(plan.max_blocks, blocks);
    plan.new_blocks += blocks - s.num_blocks();
    plan.admits |= !s.started;
  }
  return plan;
}

inline int64_t Manager::max_table_blocks(const int64_t *ids, const int64_t *counts, int64_t n) {
  const std::lock_guard lock(mutex_);
  return plan_step(ids, counts, n).max_blocks;
}

// Marks who must copy its last block before writing to it, and lets go of that block, so that the last of several
// sharers in one batch finds itself alone and writes in place.
inline int64_t Manager::unshare_written_blocks() {
  int64_t num_copies = 0;
  copies_.assign(batch_.size(), 0);
  for (size_t i = 0; i < batch_.size(); ++i) {
    const Sequence &s = *batch_[i];
    if (s.num_computed % config_.block_size == 0 || pool_.ref_count(s.table.back()) == 1) continue;
    pool_.unshare(s.table.back());
    copies_[i] = 1;
    ++num_copies;
  }
  return num_copies;
}

inline void Manager::require_capacity(const StepPlan &plan, int64_t num_copies, const StepArrays &out) const {
  const auto require = [](int64_t wanted, int64_t capacity, const char *array, const char *what) {
    if (wanted <= capacity) return;
    throw InvalidArgument(text("step", "out") + "hold " + std::to_string(wanted) + " " + what + " in its `" + array +
                          "`; it has room for " + std::to_string(capacity));
  };
  require(static_cast<int64_t>(batch_.size()), out.max_seqs, "seq_lens", "sequences");
  require(plan.max_blocks, out.max_blocks, "block_tables", "blocks a sequence");
  require(plan.num_tokens, out.max_tokens, "slot_mapping", "tokens");
  require(num_copies, out.max_copies, "copies", "copies");
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

inline void Manager::extend_table(Sequence &s, int64_t count, bool copy, StepArrays &out) {
  if (copy) {
    const int32_t shared = s.table.back();
    s.table.back() = pool_.allocate();
    ++s.table_version;
    out.copies[2 * out.num_copies] = shared;
    out.copies[2 * out.num_copies + 1] = s.table.back();
    ++out.num_copies;
    ++counters_.cow_copies;
  } else if (s.num_computed % config_.block_size != 0 && pool_.published(s.table.back())) {
    // A truncated sequence writes into a block that the cache still offers with its old contents.
    pool_.withdraw(s.table.back());
  }
  const int64_t blocks = blocks_for(s.num_computed + count);
  while (s.num_blocks() < blocks) s.table.push_back(pool_.allocate());
}

inline void Manager::write_row(const Sequence &s, int64_t i, int64_t count, int64_t start, StepArrays &out) const {
  StepArrays::Row &row = out.rows[static_cast<size_t>(i)];
  const bool same = row.sequence == s.id && row.version == s.table_version && row.num_blocks <= s.num_blocks();
  int32_t *entries = out.block_tables + i * out.max_blocks;
  for (int64_t k = same ? row.num_blocks : 0; k < s.num_blocks(); ++k) {
    entries[k] = std::max(0, s.table[static_cast<size_t>(k)]);  // released ones: any block will do, none is read
  }
  row = {s.id, s.table_version, s.num_blocks()};

  out.seq_lens[i] = static_cast<int32_t>(s.num_computed + count);
  out.query_start_loc[i] = static_cast<int32_t>(start);
  const int64_t size = config_.block_size;
  const int64_t end = s.num_computed + count;
  for (int64_t position = s.num_computed, t = start; position < end;) {
    const int64_t slots = int64_t{s.table[static_cast<size_t>(position / size)]} * size;
    const int64_t block_end = std::min(end, (position / size + 1) * size);
    for (int64_t offset = position % size; position < block_end; ++position, ++offset, ++t) {
      out.positions[t] = position;
      out.slot_mapping[t] = slots + offset;
    }
  }
}

inline void Manager::step(const int64_t *ids, const int64_t *counts, int64_t n, StepArrays &out) {
  const std::lock_guard lock(mutex_);
  const StepPlan plan = plan_step(ids, counts, n);
  const int64_t num_copies = unshare_written_blocks();
  try {
    require_capacity(plan, num_copies, out);
    require_free(plan.new_blocks + num_copies, plan.admits, "step");
  } catch (...) {
    for (size_t i = 0; i < batch_.size(); ++i) {
      if (copies_[i]) pool_.share(batch_[i]->table.back());
    }
    throw;
  }

  if (out.manager != serial_) {
    out.rows.assign(static_cast<size_t>(out.max_seqs), {});
    out.manager = serial_;
  }
  out.num_seqs = n;
  out.num_tokens = out.num_copies = 0;
  for (int64_t i = 0; i < n; ++i) {
    Sequence &s = *batch_[static_cast<size_t>(i)];
    extend_table(s, counts[i], copies_[static_cast<size_t>(i)], out);
    write_row(s, i, counts[i], out.num_tokens, out);
    out.num_tokens += counts[i];
  }
  out.query_start_loc[n] = static_cast<int32_t>(out.num_tokens);

  for (int64_t i = 0; i < n; ++i) {
    Sequence &s = *batch_[static_cast<size_t>(i)];
    s.num_computed += counts[i];
    s.started = true;
    publish_full_blocks(s);
    release_behind_window(s);
  }
}

}  // namespace pagedattn::blocks
