// What is wrong with an operation's index values: lengths, block tables, slots, block pairs.
//
// SPDX-License-Identifier: Apache-2.0
//
// Validation looks at shapes; these functions look at values.  The index pointers of `params` must point to host
// memory: CPU calls come here every time, checked CUDA calls with copies.  Each returns "" or the message of the first
// bad entry, without the "operation: " before it.  They cost O(entries); attention's and gather_kv's allocate nothing.
#pragma once

#include <string>

#include "params.h"

namespace pagedattn {

// Table entries that no row reads may hold anything: those past ceil(seq_len / S), those wholly before the window, and
// all of a sequence without query tokens.  A seq_len of 0 is a padded sequence, whose rows see no key.
std::string attention_index_error(const AttentionParams &params);

std::string reshape_and_cache_index_error(const ReshapeAndCacheParams &params);

// Positions too: every token's, also of one without a slot, must be in the table of cosines and sines.
std::string rope_and_cache_index_error(const RopeAndCacheParams &params);

// Source and destination are the same caches, so a block that is written must not be read either.
std::string copy_blocks_index_error(const CopyBlocksParams &params);

// `narrow`, unless null, has room for all pairs: it gets them as numbers of 32 bits, if the blocks have such.
std::string swap_blocks_index_error(const CopyBlocksParams &params, int32_t *narrow = nullptr);

std::string gather_kv_index_error(const GatherKvParams &params);

}  // namespace pagedattn
