// The choice of instruction set.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels/kernels.h"

namespace pagedattn::cpu {

// The kernels of the widest instruction set that is compiled in and that this processor has and gains by, or of the one
// that PAGEDATTN_CPU_ISA names.  Throws if that name is unknown or cannot run here.
const Kernels &kernels();

// Whether to copy with stream_run: where there is more than caches keep until somebody reads it, in runs long enough to
// make up for writing lines in parts at their ends.
constexpr bool worth_streaming(int64_t all_bytes, int64_t run_bytes) {
  return all_bytes >= int64_t{8} << 20 && run_bytes >= 1024;
}

}  // namespace pagedattn::cpu
