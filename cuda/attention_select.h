// Which attention kernels serve a call.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "attention_kernel.h"
#include "params.h"

namespace pagedattn::cuda {

// Query rows a KV head that a sequence of the call may have.
int64_t most_rows(const AttentionParams &params);

struct AttentionLaunch {
  const AttentionKernel *kernel = nullptr;
  const HopperKernel *hopper = nullptr;  // that the kernel is of, or null
  int min_rows = 1;                      // a KV head of the sequences that it serves
  int max_rows = 1 << 30;
};

struct AttentionSelection {
  const char *name;
  int num_launches;
  AttentionLaunch launches[2];
};

// The kernels of Hopper ask for more of the arrays' addresses and strides than the generic ones.
enum class ArrayAlignment { kAsGiven, kAssumedGood, kAssumedBad };

// Throws PA_ERROR_INVALID_ARGUMENT if the environment variable PAGEDATTN_CUDA_ARCH matters and holds what it must not.
AttentionSelection select_attention(const AttentionParams &params, ArrayAlignment alignment = ArrayAlignment::kAsGiven);

}  // namespace pagedattn::cuda
