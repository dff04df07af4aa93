// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensor_checks.h"
#include "validate.h"

namespace pagedattn {

// `check_mode` as in the C header: 1, 0, or -1 for what PAGEDATTN_CHECK says.
Placement placement_of(const Checker &check, int32_t check_mode);

}  // namespace pagedattn
