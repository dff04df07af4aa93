// The CPU backend's entry points.  Each finishes before it returns.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "params.h"

namespace pagedattn::cpu {

void paged_attention(const AttentionParams &params);
void merge_states(const MergeStatesParams &params);
void reshape_and_cache(const ReshapeAndCacheParams &params);
void rope_and_cache(const RopeAndCacheParams &params);
void copy_blocks(const CopyBlocksParams &params);
void gather_kv(const GatherKvParams &params);

const char *compiled_isas();  // as "generic;avx2;avx512"
const char *chosen_isa();     // one of them; PAGEDATTN_CPU_ISA forces one
const char *kernel_table();   // lines of "operation\tcase\tkernel"

int num_threads();
void set_num_threads(int n);  // n >= 1

}  // namespace pagedattn::cpu
