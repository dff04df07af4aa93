// Preemption by swap: a sequence's blocks move to the host pool and back.
//
// Only references move here. The mappings returned, pairs of (source block, destination block), tell the caller what to
// copy. A block shared by several sequences of one call is copied once and stays shared. On the way in, the leading
// blocks that the prefix cache still holds are taken from it instead of being copied.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unordered_map>

#include "blocks/manager_step.h"

namespace pagedattn::blocks {

inline std::vector<int64_t> Manager::swap_out(const int64_t *ids, int64_t n) {
  const std::lock_guard lock(mutex_);
  gather(ids, n, "swap_out");
  std::unordered_map<int32_t, int32_t> on_host;
  for (const Sequence *s : batch_) {
    require_resident(*s, "swap_out");
    for (const int32_t block : s->table) {
      if (block != kNone) on_host.emplace(block, kNone);
    }
  }
  const auto needed = static_cast<int64_t>(on_host.size());
  if (needed > host_.num_free()) {
    throw NotEnoughBlocks("BlockManager.swap_out: " + std::to_string(needed) + " host blocks are needed and " +
                              std::to_string(host_.num_free()) + " are free",
                          needed, host_.num_free());
  }
  // All memory is found before anything changes.
  std::vector<int64_t> mapping;
  mapping.reserve(static_cast<size_t>(2 * needed));
  std::vector<std::vector<int32_t>> device_tables;
  device_tables.reserve(batch_.size());
  for (const Sequence *s : batch_) device_tables.push_back(s->table);
  for (size_t k = 0; k < batch_.size(); ++k) {
    Sequence *s = batch_[k];
    const std::vector<int32_t> &device_blocks = device_tables[k];
    for (int32_t &entry : s->table) {
      if (entry == kNone) continue;
      int32_t &host = on_host[entry];
      if (host == kNone) {
        host = host_.allocate();
        mapping.insert(mapping.end(), {entry, host});
      } else {
        host_.hold(host);
      }
      entry = host;
    }
    for (size_t i = device_blocks.size(); i-- > 0;) {
      if (device_blocks[i] != kNone) pool_.release(device_blocks[i]);
    }
    s->swapped = true;
    s->borrows_tail = false;
    s->num_published = 0;
    s->tip = Namespaces::root(s->space);
    s->chain_broken |= s->num_released > 0;
    ++s->table_version;
  }
  counters_.swapped_out_blocks += needed;
  return mapping;
}

inline std::vector<int64_t> Manager::swap_in(const int64_t *ids, int64_t n) {
  const std::lock_guard lock(mutex_);
  gather(ids, n, "swap_in");
  // First only look: which blocks the cache still has, and how many must be allocated.
  std::vector<std::vector<int32_t>> cached(batch_.size());
  std::unordered_map<int32_t, int32_t> on_device;  // host block -> device block
  std::unordered_map<int32_t, char> revived;       // evictable blocks that would be held again
  for (size_t i = 0; i < batch_.size(); ++i) {
    const Sequence &s = *batch_[i];
    if (!s.swapped) {
      throw InvalidArgument(must("swap_in", "seqs") + "be swapped out; " + std::to_string(s.id) + " is on the device");
    }
    if (config_.prefix_caching && !s.chain_broken) {
      walk_prefix(s.tip, s.tokens.data(), blocks_.full(s.num_computed), [&](int32_t block) {
        cached[i].push_back(block);
        if (pool_.ref_count(block) == 0) revived.emplace(block, 1);
      });
    }
    for (size_t k = cached[i].size(); k < s.table.size(); ++k) {
      if (s.table[k] != kNone) on_device.emplace(s.table[k], kNone);
    }
  }
  const auto needed = static_cast<int64_t>(on_device.size());
  require_free(needed + static_cast<int64_t>(revived.size()), true, "swap_in");

  std::vector<int64_t> mapping;
  mapping.reserve(static_cast<size_t>(2 * needed));
  std::vector<std::vector<int32_t>> host_tables;
  host_tables.reserve(batch_.size());
  for (const Sequence *s : batch_) host_tables.push_back(s->table);
  for (size_t i = 0; i < batch_.size(); ++i) {
    Sequence &s = *batch_[i];
    for (size_t k = 0; k < cached[i].size(); ++k) pool_.hold(s.table[k] = cached[i][k], s.priority);
    s.num_published = static_cast<int64_t>(cached[i].size());
    if (!cached[i].empty()) s.tip = pool_.node(cached[i].back());
  }
  for (size_t i = 0; i < batch_.size(); ++i) {
    Sequence &s = *batch_[i];
    for (size_t k = cached[i].size(); k < s.table.size(); ++k) {
      int32_t &entry = s.table[k];
      if (entry == kNone) continue;
      int32_t &device = on_device[entry];
      if (device == kNone) {
        device = pool_.allocate();
        mapping.insert(mapping.end(), {entry, device});
      } else {
        pool_.hold(device, s.priority);
      }
      entry = device;
    }
    for (const int32_t block : host_tables[i]) {
      if (block != kNone) host_.release(block);
    }
    s.swapped = false;
    s.shares_tail = true;
    ++s.table_version;
  }
  for (Sequence *s : batch_) {
    if (can_publish(*s)) publish_full_blocks(*s);
  }
  counters_.swapped_in_blocks += needed;
  return mapping;
}

}  // namespace pagedattn::blocks
