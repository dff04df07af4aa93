// The choice of instruction set.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels/kernels.h"

namespace pagedattn::cpu {

// The kernels of the widest instruction set that is compiled in and that this processor has, or of the one that
// PAGEDATTN_CPU_ISA names.  Throws if that name is unknown or cannot run here.
const Kernels &kernels();

}  // namespace pagedattn::cpu
