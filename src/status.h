// Errors inside the library: an exception that carries a C status, thrown by validation and by the backends and turned
// into (status, message) at the C boundary.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

#include "pagedattn/pagedattn.h"

namespace pagedattn {

class Error : public std::runtime_error {
 public:
  Error(pa_status status, const std::string &message) : std::runtime_error(message), status_(status) {}
  pa_status status() const { return status_; }

 private:
  pa_status status_;
};

[[noreturn]] inline void throw_invalid(const std::string &message) { throw Error(PA_ERROR_INVALID_ARGUMENT, message); }

// Remembers which kernel served the calling thread's operation (pa_last_kernel); prints it where PAGEDATTN_TRACE=1.
// `kernel` must be a static string.
void record_kernel(const char *operation, const char *kernel);

}  // namespace pagedattn
