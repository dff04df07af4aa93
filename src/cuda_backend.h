// The CUDA backend's entry points, defined in cuda/ where CUDA is built.  No CUDA header is needed to include this.
//
// SPDX-License-Identifier: Apache-2.0
//
// `stream` is a cudaStream_t.  Each call enqueues and returns; the caller has made `device` current (DeviceGuard).
// CUDA failures throw pagedattn::Error with PA_ERROR_CUDA, PA_ERROR_NO_DEVICE or PA_ERROR_OUT_OF_MEMORY.
#pragma once

#include <cstddef>
#include <string>

#include "pagedattn/pagedattn.h"
#include "params.h"

namespace pagedattn::cuda {

// Makes a device current for a scope.  Throws PA_ERROR_NO_DEVICE, with the mend, where there is no driver or device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;

 private:
  int previous_ = -1;
};

void paged_attention(const AttentionParams &params, void *stream);
size_t paged_attention_workspace_size(const AttentionParams &params);
void merge_states(const MergeStatesParams &params, void *stream);
void reshape_and_cache(const ReshapeAndCacheParams &params, void *stream);
void rope_and_cache(const RopeAndCacheParams &params, void *stream);
void copy_blocks(const CopyBlocksParams &params, void *stream);  // mapping on the device
void swap_blocks(const CopyBlocksParams &params, void *stream);  // mapping on the host; any direction
void gather_kv(const GatherKvParams &params, void *stream);

// Checked mode: read the index values on the device, synchronise, and return "" or what is wrong with the first bad
// entry, worded like the CPU's message without the "operation: " before it (e.g. "`seq_lens`[3] must be in 0 ... 1024;
// got -1").  Throw PA_ERROR_INVALID_ARGUMENT if the stream is being captured.
std::string check_attention(const AttentionParams &params, void *stream);
std::string check_reshape_and_cache(const ReshapeAndCacheParams &params, void *stream);
std::string check_rope_and_cache(const RopeAndCacheParams &params, void *stream);
std::string check_copy_blocks(const CopyBlocksParams &params, void *stream);
std::string check_gather_kv(const GatherKvParams &params, void *stream);

// Page-locked memory of the current device.  Freeing waits for the swaps that use it.
void *allocate_host_memory(size_t bytes);
void free_host_memory(void *data);

// Throws PA_ERROR_NO_DEVICE, with the reason, where the device cannot be used.  Cheap after the first call.
void require_usable_device(int device);
int device_count();  // throws PA_ERROR_NO_DEVICE with the reason where there is no driver or no device
void device_info(int device, pa_device_info *info);
int compiler_version();       // 13000 for CUDA 13.0
const char *architectures();  // CMake's list
const char *kernel_table();   // lines of "operation\tcase\tkernel"

}  // namespace pagedattn::cuda
