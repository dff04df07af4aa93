// The exceptions of pagedattn._errors, thrown from C++.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "pagedattn/pagedattn.h"

namespace pagedattn::bindings {

// Throws the Python exception that a failed call's status stands for.
void raise_on_error(pa_status status, const pa_error &error);
[[noreturn]] void raise_invalid(const std::string &message);

}  // namespace pagedattn::bindings
