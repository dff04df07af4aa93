// Launches kernels by the driver's own function, which costs the host less than the runtime's.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <type_traits>

namespace pagedattn::cuda {

// Whether a kernel's blocks may start while the kernels before it end.  It then waits by itself before it touches
// memory (overlap.cuh, wait_for_kernels_before).
enum class EarlyStart {
  kNever,
  // It costs the host less.  A graph's host has no such cost, and there the kernel ends 0.1 to 0.2 us later behind one
  // that does not let others start.
  kUnlessCaptured,
  kAlways,
};

struct Launch {
  const char *name;  // for messages
  dim3 grid;
  dim3 block;
  size_t shared_memory;  // bytes
  cudaStream_t stream;
  EarlyStart early_start;
};

void launch_kernel(const Launch &launch, const void *kernel, void **arguments);

template <class... Parameters>
void launch_kernel(const Launch &launch, void (*kernel)(Parameters...),
                   const std::type_identity_t<Parameters> &...arguments) {
  void *pointers[] = {const_cast<Parameters *>(&arguments)...};
  launch_kernel(launch, reinterpret_cast<const void *>(kernel), pointers);
}

}  // namespace pagedattn::cuda
