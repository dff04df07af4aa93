// From the C ABI's argument structs to the backends' parameters: every check that needs no index value.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "pagedattn/pagedattn.h"
#include "params.h"

namespace pagedattn {

// Where an operation runs, and whether the GPU's index values are to be verified too.
struct Placement {
  bool on_cuda = false;
  int32_t device_id = 0;
  bool check_indices = true;  // always on the CPU
};

// Parameters with the host arrays that they point into.
struct ValidatedMerge {
  MergeStatesParams params;
  std::vector<TokensView> outs;
  std::vector<MergeStatesParams::Lse> lses;
};
struct ValidatedWrite {
  ReshapeAndCacheParams params;
  std::vector<LayerPointers> layers;
};
struct ValidatedCopy {
  CopyBlocksParams params;
  std::vector<void *> src;
  std::vector<void *> dst;
};

// `needs_out` is false where only the workspace size is asked for: `out` may then be absent.
Placement validate_attention(const pa_attention_args &args, bool needs_out, AttentionParams *params);
Placement validate_merge_states(const pa_merge_states_args &args, ValidatedMerge *merge);
Placement validate_reshape_and_cache(const pa_reshape_and_cache_args &args, ValidatedWrite *write);
Placement validate_rope_and_cache(const pa_rope_and_cache_args &args, RopeAndCacheParams *params);
Placement validate_copy_blocks(const pa_copy_blocks_args &args, ValidatedCopy *copy);
Placement validate_swap_blocks(const pa_swap_blocks_args &args, ValidatedCopy *copy);
Placement validate_gather_kv(const pa_gather_kv_args &args, GatherKvParams *params);

}  // namespace pagedattn
