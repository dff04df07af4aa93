// Starting while the kernels before end, for kernels that are built for every device.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace pagedattn::cuda {

// Waits until the kernels before this one have finished and their memory is visible: the first thing that every thread
// of a kernel does which is launched to start earlier (launch.h).  Devices before Hopper start none earlier.  A kernel
// that waits ends behind all that came before it in its stream, so whoever waits for the last of many such waits for
// all.
__device__ inline void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace pagedattn::cuda
