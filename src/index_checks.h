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

// `packed`, unless null, has room for the pairs as devices take them: in groups of 16 bytes, the sources of some pairs
// side by side and then their destinations, in numbers of packed_number_bytes; which pairs share a group is open.
std::string swap_blocks_index_error(const CopyBlocksParams &params, void *packed = nullptr);

// 2 or 4, as the numbers of the blocks allow; 0 if they need more, and no pair is packed.
int packed_number_bytes(const CopyBlocksParams &params);

std::string gather_kv_index_error(const GatherKvParams &params);

}  // namespace pagedattn
