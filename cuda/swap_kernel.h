// The kernel that swaps scattered blocks; see swap_kernel.cu.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "block_runs.h"
#include "params.h"

namespace pagedattn::cuda {

// The device must be able to reach all caches by their addresses.
void swap_by_kernel(const CopyBlocksParams &params, const BlockRuns &runs, int64_t num_warps, cudaStream_t stream);

}  // namespace pagedattn::cuda
