// What a picture of the cache needs.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "blocks/manager_swap.h"

namespace pagedattn::blocks {

struct Layout {
  std::vector<int64_t> sequences;  // id, tokens, computed tokens, table entries, swapped
  std::vector<int32_t> tables;
  std::vector<int32_t> ref_counts;
  std::vector<uint8_t> published;
};

inline Layout Manager::layout() const {
  const std::lock_guard lock(mutex_);
  Layout out;
  for (const int64_t id : sorted_ids(sequences_)) {
    const Sequence &s = *sequences_.find(id);
    out.sequences.insert(out.sequences.end(), {id, s.num_tokens(), s.num_computed, s.num_blocks(), s.swapped});
    out.tables.insert(out.tables.end(), s.table.begin(), s.table.end());
  }
  for (int32_t block = 0; block < config_.num_blocks; ++block) {
    out.ref_counts.push_back(pool_.ref_count(block));
    out.published.push_back(pool_.published(block));
  }
  return out;
}

}  // namespace pagedattn::blocks
