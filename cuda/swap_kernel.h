// The kernels that swap scattered blocks; see swap_kernel.cu and swap_bulk.cu.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "block_runs.h"
#include "params.h"
#include "swap_pairs.h"

namespace pagedattn::cuda {

// The device must be able to reach all caches by their addresses.
void swap_by_kernel(const CopyBlocksParams &params, const BlockRuns &runs, SwapPairs *pairs, int64_t num_warps,
                    cudaStream_t stream);

// Between host and device: blocks that lie in one piece, in accesses of 16 bytes, on a device that has the engine.
bool bulk_kernel_serves(const CopyBlocksParams &params, const BlockRuns &runs);
void swap_by_bulk_kernel(const CopyBlocksParams &params, const BlockRuns &runs, SwapPairs *pairs, int64_t num_warps,
                         cudaStream_t stream);

}  // namespace pagedattn::cuda
