// SPDX-License-Identifier: Apache-2.0
#include "placement.h"

#include <cstdlib>
#include <cstring>

namespace pagedattn {

namespace {

bool checked_mode_of_environment() {
  const char *value = std::getenv("PAGEDATTN_CHECK");
  return value != nullptr && std::strcmp(value, "") != 0 && std::strcmp(value, "0") != 0;
}

}  // namespace

Placement placement_of(const Checker &check, int32_t check_mode) {
  Placement placement;
  placement.on_cuda = check.on_cuda();
  placement.device_id = check.device_id();
  placement.check_indices =
      !placement.on_cuda || check_mode == 1 || (check_mode == -1 && checked_mode_of_environment());
  return placement;
}

}  // namespace pagedattn
