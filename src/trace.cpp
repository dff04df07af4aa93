// Which kernel ran: pa_last_kernel and PAGEDATTN_TRACE=1.
//
// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "pagedattn/pagedattn.h"
#include "status.h"

namespace pagedattn {

namespace {

thread_local const char *last_kernel = "";

bool tracing() {
  static const bool on = [] {
    const char *value = std::getenv("PAGEDATTN_TRACE");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return on;
}

}  // namespace

void record_kernel(const char *operation, const char *kernel) {
  last_kernel = kernel;
  if (tracing()) std::fprintf(stderr, "pagedattn: %s: %s\n", operation, kernel);
}

}  // namespace pagedattn

extern "C" const char *pa_last_kernel(void) { return pagedattn::last_kernel; }
