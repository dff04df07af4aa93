// pagedattn for C++17: typed tensor views, owned host memory and exceptions over the C ABI.
//
// SPDX-License-Identifier: Apache-2.0
//
// Header-only and thin: every function fills one C argument struct, calls the C function of the same name and throws
// pagedattn::Error where that fails.  pagedattn.h documents the operations; the names and the order of arguments are
// the same here.  A tensor is a view: it owns nothing, and its memory must outlive the call (on CUDA: the stream's
// work).  Element type and rank are part of its type, so most mistakes do not compile.
//
//   pagedattn::HostBuffer<float> memory(2 * 3 * 64);
//   auto query = pagedattn::tensor(memory.data(), {2, 3, 64});                                // float, 3 dimensions
//   auto other = pagedattn::tensor(gpu_pointer, {2, 3, 64}, pagedattn::Device::cuda(0));
#ifndef PAGEDATTN_HPP_
#define PAGEDATTN_HPP_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "pagedattn/pagedattn.h"

namespace pagedattn {

// ---- errors -----------------------------------------------------------------------------------------------------

/// A failed call.  what() is the library's message.
class Error : public std::runtime_error {
 public:
  Error(pa_status status, const std::string &message) : std::runtime_error(message), status_(status) {}
  pa_status status() const noexcept { return status_; }

 private:
  pa_status status_;
};

namespace detail {
// Calls a C function, whose last argument is the error buffer, and throws what it reports.
template <class Function, class... Args>
void call(Function function, Args... args) {
  pa_error error;
  error.message[0] = '\0';
  const pa_status status = function(args..., &error);
  if (status != PA_OK) throw Error(status, error.message[0] != '\0' ? error.message : pa_status_name(status));
}
// The library cannot check this: it is told one count for two arrays.
inline void require_same_count(const char *lists, std::size_t a, std::size_t b) {
  if (a == b) return;
  throw Error(PA_ERROR_INVALID_ARGUMENT, std::string(lists) + " must have the same number of tensors; got " +
                                             std::to_string(a) + " and " + std::to_string(b));
}
}  // namespace detail

// ---- element types ----------------------------------------------------------------------------------------------

// Storage of the types that C++17 has no name for; enum classes make each a type of its own.
enum class float16 : std::uint16_t {};
enum class bfloat16 : std::uint16_t {};
enum class float8_e4m3 : std::uint8_t {};
enum class float8_e5m2 : std::uint8_t {};

/// The pa_dtype of a C++ type.  Specialise it for types of your own, as `dtype_of<__half>`.
template <class T>
inline constexpr pa_dtype dtype_of = PA_DTYPE_NONE;
template <>
inline constexpr pa_dtype dtype_of<float> = PA_FLOAT32;
template <>
inline constexpr pa_dtype dtype_of<float16> = PA_FLOAT16;
template <>
inline constexpr pa_dtype dtype_of<bfloat16> = PA_BFLOAT16;
template <>
inline constexpr pa_dtype dtype_of<float8_e4m3> = PA_FLOAT8_E4M3;
template <>
inline constexpr pa_dtype dtype_of<float8_e5m2> = PA_FLOAT8_E5M2;
template <>
inline constexpr pa_dtype dtype_of<std::int32_t> = PA_INT32;
template <>
inline constexpr pa_dtype dtype_of<std::int64_t> = PA_INT64;
template <>
inline constexpr pa_dtype dtype_of<std::uint8_t> = PA_UINT8;

// ---- memory and tensors -----------------------------------------------------------------------------------------

/// Where a tensor's memory lives.
struct Device {
  pa_device_type type = PA_CPU;
  std::int32_t id = 0;

  static constexpr Device cpu() { return {PA_CPU, 0}; }
  static constexpr Device cuda(std::int32_t id) { return {PA_CUDA, id}; }
  static constexpr Device pinned_host() { return {PA_CUDA_HOST, 0}; }
};

/// Owned, zeroed host memory on a cache line's boundary.
template <class T>
class HostBuffer {
  static_assert(std::is_trivially_copyable_v<T>, "a HostBuffer holds plain elements");

 public:
  HostBuffer() = default;
  explicit HostBuffer(std::size_t size) : size_(size) {
    if (size > SIZE_MAX / sizeof(T)) throw std::bad_array_new_length();
    data_.reset(static_cast<T *>(::operator new(size * sizeof(T), alignment)));
    for (std::size_t i = 0; i < size; ++i) ::new (static_cast<void *>(data_.get() + i)) T{};
  }

  T *data() noexcept { return data_.get(); }
  const T *data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }
  T &operator[](std::size_t i) noexcept { return data_[i]; }
  const T &operator[](std::size_t i) const noexcept { return data_[i]; }
  T *begin() noexcept { return data(); }
  T *end() noexcept { return data() + size_; }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(T *data) const noexcept { ::operator delete(static_cast<void *>(data), alignment); }
  };
  std::unique_ptr<T[], Free> data_;
  std::size_t size_ = 0;
};

/// Owned page-locked host memory, which the swaps of `device` move fast and asynchronously.  Its end waits for them.
template <class T>
class PinnedBuffer {
  static_assert(std::is_trivially_copyable_v<T>, "a PinnedBuffer holds plain elements");

 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(std::size_t size, std::int32_t device = 0) : size_(size) {
    if (size == 0) return;
    if (size > SIZE_MAX / sizeof(T)) throw std::bad_array_new_length();
    pa_error error;
    error.message[0] = '\0';
    void *data = nullptr;
    const pa_status status = pa_host_alloc(size * sizeof(T), device, &data, &error);
    if (status != PA_OK) throw Error(status, error.message);
    data_.reset(static_cast<T *>(data));
  }

  T *data() noexcept { return data_.get(); }
  const T *data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }

 private:
  struct Free {
    void operator()(T *data) const noexcept { pa_host_free(static_cast<void *>(data), nullptr); }
  };
  std::unique_ptr<T[], Free> data_;
  std::size_t size_ = 0;
};

/// A strided view of N dimensions.  `Tensor<const T, N>` is read-only; every Tensor<T, N> converts to it.
template <class T, int N>
class Tensor {
  static_assert(N >= 1 && N <= PA_MAX_DIMS, "a tensor has 1 to PA_MAX_DIMS dimensions");
  static_assert(dtype_of<std::remove_const_t<T>> != PA_DTYPE_NONE, "specialise pagedattn::dtype_of for this type");

 public:
  using Extents = std::array<std::int64_t, static_cast<std::size_t>(N)>;

  /// Strides are in elements.
  Tensor(T *data, const Extents &shape, const Extents &strides, Device device = {}) : c_{} {
    c_.data = const_cast<std::remove_const_t<T> *>(data);
    c_.dtype = dtype_of<std::remove_const_t<T>>;
    c_.device_type = device.type;
    c_.device_id = device.id;
    c_.ndim = N;
    c_.flags = std::is_const_v<T> ? PA_TENSOR_READONLY : 0u;
    for (std::size_t i = 0; i < shape.size(); ++i) {
      c_.shape[i] = shape[i];
      c_.strides[i] = strides[i];
    }
  }
  /// Contiguous, the last dimension fastest.
  Tensor(T *data, const Extents &shape, Device device = {}) : Tensor(data, shape, contiguous(shape), device) {}

  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  Tensor(const Tensor<U, N> &other) : c_(*other.c()) {
    c_.flags |= PA_TENSOR_READONLY;
  }

  T *data() const noexcept { return static_cast<T *>(c_.data); }
  std::int64_t shape(int i) const noexcept { return c_.shape[i]; }
  std::int64_t stride(int i) const noexcept { return c_.strides[i]; }
  Device device() const noexcept { return {static_cast<pa_device_type>(c_.device_type), c_.device_id}; }
  const pa_tensor *c() const noexcept { return &c_; }

 private:
  static Extents contiguous(const Extents &shape) {
    Extents strides{};
    std::int64_t stride = 1;
    for (std::size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
    return strides;
  }
  pa_tensor c_;
};

/// A contiguous tensor, its rank taken from the list: `tensor(pointer, {3, 8, 64})`.
template <class T, int N>
Tensor<T, N> tensor(T *data, const std::int64_t (&shape)[N], Device device = {}) {
  typename Tensor<T, N>::Extents extents{};
  for (std::size_t i = 0; i < extents.size(); ++i) extents[i] = shape[i];
  return Tensor<T, N>(data, extents, device);
}

/// The two halves of a paged KV cache, [num_blocks, block_size, num_kv_heads, head_dim] each.
template <class T>
struct PagedCache {
  Tensor<T, 4> k;
  Tensor<T, 4> v;

  /// Elements of each half.
  static std::size_t size(std::int64_t num_blocks, std::int64_t block_size, std::int64_t num_kv_heads,
                          std::int64_t head_dim) {
    return static_cast<std::size_t>(num_blocks * block_size * num_kv_heads * head_dim);
  }
};

/// What a float8 cache's stored numbers are multiplied by: one number, or a tensor of [1] or [num_kv_heads].
class Scale {
 public:
  Scale(double value = 1.0) : value_(value) {}
  Scale(const Tensor<const float, 1> &values) : values_(values) {}
  double value() const noexcept { return value_; }
  const pa_tensor *c() const noexcept { return values_ ? values_->c() : nullptr; }

 private:
  double value_ = 1.0;
  std::optional<Tensor<const float, 1>> values_;
};

/// Whether index values are verified on the GPU, which costs a synchronisation.  On the CPU they always are.
enum class Check : std::int32_t { environment = -1, off = 0, on = 1 };  // environment: as PAGEDATTN_CHECK says

namespace detail {
template <class T, int N>
const pa_tensor *optional(const std::optional<Tensor<T, N>> &tensor) {
  return tensor ? tensor->c() : nullptr;
}
template <class T, int N>
std::vector<pa_tensor> array(const std::vector<Tensor<T, N>> &tensors) {
  std::vector<pa_tensor> c;
  c.reserve(tensors.size());
  for (const auto &tensor : tensors) c.push_back(*tensor.c());
  return c;
}
}  // namespace detail

// ---- operations -------------------------------------------------------------------------------------------------

/// What every operation on a cache takes.
struct CacheOptions {
  Scale k_scale;
  Scale v_scale;
  Check check = Check::environment;
  void *stream = nullptr;  // cudaStream_t
};

/// The optional arguments of paged_attention; pagedattn.h describes each.
struct AttentionOptions : CacheOptions {
  Scale q_scale;
  std::optional<Tensor<const std::int32_t, 1>> query_start_loc;
  std::optional<Tensor<const float, 1>> alibi_slopes;
  std::optional<Tensor<const float, 1>> sinks;
  std::optional<Tensor<float, 2>> lse;
  std::optional<Tensor<std::uint8_t, 1>> workspace;
  std::optional<std::int64_t> max_query_len;
  std::optional<double> scale;  // of the scores; default 1 / sqrt(head_dim)
  std::optional<std::int64_t> window;
  double softcap = 0.0;
  bool causal = true;
  bool deterministic = false;
};

/// The optional arguments of rope_and_cache.
template <class T>
struct RopeOptions : CacheOptions {
  std::optional<Tensor<const T, 3>> query;
  std::optional<Tensor<T, 3>> query_out;  // may be the query
  bool interleaved = false;
};

/// The optional arguments of gather_kv.
struct GatherOptions : CacheOptions {
  std::optional<Tensor<const std::int32_t, 1>> seq_starts;
  std::optional<Tensor<const std::int32_t, 1>> out_start_loc;
};

namespace detail {
template <class Args, class KV>
void set_cache(Args &args, const PagedCache<KV> &cache, const CacheOptions &options) {
  args.k_cache = cache.k.c();
  args.v_cache = cache.v.c();
  args.k_scale = options.k_scale.c();
  args.v_scale = options.v_scale.c();
  args.k_scale_value = options.k_scale.value();
  args.v_scale_value = options.v_scale.value();
  args.check = static_cast<std::int32_t>(options.check);
  args.stream = options.stream;
}

constexpr bool is_float8(pa_dtype type) { return type == PA_FLOAT8_E4M3 || type == PA_FLOAT8_E5M2; }
constexpr bool output_fits(pa_dtype q, pa_dtype out) {
  return is_float8(q) ? out == PA_FLOAT16 || out == PA_BFLOAT16 : out == q;
}

template <class Q, class KV, class Out>
pa_attention_args attention_args(const Tensor<Q, 3> &q, const PagedCache<KV> &cache,
                                 const Tensor<const std::int32_t, 2> &block_tables,
                                 const Tensor<const std::int32_t, 1> &seq_lens, const Tensor<Out, 3> &out,
                                 const AttentionOptions &options) {
  static_assert(!std::is_const_v<Out> && output_fits(dtype_of<std::remove_const_t<Q>>, dtype_of<Out>),
                "`out` has the type of `q`, or float16 or bfloat16 with a float8 `q`");
  pa_attention_args args;
  pa_attention_args_init(&args);
  detail::set_cache(args, cache, options);
  args.q = q.c();
  args.q_scale = options.q_scale.c();
  args.q_scale_value = options.q_scale.value();
  args.block_tables = block_tables.c();
  args.seq_lens = seq_lens.c();
  args.query_start_loc = optional(options.query_start_loc);
  args.alibi_slopes = optional(options.alibi_slopes);
  args.sinks = optional(options.sinks);
  args.out = out.c();
  args.lse = optional(options.lse);
  args.workspace = optional(options.workspace);
  if (options.scale) args.scale = *options.scale;
  if (options.max_query_len) args.max_query_len = *options.max_query_len;
  if (options.window) args.window = *options.window;
  args.softcap = options.softcap;
  args.causal = options.causal;
  args.deterministic = options.deterministic;
  return args;
}
}  // namespace detail

/// Attention of every query token over its sequence's paged keys and values.
template <class Q, class KV, class Out>
void paged_attention(const Tensor<Q, 3> &q, const PagedCache<KV> &cache,
                     const Tensor<const std::int32_t, 2> &block_tables, const Tensor<const std::int32_t, 1> &seq_lens,
                     const Tensor<Out, 3> &out, const AttentionOptions &options = {}) {
  const pa_attention_args args = detail::attention_args(q, cache, block_tables, seq_lens, out, options);
  detail::call(pa_paged_attention, &args);
}

/// Bytes of `options.workspace` with which the same call runs on the GPU without allocating.
template <class Q, class KV, class Out>
std::size_t paged_attention_workspace_size(const Tensor<Q, 3> &q, const PagedCache<KV> &cache,
                                           const Tensor<const std::int32_t, 2> &block_tables,
                                           const Tensor<const std::int32_t, 1> &seq_lens, const Tensor<Out, 3> &out,
                                           const AttentionOptions &options = {}) {
  const pa_attention_args args = detail::attention_args(q, cache, block_tables, seq_lens, out, options);
  std::size_t bytes = 0;
  detail::call(pa_paged_attention_workspace_size, &args, &bytes);
  return bytes;
}

/// Joins partial attention results over disjoint sets of keys.
template <class T>
void merge_states(const std::vector<Tensor<T, 3>> &outs, const std::vector<Tensor<const float, 2>> &lses,
                  const Tensor<std::remove_const_t<T>, 3> &out, const std::optional<Tensor<float, 2>> &lse = {},
                  void *stream = nullptr) {
  detail::require_same_count("merge_states: `outs` and `lses`", outs.size(), lses.size());
  const auto c_outs = detail::array(outs);
  const auto c_lses = detail::array(lses);
  pa_merge_states_args args;
  pa_merge_states_args_init(&args);
  args.num_parts = static_cast<std::int64_t>(outs.size());
  args.outs = c_outs.data();
  args.lses = c_lses.data();
  args.out = out.c();
  args.lse = detail::optional(lse);
  args.stream = stream;
  detail::call(pa_merge_states, &args);
}

/// Writes the keys and values of new tokens into their slots.
template <class T, class KV>
void reshape_and_cache(const Tensor<T, 3> &key, const Tensor<T, 3> &value, const PagedCache<KV> &cache,
                       const Tensor<const std::int64_t, 1> &slot_mapping, const CacheOptions &options = {}) {
  pa_reshape_and_cache_args args;
  pa_reshape_and_cache_args_init(&args);
  detail::set_cache(args, cache, options);
  args.key = key.c();
  args.value = value.c();
  args.slot_mapping = slot_mapping.c();
  detail::call(pa_reshape_and_cache, &args);
}

/// The same of several layers in one launch: entry i of each list is layer i's.
template <class T, class KV>
void reshape_and_cache(const std::vector<Tensor<T, 3>> &keys, const std::vector<Tensor<T, 3>> &values,
                       const std::vector<PagedCache<KV>> &caches, const Tensor<const std::int64_t, 1> &slot_mapping,
                       const CacheOptions &options = {}) {
  detail::require_same_count("reshape_and_cache: `keys` and `values`", keys.size(), values.size());
  detail::require_same_count("reshape_and_cache: `keys` and `caches`", keys.size(), caches.size());
  if (caches.empty())
    throw Error(PA_ERROR_INVALID_ARGUMENT, "reshape_and_cache: `caches` must have at least one layer");
  const auto c_keys = detail::array(keys);
  const auto c_values = detail::array(values);
  std::vector<pa_tensor> c_k, c_v;
  for (const auto &cache : caches) {
    c_k.push_back(*cache.k.c());
    c_v.push_back(*cache.v.c());
  }
  pa_reshape_and_cache_args args;
  pa_reshape_and_cache_args_init(&args);
  detail::set_cache(args, caches.front(), options);
  args.num_layers = static_cast<std::int64_t>(caches.size());
  args.key = c_keys.data();
  args.value = c_values.data();
  args.k_cache = c_k.data();
  args.v_cache = c_v.data();
  args.slot_mapping = slot_mapping.c();
  detail::call(pa_reshape_and_cache, &args);
}

/// Rotates keys by their positions on their way into their slots, and the query of `options`, where there is one.
/// `positions` are of int64 or int32, `cos_sin` of any of the wide types.
template <class T, class KV, class Position, class C>
void rope_and_cache(const Tensor<T, 3> &key, const Tensor<T, 3> &value, const PagedCache<KV> &cache,
                    const Tensor<const std::int64_t, 1> &slot_mapping, const Tensor<Position, 1> &positions,
                    const Tensor<C, 2> &cos_sin, const RopeOptions<std::remove_const_t<T>> &options = {}) {
  pa_rope_and_cache_args args;
  pa_rope_and_cache_args_init(&args);
  detail::set_cache(args, cache, options);
  args.key = key.c();
  args.value = value.c();
  args.slot_mapping = slot_mapping.c();
  args.positions = positions.c();
  args.cos_sin = cos_sin.c();
  args.query = detail::optional(options.query);
  args.query_out = detail::optional(options.query_out);
  args.interleaved = options.interleaved;
  detail::call(pa_rope_and_cache, &args);
}

/// Copies whole blocks within every cache of the list (copy-on-write), all in one launch.
template <class T>
void copy_blocks(const std::vector<Tensor<T, 4>> &caches, const Tensor<const std::int64_t, 2> &block_mapping,
                 void *stream = nullptr, Check check = Check::environment) {
  const auto c_caches = detail::array(caches);
  pa_copy_blocks_args args;
  pa_copy_blocks_args_init(&args);
  args.num_caches = static_cast<std::int64_t>(caches.size());
  args.caches = c_caches.data();
  args.block_mapping = block_mapping.c();
  args.check = static_cast<std::int32_t>(check);
  args.stream = stream;
  detail::call(pa_copy_blocks, &args);
}

/// Copies blocks between the caches of two lists, on any pair of devices.  `block_mapping` lies in host memory.
/// `event`, a cudaEvent_t, is recorded behind the copies.
template <class T>
void swap_blocks(const std::vector<Tensor<T, 4>> &src, const std::vector<Tensor<std::remove_const_t<T>, 4>> &dst,
                 const Tensor<const std::int64_t, 2> &block_mapping, void *stream = nullptr, void *event = nullptr) {
  detail::require_same_count("swap_blocks: `src` and `dst`", src.size(), dst.size());
  const auto c_src = detail::array(src);
  const auto c_dst = detail::array(dst);
  pa_swap_blocks_args args;
  pa_swap_blocks_args_init(&args);
  args.num_caches = static_cast<std::int64_t>(src.size());
  args.src = c_src.data();
  args.dst = c_dst.data();
  args.block_mapping = block_mapping.c();
  args.stream = stream;
  args.event = event;
  detail::call(pa_swap_blocks, &args);
}

/// Copies pages back to contiguous keys and values, dequantised where `k_out` is wider than the cache.
template <class KV, class T>
void gather_kv(const PagedCache<KV> &cache, const Tensor<const std::int32_t, 2> &block_tables,
               const Tensor<const std::int32_t, 1> &seq_lens, const Tensor<T, 3> &k_out, const Tensor<T, 3> &v_out,
               const GatherOptions &options = {}) {
  pa_gather_kv_args args;
  pa_gather_kv_args_init(&args);
  detail::set_cache(args, cache, options);
  args.block_tables = block_tables.c();
  args.seq_lens = seq_lens.c();
  args.seq_starts = detail::optional(options.seq_starts);
  args.out_start_loc = detail::optional(options.out_start_loc);
  args.k_out = k_out.c();
  args.v_out = v_out.c();
  detail::call(pa_gather_kv, &args);
}

}  // namespace pagedattn

#endif  // PAGEDATTN_HPP_
