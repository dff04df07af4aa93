// torch's tensors, read by DLPack's table of C functions: `__dlpack__` takes 5 us a tensor.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "bindings/dlpack_abi.h"

namespace pagedattn::bindings {

// What a plain tensor looks at, valid until torch runs again.  None for other objects, for tensors of a subclass or
// that torch would not export, and where torch has no such table (before 2.10).
std::optional<dlpack::Tensor> view_of_torch_tensor(pybind11::handle object);

// torch's current stream of a CUDA device.
std::intptr_t torch_stream(int device);

}  // namespace pagedattn::bindings
