// Page-locked host memory: allocated here, and never freed before the swaps that use it have ended.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime.h"

namespace pagedattn::cuda {

// An event of the current device (DeviceGuard), without timing.
class Event {
 public:
  Event() { check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event &) = delete;
  Event &operator=(const Event &) = delete;

  void record(cudaStream_t stream) { check_cuda(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  bool of_current_device() const { return device_ == current_device(); }
  bool passed() const;
  void wait() const { check_cuda(cudaEventSynchronize(event_), "cudaEventSynchronize"); }

 private:
  cudaEvent_t event_ = nullptr;
  int device_ = current_device();
};

// One allocation of allocate_host_memory, and the swaps under way in it.
class HostAllocation {
 public:
  explicit HostAllocation(size_t bytes);
  ~HostAllocation();  // waits for every use
  HostAllocation(const HostAllocation &) = delete;
  HostAllocation &operator=(const HostAllocation &) = delete;

  char *data() const { return data_; }
  bool holds(const void *address) const { return address >= data_ && address < data_ + bytes_; }
  // What has been enqueued on `stream` so far uses this memory.
  void used_on(cudaStream_t stream);
  // The same of what comes before an event, which others may record anew once it has passed.
  void used_until(const std::shared_ptr<Event> &event);

 private:
  char *data_ = nullptr;
  size_t bytes_ = 0;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Event>> own_events_;
  std::vector<std::shared_ptr<Event>> others_events_;
};

// The allocation that an address lies in, or null.  Whoever holds it keeps it from being freed.
std::shared_ptr<HostAllocation> find_host_allocation(const void *address);

}  // namespace pagedattn::cuda
