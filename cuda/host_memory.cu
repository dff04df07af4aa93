// Page-locked host memory and its uses.
//
// SPDX-License-Identifier: Apache-2.0
//
// Freeing page-locked memory under a running copy is a write into somebody else's memory.  So each swap leaves an event
// in the allocations that it touches, and freeing waits for the events that have not passed.  Each use has an event of
// its own, because streams come and go and their handles are used again; events that have passed are taken first.  To
// ask for that takes longer than to record an event, so a swap that has an event for its pairs leaves that.
#include <algorithm>
#include <map>
#include <string>

#include "cuda_backend.h"
#include "host_memory.h"
#include "status.h"

namespace pagedattn::cuda {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<const char *, std::shared_ptr<HostAllocation>> allocations;  // by their first byte
};

// Never destroyed: arrays may outlive the library's static objects.
Registry &registry() {
  static auto *const all = new Registry;
  return *all;
}

}  // namespace

bool Event::passed() const {
  const RelaxedCapture relaxed;
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) return false;
  check_cuda(error, "cudaEventQuery");
  return true;
}

HostAllocation::HostAllocation(size_t bytes) : bytes_(bytes) {
  const RelaxedCapture relaxed;
  void *data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
  // The only value that can be invalid is the size, where no address space has room for it.
  if (error == cudaErrorMemoryAllocation || error == cudaErrorInvalidValue) {
    cudaGetLastError();
    throw Error(PA_ERROR_OUT_OF_MEMORY, std::to_string(bytes) + " bytes of page-locked memory could not be allocated");
  }
  check_cuda(error, "cudaHostAlloc");
  data_ = static_cast<char *>(data);
}

HostAllocation::~HostAllocation() {
  const RelaxedCapture relaxed;
  const auto wait = [](const Event &event) {
    try {
      event.wait();
    } catch (const Error &) {
      // The device is lost or the process ends: then no copy runs any more.
    }
  };
  for (const auto &event : own_events_) wait(*event);
  for (const auto &event : others_events_) wait(*event);
  cudaFreeHost(data_);
  cudaGetLastError();
}

void HostAllocation::used_on(cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  for (const auto &event : own_events_) {
    if (event->of_current_device() && event->passed()) return event->record(stream);
  }
  auto event = std::make_unique<Event>();
  event->record(stream);
  own_events_.push_back(std::move(event));
}

void HostAllocation::used_until(const std::shared_ptr<Event> &event) {
  const std::lock_guard lock(mutex_);
  const auto known = std::find(others_events_.begin(), others_events_.end(), event);
  if (known == others_events_.end()) others_events_.push_back(event);
}

std::shared_ptr<HostAllocation> find_host_allocation(const void *address) {
  Registry &all = registry();
  const std::lock_guard lock(all.mutex);
  auto behind = all.allocations.upper_bound(static_cast<const char *>(address));
  if (behind == all.allocations.begin()) return nullptr;
  const auto &candidate = std::prev(behind)->second;
  return candidate->holds(address) ? candidate : nullptr;
}

void *allocate_host_memory(size_t bytes) {
  auto allocation = std::make_shared<HostAllocation>(bytes);
  char *const data = allocation->data();
  Registry &all = registry();
  const std::lock_guard lock(all.mutex);
  all.allocations.emplace(data, std::move(allocation));
  return data;
}

void free_host_memory(void *data) {
  std::shared_ptr<HostAllocation> last;  // its end may wait, for which others must not
  Registry &all = registry();
  {
    const std::lock_guard lock(all.mutex);
    const auto found = all.allocations.find(static_cast<const char *>(data));
    if (found == all.allocations.end()) throw_invalid("`data` must be what host_alloc gave and nobody has freed");
    last = std::move(found->second);
    all.allocations.erase(found);
  }
}

}  // namespace pagedattn::cuda
