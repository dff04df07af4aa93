// What a step is asked for, and where it writes.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pagedattn::blocks {

struct StepRequest {
  const int64_t *ids = nullptr;
  const int64_t *counts = nullptr;  // new tokens of each sequence
  const int32_t *tokens = nullptr;  // one to append to each sequence first, or none at all
  int64_t num_seqs = 0;

  bool appends(size_t i) const { return tokens != nullptr && tokens[i] >= 0; }
};

// Arrays of the caller, with their capacities, and what the last step left in them.
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
    int64_t sequence = -1;
    int64_t num_blocks = 0;
    uint32_t version = 0;
  };
  std::vector<Row> rows;
  uint64_t manager = 0;
};

}  // namespace pagedattn::blocks
