// The C entry points: validate, verify index values, hand to the CPU or the CUDA backend.
//
// SPDX-License-Identifier: Apache-2.0
//
// Nothing throws past this file: `guarded` turns every exception into a status and a message.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <string>

#include "cpu/backend.h"
#include "index_checks.h"
#include "status.h"
#include "validate.h"

#if PAGEDATTN_HAS_CUDA
#include "cuda_backend.h"
#endif

namespace pagedattn {

namespace {

// Messages begin with the operation's name, also those from where nobody knows it (devices, memory).  Allocates
// nothing: memory may be what is missing.
void set_message(pa_error *error, const char *operation, const char *message) {
  if (error == nullptr) return;
  const size_t length = std::strlen(operation);
  const bool named = std::strncmp(message, operation, length) == 0 && message[length] == ':';
  std::snprintf(error->message, sizeof error->message, named ? "%.0s%s" : "%s: %s", operation, message);
}

template <class Body>
pa_status guarded(const char *operation, pa_error *error, Body &&body) noexcept {
  try {
    if (error != nullptr) error->message[0] = '\0';
    body();
    return PA_OK;
  } catch (const Error &e) {
    set_message(error, operation, e.what());
    return e.status();
  } catch (const std::bad_alloc &) {
    set_message(error, operation, "out of host memory");
    return PA_ERROR_OUT_OF_MEMORY;
  } catch (const std::exception &e) {
    set_message(error, operation, e.what());
    return PA_ERROR_INTERNAL;
  } catch (...) {
    set_message(error, operation, "an unknown C++ exception");
    return PA_ERROR_INTERNAL;
  }
}

// The caller's struct, which an older header may have made shorter, over the defaults.
template <class Args>
Args complete(const char *operation, const Args *given, void (*init)(Args *)) {
  if (given == nullptr) throw_invalid(std::string(operation) + ": `args` is NULL");
  if (given->struct_size < sizeof(size_t) || given->struct_size > sizeof(Args)) {
    throw_invalid(std::string(operation) + ": `struct_size` must be set by the *_init function and at most " +
                  std::to_string(sizeof(Args)) + "; got " + std::to_string(given->struct_size));
  }
  Args args;
  if (given->struct_size < sizeof(Args)) init(&args);
  std::memcpy(static_cast<void *>(&args), given, given->struct_size);
  return args;
}

void throw_if_bad(const char *operation, const std::string &fault) {
  if (!fault.empty()) throw_invalid(std::string(operation) + ": " + fault);
}

// Runs an operation's CPU or CUDA half, wherever its tensors are.
template <class Cpu, class Cuda>
void dispatch(const Placement &placement, Cpu &&cpu, Cuda &&on_cuda) {
  if (!placement.on_cuda) {
    cpu();
    return;
  }
#if PAGEDATTN_HAS_CUDA
  const cuda::DeviceGuard guard(placement.device_id);
  on_cuda();
#else
  (void)on_cuda;
  throw Error(PA_ERROR_INTERNAL, "CUDA memory reached a build without CUDA");
#endif
}

}  // namespace

}  // namespace pagedattn

// The CUDA half of a dispatch, empty where there is none.
#if PAGEDATTN_HAS_CUDA
#define PA_ON_CUDA(...) [&] { __VA_ARGS__; }
#else
#define PA_ON_CUDA(...) [&] {}
#endif

using namespace pagedattn;

extern "C" {

void pa_attention_args_init(pa_attention_args *args) {
  *args = {};
  args->struct_size = sizeof *args;
  args->scale = std::numeric_limits<double>::quiet_NaN();
  args->k_scale_value = 1.0;
  args->v_scale_value = 1.0;
  args->q_scale_value = 1.0;
  args->causal = 1;
  args->check = -1;
}

void pa_merge_states_args_init(pa_merge_states_args *args) {
  *args = {};
  args->struct_size = sizeof *args;
}

void pa_reshape_and_cache_args_init(pa_reshape_and_cache_args *args) {
  *args = {};
  args->struct_size = sizeof *args;
  args->k_scale_value = 1.0;
  args->v_scale_value = 1.0;
  args->check = -1;
  args->num_layers = 1;
}

void pa_rope_and_cache_args_init(pa_rope_and_cache_args *args) {
  *args = {};
  args->struct_size = sizeof *args;
  args->k_scale_value = 1.0;
  args->v_scale_value = 1.0;
  args->check = -1;
}

void pa_copy_blocks_args_init(pa_copy_blocks_args *args) {
  *args = {};
  args->struct_size = sizeof *args;
  args->check = -1;
}

void pa_swap_blocks_args_init(pa_swap_blocks_args *args) {
  *args = {};
  args->struct_size = sizeof *args;
}

void pa_gather_kv_args_init(pa_gather_kv_args *args) {
  *args = {};
  args->struct_size = sizeof *args;
  args->k_scale_value = 1.0;
  args->v_scale_value = 1.0;
  args->check = -1;
}

pa_status pa_paged_attention(const pa_attention_args *given, pa_error *error) {
  return guarded("paged_attention", error, [&] {
    const auto args = complete("paged_attention", given, pa_attention_args_init);
    AttentionParams p;
    const Placement placement = validate_attention(args, true, &p);
    dispatch(
        placement,
        [&] {
          throw_if_bad("paged_attention", attention_index_error(p));
          cpu::paged_attention(p);
        },
        PA_ON_CUDA(if (placement.check_indices) throw_if_bad("paged_attention", cuda::check_attention(p, args.stream));
                   cuda::paged_attention(p, args.stream)));
  });
}

pa_status pa_paged_attention_workspace_size(const pa_attention_args *given, size_t *bytes, pa_error *error) {
  return guarded("paged_attention", error, [&] {
    if (bytes == nullptr) throw_invalid("paged_attention: `bytes` is NULL");
    const auto args = complete("paged_attention", given, pa_attention_args_init);
    AttentionParams p;
    const Placement placement = validate_attention(args, false, &p);
    dispatch(placement, [&] { *bytes = 0; }, PA_ON_CUDA(*bytes = cuda::paged_attention_workspace_size(p)));
  });
}

pa_status pa_merge_states(const pa_merge_states_args *given, pa_error *error) {
  return guarded("merge_states", error, [&] {
    const auto args = complete("merge_states", given, pa_merge_states_args_init);
    ValidatedMerge merge;
    const Placement placement = validate_merge_states(args, &merge);
    dispatch(
        placement, [&] { cpu::merge_states(merge.params); }, PA_ON_CUDA(cuda::merge_states(merge.params, args.stream)));
  });
}

pa_status pa_reshape_and_cache(const pa_reshape_and_cache_args *given, pa_error *error) {
  return guarded("reshape_and_cache", error, [&] {
    const auto args = complete("reshape_and_cache", given, pa_reshape_and_cache_args_init);
    ValidatedWrite write;
    const ReshapeAndCacheParams &p = write.params;
    const Placement placement = validate_reshape_and_cache(args, &write);
    dispatch(
        placement,
        [&] {
          throw_if_bad("reshape_and_cache", reshape_and_cache_index_error(p));
          cpu::reshape_and_cache(p);
        },
        PA_ON_CUDA(if (placement.check_indices)
                       throw_if_bad("reshape_and_cache", cuda::check_reshape_and_cache(p, args.stream));
                   cuda::reshape_and_cache(p, args.stream)));
  });
}

pa_status pa_rope_and_cache(const pa_rope_and_cache_args *given, pa_error *error) {
  return guarded("rope_and_cache", error, [&] {
    const auto args = complete("rope_and_cache", given, pa_rope_and_cache_args_init);
    RopeAndCacheParams p;
    const Placement placement = validate_rope_and_cache(args, &p);
    dispatch(
        placement,
        [&] {
          throw_if_bad("rope_and_cache", rope_and_cache_index_error(p));
          cpu::rope_and_cache(p);
        },
        PA_ON_CUDA(if (placement.check_indices)
                       throw_if_bad("rope_and_cache", cuda::check_rope_and_cache(p, args.stream));
                   cuda::rope_and_cache(p, args.stream)));
  });
}

pa_status pa_copy_blocks(const pa_copy_blocks_args *given, pa_error *error) {
  return guarded("copy_blocks", error, [&] {
    const auto args = complete("copy_blocks", given, pa_copy_blocks_args_init);
    ValidatedCopy copy;
    const Placement placement = validate_copy_blocks(args, &copy);
    dispatch(
        placement,
        [&] {
          throw_if_bad("copy_blocks", copy_blocks_index_error(copy.params));
          cpu::copy_blocks(copy.params);
          record_kernel("copy_blocks", "cpu_copy_blocks");
        },
        PA_ON_CUDA(if (placement.check_indices)
                       throw_if_bad("copy_blocks", cuda::check_copy_blocks(copy.params, args.stream));
                   cuda::copy_blocks(copy.params, args.stream)));
  });
}

pa_status pa_swap_blocks(const pa_swap_blocks_args *given, pa_error *error) {
  return guarded("swap_blocks", error, [&] {
    const auto args = complete("swap_blocks", given, pa_swap_blocks_args_init);
    ValidatedCopy copy;
    const Placement placement = validate_swap_blocks(args, &copy);
    dispatch(
        placement,
        [&] {
          throw_if_bad("swap_blocks", swap_blocks_index_error(copy.params));
          cpu::copy_blocks(copy.params);
          record_kernel("swap_blocks", "cpu_copy_blocks");
        },
        PA_ON_CUDA(cuda::swap_blocks(copy.params, args.stream)));
  });
}

pa_status pa_host_alloc(size_t bytes, int32_t device, void **data, pa_error *error) {
  return guarded("host_alloc", error, [&] {
    if (data == nullptr) throw_invalid("host_alloc: `data` is NULL");
    *data = nullptr;
    if (bytes == 0) throw_invalid("host_alloc: `bytes` must be at least 1; got 0");
#if PAGEDATTN_HAS_CUDA
    const cuda::DeviceGuard guard(device);
    *data = cuda::allocate_host_memory(bytes);
#else
    (void)device;
    throw Error(PA_ERROR_UNSUPPORTED, "this build of pagedattn has no CUDA kernels, and page-locked memory serves none");
#endif
  });
}

pa_status pa_host_free(void *data, pa_error *error) {
  return guarded("host_free", error, [&] {
    if (data == nullptr) return;
#if PAGEDATTN_HAS_CUDA
    cuda::free_host_memory(data);
#else
    throw_invalid("`data` must be what host_alloc gave and nobody has freed");
#endif
  });
}

pa_status pa_gather_kv(const pa_gather_kv_args *given, pa_error *error) {
  return guarded("gather_kv", error, [&] {
    const auto args = complete("gather_kv", given, pa_gather_kv_args_init);
    GatherKvParams p;
    const Placement placement = validate_gather_kv(args, &p);
    dispatch(
        placement,
        [&] {
          throw_if_bad("gather_kv", gather_kv_index_error(p));
          cpu::gather_kv(p);
        },
        PA_ON_CUDA(if (placement.check_indices) throw_if_bad("gather_kv", cuda::check_gather_kv(p, args.stream));
                   cuda::gather_kv(p, args.stream)));
  });
}

pa_status pa_get_num_threads(int32_t *num_threads, pa_error *error) {
  return guarded("get_num_threads", error, [&] {
    if (num_threads == nullptr) throw_invalid("get_num_threads: `num_threads` is NULL");
    *num_threads = cpu::num_threads();
  });
}

pa_status pa_set_num_threads(int32_t num_threads, pa_error *error) {
  return guarded("set_num_threads", error, [&] {
    if (num_threads < 1 || num_threads > 4096) {
      throw_invalid("set_num_threads: `num_threads` must be in 1 ... 4096; got " + std::to_string(num_threads));
    }
    cpu::set_num_threads(num_threads);
  });
}

pa_status pa_get_build_info(pa_build_info *info, pa_error *error) {
  return guarded("build_info", error, [&] {
    if (info == nullptr) throw_invalid("build_info: `info` is NULL");
    static const std::string kernel_table = [] {
      std::string table = cpu::kernel_table();
#if PAGEDATTN_HAS_CUDA
      table += cuda::kernel_table();
#endif
      return table;
    }();
    pa_build_info full = {};
    full.struct_size = std::min(info->struct_size, sizeof full);
    full.version = PAGEDATTN_VERSION;
#if defined(__clang__)
    full.compiler = __VERSION__;  // names itself
#else
    full.compiler = "GCC " __VERSION__;
#endif
#if PAGEDATTN_HAS_CUDA
    full.cuda_built = 1;
    full.cuda_version = cuda::compiler_version();
    full.cuda_archs = cuda::architectures();
#else
    full.cuda_archs = "";
#endif
    full.cpu_isas = cpu::compiled_isas();
    full.cpu_isa = cpu::chosen_isa();
    full.kernel_table = kernel_table.c_str();
    std::memcpy(static_cast<void *>(info), &full, full.struct_size);
  });
}

pa_status pa_cuda_device_count(int32_t *count, pa_error *error) {
  return guarded("device_count", error, [&] {
    if (count == nullptr) throw_invalid("device_count: `count` is NULL");
    *count = 0;
#if PAGEDATTN_HAS_CUDA
    *count = cuda::device_count();
#else
    throw Error(PA_ERROR_UNSUPPORTED, "this build of pagedattn has no CUDA kernels");
#endif
  });
}

pa_status pa_cuda_device_info(int32_t device, pa_device_info *info, pa_error *error) {
  return guarded("device_info", error, [&] {
    if (info == nullptr) throw_invalid("device_info: `info` is NULL");
#if PAGEDATTN_HAS_CUDA
    cuda::device_info(device, info);
#else
    (void)device;
    throw Error(PA_ERROR_UNSUPPORTED, "this build of pagedattn has no CUDA kernels");
#endif
  });
}

const char *pa_version(void) { return PAGEDATTN_VERSION; }

const char *pa_status_name(pa_status status) {
  switch (status) {
    case PA_OK:
      return "ok";
    case PA_ERROR_INVALID_ARGUMENT:
      return "invalid argument";
    case PA_ERROR_UNSUPPORTED:
      return "unsupported";
    case PA_ERROR_NO_DEVICE:
      return "no device";
    case PA_ERROR_OUT_OF_MEMORY:
      return "out of memory";
    case PA_ERROR_CUDA:
      return "CUDA error";
    case PA_ERROR_INTERNAL:
      return "internal error";
  }
  return "unknown status";
}

}  // extern "C"
