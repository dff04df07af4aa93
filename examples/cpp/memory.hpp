// Memory of the example: an array on the host or, where the CUDA runtime was found, on the GPU.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <pagedattn/pagedattn.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef EXAMPLE_HAS_CUDA
#include <cuda_runtime_api.h>

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}
#endif

// Owns a copy of `host` on `device`.
template <class T>
class Memory {
 public:
  Memory(const std::vector<T> &host, pagedattn::Device device) : size_(host.size()), device_(device) {
    if (device.type == PA_CPU) {
      host_ = pagedattn::HostBuffer<T>(size_);
      std::copy(host.begin(), host.end(), host_.begin());
      data_ = host_.data();
      return;
    }
#ifdef EXAMPLE_HAS_CUDA
    check_cuda(cudaMalloc(reinterpret_cast<void **>(&data_), size_ * sizeof(T)));
    check_cuda(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
#else
    throw std::runtime_error("this example was built without the CUDA runtime");
#endif
  }
  ~Memory() {
#ifdef EXAMPLE_HAS_CUDA
    if (device_.type == PA_CUDA) cudaFree(data_);
#endif
  }
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;

  T *data() { return data_; }
  const T *data() const { return data_; }

  // Waits for the GPU, where there is one to wait for.
  std::vector<T> to_host() const {
    std::vector<T> host(size_);
    if (device_.type == PA_CPU) std::copy(data_, data_ + size_, host.begin());
#ifdef EXAMPLE_HAS_CUDA
    if (device_.type == PA_CUDA) check_cuda(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
#endif
    return host;
  }

 private:
  pagedattn::HostBuffer<T> host_;
  T *data_ = nullptr;
  std::size_t size_;
  pagedattn::Device device_;
};
