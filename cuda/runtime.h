// CUDA runtime calls with their errors turned into pagedattn::Error, and the facts of the current device.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace pagedattn::cuda {

// Throws PA_ERROR_OUT_OF_MEMORY, PA_ERROR_NO_DEVICE or PA_ERROR_CUDA with `what` and CUDA's own words, and clears the
// error where it can be cleared.
[[noreturn]] void throw_cuda_error(cudaError_t error, const char *what);

inline void check_cuda(cudaError_t error, const char *what) {
  if (error != cudaSuccess) throw_cuda_error(error, what);
}

// A function of the driver, found at run time: the library links no libcuda.
void *find_driver_function(const char *name);
template <class Function>
Function driver_function(const char *name) {
  return reinterpret_cast<Function>(find_driver_function(name));
}

// To be called right behind a launch.
inline void check_launch(const char *kernel) { check_cuda(cudaGetLastError(), kernel); }

struct DeviceFacts {
  int compute_capability = 0;  // 10 * major + minor
  int num_multiprocessors = 0;
  int max_shared_memory_per_block = 0;  // bytes, after opting in
  size_t l2_cache_size = 0;             // bytes
};

// The device that the operation's DeviceGuard made current, and its facts, which are read once.  Neither costs a call
// of the runtime.
int current_device();
const DeviceFacts &device_facts();

// Whether what is enqueued on the stream goes into a graph.
bool is_capturing(cudaStream_t stream);

// Lets the calling thread allocate, free and query while some stream is being captured, which none has to do with.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture &) = delete;
  RelaxedCapture &operator=(const RelaxedCapture &) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Memory from the stream-ordered allocator, given back to the stream at the end of the scope.  What no call uses stays
// with the library.
class StreamMemory {
 public:
  StreamMemory(size_t bytes, cudaStream_t stream);
  ~StreamMemory();
  StreamMemory(const StreamMemory &) = delete;
  StreamMemory &operator=(const StreamMemory &) = delete;
  void *data() const { return data_; }

 private:
  void *data_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

}  // namespace pagedattn::cuda
