// The CUDA runtime as the operations see it: which device is current, what it can do, and errors in words.
//
// SPDX-License-Identifier: Apache-2.0
//
// Nothing here runs when the library is loaded: the first call that is given CUDA memory looks for the driver.  A
// search that fails is repeated by the next call, a search that succeeds is kept for the life of the process.
#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "cuda_backend.h"
#include "runtime.h"
#include "status.h"

namespace pagedattn::cuda {
namespace {

constexpr int kLeastComputeCapability = 80;

// "13.0" from 13000, the way cudaDriverGetVersion and __CUDACC_VER_MAJOR__ count.
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// A runtime runs on every driver of its own major version (CUDA's minor-version compatibility).
std::string needed_driver() { return "CUDA " + version_text(CUDART_VERSION / 1000 * 1000) + " or later"; }

std::string compute_capability_text(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// Why there is no device, with what to do about it.
[[noreturn]] void throw_no_device(cudaError_t error, int driver_version) {
  std::string message;
  if (driver_version == 0) {
    message = "no CUDA driver was found (libcuda.so.1 is missing or cannot be loaded); install an NVIDIA driver for " +
              needed_driver() + ", or pass host arrays";
  } else if (error == cudaErrorInsufficientDriver) {
    message = "the NVIDIA driver is too old: it serves CUDA " + version_text(driver_version) +
              ", and this build of pagedattn needs " + needed_driver() + "; update the driver, or pass host arrays";
  } else if (error == cudaErrorNoDevice) {
    message = "the CUDA driver found no device";
    if (const char *visible = std::getenv("CUDA_VISIBLE_DEVICES")) {
      message += " (CUDA_VISIBLE_DEVICES is \"" + std::string(visible) + "\")";
    }
  } else {
    message = std::string("the CUDA driver could not be started: ") + cudaGetErrorString(error) + " (" +
              cudaGetErrorName(error) + ")";
  }
  throw Error(PA_ERROR_NO_DEVICE, message);
}

int count_devices() {
  int driver_version = 0;
  cudaError_t error = cudaDriverGetVersion(&driver_version);
  int count = 0;
  if (error == cudaSuccess) error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) error = cudaErrorNoDevice;
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw_no_device(error, driver_version);
  }
  return count;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

DeviceFacts read_facts(int device) {
  DeviceFacts facts;
  facts.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  facts.num_multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  facts.max_shared_memory_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  facts.l2_cache_size = static_cast<size_t>(attribute(cudaDevAttrL2CacheSize, device));
  return facts;
}

// The facts of every device, read together at first use.  If reading throws, the next call tries again.
const std::vector<DeviceFacts> &all_devices() {
  static const std::vector<DeviceFacts> devices = [] {
    std::vector<DeviceFacts> facts;
    const int count = count_devices();
    for (int device = 0; device < count; ++device) facts.push_back(read_facts(device));
    return facts;
  }();
  return devices;
}

// The device of the operation that the calling thread is in, so that nothing in it asks the runtime again.
thread_local int guarded_device = 0;
thread_local const DeviceFacts *guarded_facts = nullptr;

void require_device(int device) {
  const int count = device_count();
  if (device >= 0 && device < count) return;
  throw Error(
      PA_ERROR_NO_DEVICE,
      "there is no CUDA device " + std::to_string(device) + "; this process sees " +
          (count == 1 ? "one, device 0" : std::to_string(count) + ", devices 0 ... " + std::to_string(count - 1)));
}

pa_status status_of(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return PA_ERROR_OUT_OF_MEMORY;
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorInitializationError:
    case cudaErrorDevicesUnavailable:
    case cudaErrorStubLibrary:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return PA_ERROR_NO_DEVICE;
    default:
      return PA_ERROR_CUDA;
  }
}

// The device's default pool would give free memory back at every synchronisation, and the next call ask for it anew.
cudaMemPool_t create_scratch_pool(int device) {
  const RelaxedCapture relaxed;
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location = {cudaMemLocationTypeDevice, device};
  cudaMemPool_t pool = nullptr;
  check_cuda(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
  uint64_t kept_bytes = UINT64_MAX;
  const cudaError_t error = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept_bytes);
  if (error == cudaSuccess) return pool;
  cudaMemPoolDestroy(pool);
  throw_cuda_error(error, "cudaMemPoolSetAttribute");
}

cudaMemPool_t scratch_pool() {
  static std::mutex mutex;
  static auto *const pools = new std::map<int, cudaMemPool_t>;  // never destroyed: CUDA may be gone by then
  const std::lock_guard lock(mutex);
  cudaMemPool_t &pool = (*pools)[guarded_device];
  if (pool == nullptr) pool = create_scratch_pool(guarded_device);
  return pool;
}

}  // namespace

void require_usable_device(int device) {
  require_device(device);
  const int capability = all_devices()[static_cast<size_t>(device)].compute_capability;
  if (capability >= kLeastComputeCapability) return;
  throw Error(PA_ERROR_NO_DEVICE, "CUDA device " + std::to_string(device) + " has compute capability " +
                                      compute_capability_text(capability) + "; pagedattn needs " +
                                      compute_capability_text(kLeastComputeCapability) + " or later");
}

void throw_cuda_error(cudaError_t error, const char *what) {
  cudaGetLastError();  // An error that is not sticky must not surface again in somebody else's call.
  std::string message = std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    message += std::string("; pagedattn was built for the architectures ") + architectures();
  }
  throw Error(status_of(error), message);
}

void *find_driver_function(const char *name) {
  void *entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check_cuda(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found),
             "cudaGetDriverEntryPointByVersion");
  if (entry == nullptr || found != cudaDriverEntryPointSuccess) {
    throw Error(PA_ERROR_CUDA, std::string("the CUDA driver has no ") + name + "; update the driver");
  }
  return entry;
}

int current_device() { return guarded_device; }

const DeviceFacts &device_facts() { return *guarded_facts; }

bool is_capturing(cudaStream_t stream) {
  // The driver answers in a third of the runtime's time, to a thread that has a context.
  static const auto ask = driver_function<decltype(&cuStreamIsCapturing)>("cuStreamIsCapturing");
  CUstreamCaptureStatus driver_status = CU_STREAM_CAPTURE_STATUS_NONE;
  if (ask(stream, &driver_status) == CUDA_SUCCESS) return driver_status != CU_STREAM_CAPTURE_STATUS_NONE;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  // The legacy stream while another stream is being captured.
  if (error != cudaErrorStreamCaptureImplicit) check_cuda(error, "cudaStreamIsCapturing");
  cudaGetLastError();
  return true;
}

StreamMemory::StreamMemory(size_t bytes, cudaStream_t stream) : stream_(stream) {
  if (bytes == 0) return;
  const cudaError_t error = cudaMallocFromPoolAsync(&data_, bytes, scratch_pool(), stream);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw Error(PA_ERROR_OUT_OF_MEMORY,
                "out of CUDA memory: " + std::to_string(bytes) + " bytes of scratch memory could not be allocated");
  }
  check_cuda(error, "cudaMallocFromPoolAsync");
}

// A destructor cannot report; an error that matters comes back from the next call on the stream.
StreamMemory::~StreamMemory() {
  if (data_ != nullptr) cudaFreeAsync(data_, stream_);
}

DeviceGuard::DeviceGuard(int device) {
  require_usable_device(device);
  int current = 0;
  check_cuda(cudaGetDevice(&current), "cudaGetDevice");
  guarded_device = device;
  guarded_facts = &all_devices()[static_cast<size_t>(device)];
  if (current == device) return;
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

int device_count() { return static_cast<int>(all_devices().size()); }

void device_info(int device, pa_device_info *info) {
  require_device(device);
  pa_device_info filled = {};
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  std::memcpy(filled.name, properties.name, std::min(std::strlen(properties.name), sizeof filled.name - 1));
  check_cuda(cudaDriverGetVersion(&filled.driver_version), "cudaDriverGetVersion");
  check_cuda(cudaRuntimeGetVersion(&filled.runtime_version), "cudaRuntimeGetVersion");
  const DeviceFacts &facts = all_devices()[static_cast<size_t>(device)];
  filled.compute_capability = facts.compute_capability;
  filled.num_multiprocessors = facts.num_multiprocessors;
  filled.total_memory = static_cast<int64_t>(properties.totalGlobalMem);
  filled.l2_cache_size = static_cast<int64_t>(facts.l2_cache_size);
  // A caller compiled against an older header has room for the first fields only.
  filled.struct_size = info->struct_size;
  std::memcpy(info, &filled, std::min(filled.struct_size, sizeof filled));
}

int compiler_version() { return 1000 * __CUDACC_VER_MAJOR__ + 10 * __CUDACC_VER_MINOR__; }

const char *architectures() { return PAGEDATTN_CUDA_ARCHITECTURES; }

// A kernel's name is what record_kernel() reports; the cases say what makes the launcher choose it.
const char *kernel_table() {
  static const std::string table = std::string(attention_kernel_table()) +
                                   "merge_states\t16-byte aligned heads\tcuda::merge_states_vector\n"
                                   "merge_states\tany other\tcuda::merge_states_scalar\n"
                                   "reshape_and_cache\tcache of the source's type\tcuda::reshape_and_cache_copy\n"
                                   "reshape_and_cache\tfloat8 cache\tcuda::reshape_and_cache_quantize\n"
                                   "copy_blocks\tcontiguous blocks\tcuda::copy_blocks_contiguous\n"
                                   "copy_blocks\tstrided blocks\tcuda::copy_blocks_strided\n"
                                   "swap_blocks\tfew large copies, captured calls\tcuda::swap_blocks_memcpy\n"
                                   "swap_blocks\tscattered blocks, host and sm_90\tcuda::swap_blocks_bulk\n"
                                   "swap_blocks\tany other scattered blocks\tcuda::swap_blocks_kernel\n"
                                   "swap_blocks\tpageable host memory (slower)\tcuda::swap_blocks_pageable\n"
                                   "swap_blocks\tPAGEDATTN_SWAP=batch\tcuda::swap_blocks_batch\n"
                                   "rope_and_cache\tcache of the source's type\tcuda::rope_and_cache_copy\n"
                                   "rope_and_cache\tfloat8 cache\tcuda::rope_and_cache_quantize\n"
                                   "gather_kv\toutput of the cache's type\tcuda::gather_kv_copy\n"
                                   "gather_kv\twider output of a float8 cache\tcuda::gather_kv_dequantize\n";
  return table.c_str();
}

}  // namespace pagedattn::cuda
