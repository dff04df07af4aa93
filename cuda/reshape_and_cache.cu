// reshape_and_cache: the keys and values of new tokens go to their slots, quantised where the cache is float8.
//
// SPDX-License-Identifier: Apache-2.0
//
// The grid is tiles of tokens x layers, so one launch serves K and V of all layers; the layers' pointers travel as
// kernel parameters, and more layers than fit take further launches.  A thread block takes a few tokens, a row of its
// threads takes one token, and a thread moves the same few elements of the token's key and value.  Accesses are 16
// bytes wide where addresses and strides allow, on either side if there is much to quantise; a quantising thread
// otherwise moves single elements.
//
// Bound by memory where tokens are many: every element is read once and written once, and the 2048 threads of a
// multiprocessor hold 64 KB of independent loads in flight, which is more than the 3.35 TB/s of an H100 x 1 us of
// latency needs (25 KB).  Bound by latency where they are few: the slot, key and value are read together, so a call is
// a launch and one trip to memory.  Tokens without a slot, padding included, are read and then dropped; slots that do
// not exist are never written.
#include "cache_rows.cuh"
#include "cuda_backend.h"
#include "fast_divisor.cuh"
#include "index_divisor.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "runtime.h"

namespace pagedattn::cuda {
namespace {

// 4 x 8 bytes each: with the rest, under the 4 KB that every driver passes.
constexpr int kLayersPerLaunch = 96;

constexpr int64_t kManyElements = int64_t{1} << 20;

// A small call of one layer must not wait for the parameters of 96.
template <int kLayers>
struct Args {
  LayerPointers layers[kLayers];
  TokenRows key;  // like what follows, without the layer's pointer
  TokenRows value;
  CacheRows k_cache;
  CacheRows v_cache;
  Scale k_scale;
  Scale v_scale;
  int64_t k_scale_layer_stride;
  int64_t v_scale_layer_stride;
  const int64_t *slot_mapping;
  int64_t num_tokens;
  int64_t num_slots;
  IndexDivisor block_size;
  FastDivisor accesses_per_head;
  int accesses_per_token;
};
static_assert(sizeof(Args<kLayersPerLaunch>) <= 4000);

__device__ inline Scale scale_of_layer(Scale scale, int64_t layer_stride) {
  if (scale.ptr != nullptr) scale.ptr += blockIdx.y * layer_stride;
  return scale;
}

template <class Convert, int kLayers>
__global__ void __launch_bounds__(kThreadsPerBlock)
    reshape_and_cache_kernel(const __grid_constant__ Args<kLayers> args) {
  using From = typename Convert::From;
  using To = typename Convert::To;
  wait_for_kernels_before();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= args.num_tokens) return;
  const LayerPointers &layer = args.layers[kLayers == 1 ? 0 : blockIdx.y];
  const Scale k_scale = scale_of_layer(args.k_scale, args.k_scale_layer_stride);
  const Scale v_scale = scale_of_layer(args.v_scale, args.v_scale_layer_stride);

  for (int i = static_cast<int>(threadIdx.x); i < args.accesses_per_token; i += static_cast<int>(blockDim.x)) {
    const int head = args.accesses_per_head.divide(i);
    const int access = i - head * static_cast<int>(args.accesses_per_head.divisor);
    const From key = reinterpret_cast<const From *>(args.key.head(layer.key, token, head))[access];
    const From value = reinterpret_cast<const From *>(args.value.head(layer.value, token, head))[access];
    const float k_factor = Convert::kScaled ? scale_of(k_scale, head) : 1.0f;
    const float v_factor = Convert::kScaled ? scale_of(v_scale, head) : 1.0f;
    int64_t offset = args.slot_mapping[token];
    // Holds the compiler back, which would look at the slot first, and load keys and values only where it is good.
    __syncwarp();
    if (offset < 0 || offset >= args.num_slots) return;
    const int64_t block = args.block_size.split(&offset);
    reinterpret_cast<To *>(args.k_cache.head(layer.k_cache, block, offset, head))[access] =
        Convert::apply(key, k_factor);
    reinterpret_cast<To *>(args.v_cache.head(layer.v_cache, block, offset, head))[access] =
        Convert::apply(value, v_factor);
  }
}

template <class Convert, int kLayers>
void launch_layers(const ReshapeAndCacheParams &p, int64_t first, int64_t count, int64_t accesses_per_head,
                   cudaStream_t stream, const char *name) {
  Args<kLayers> args = {};
  std::copy_n(p.layers + first, count, args.layers);
  args.key = token_rows(p.key, p.src_dtype);
  args.value = token_rows(p.value, p.src_dtype);
  args.k_cache = cache_rows(p.k_cache, p.kv_dtype);
  args.v_cache = cache_rows(p.v_cache, p.kv_dtype);
  args.k_scale = p.k_scale;
  args.v_scale = p.v_scale;
  args.k_scale_layer_stride = p.k_scale_layer_stride;
  args.v_scale_layer_stride = p.v_scale_layer_stride;
  if (args.k_scale.ptr != nullptr) args.k_scale.ptr += first * p.k_scale_layer_stride;
  if (args.v_scale.ptr != nullptr) args.v_scale.ptr += first * p.v_scale_layer_stride;
  args.slot_mapping = p.slot_mapping;
  args.num_tokens = p.num_tokens;
  args.num_slots = p.num_blocks * p.block_size;
  args.block_size = IndexDivisor::of(p.block_size);
  args.accesses_per_head = FastDivisor::of(checked_int(accesses_per_head, "elements a head"));
  args.accesses_per_token = checked_int(accesses_per_head * p.num_kv_heads, "elements a token");
  const dim3 threads = threads_over_rows(args.accesses_per_token);
  const dim3 blocks(blocks_over_rows(p.num_tokens, threads.y), static_cast<unsigned>(count));
  launch_kernel({name, blocks, threads, 0, stream, EarlyStart::kUnlessCaptured},
                reshape_and_cache_kernel<Convert, kLayers>, args);
}

template <class Convert>
void launch(const ReshapeAndCacheParams &p, cudaStream_t stream, const char *name) {
  const int64_t accesses_per_head = p.head_dim * dtype_size(p.src_dtype) / int64_t{sizeof(typename Convert::From)};
  if (p.num_layers == 1) return launch_layers<Convert, 1>(p, 0, 1, accesses_per_head, stream, name);
  for (int64_t first = 0; first < p.num_layers; first += kLayersPerLaunch) {
    const int64_t count = std::min<int64_t>(kLayersPerLaunch, p.num_layers - first);
    launch_layers<Convert, kLayersPerLaunch>(p, first, count, accesses_per_head, stream, name);
  }
}

// The widest accesses into the tokens and into the caches of every layer.
struct Widths {
  int64_t tokens;
  int64_t caches;
};

Widths widest_accesses(const ReshapeAndCacheParams &p) {
  AccessWidth tokens(p.head_dim * dtype_size(p.src_dtype)), caches(p.head_dim * dtype_size(p.kv_dtype));
  include_strides(&tokens, token_rows(p.key, p.src_dtype), p.num_tokens, p.num_kv_heads);
  include_strides(&tokens, token_rows(p.value, p.src_dtype), p.num_tokens, p.num_kv_heads);
  include_strides(&caches, cache_rows(p.k_cache, p.kv_dtype), p.num_blocks, p.block_size, p.num_kv_heads);
  include_strides(&caches, cache_rows(p.v_cache, p.kv_dtype), p.num_blocks, p.block_size, p.num_kv_heads);
  for (int64_t i = 0; i < p.num_layers; ++i) {
    tokens.address(p.layers[i].key);
    tokens.address(p.layers[i].value);
    caches.address(p.layers[i].k_cache);
    caches.address(p.layers[i].v_cache);
  }
  return {tokens.bytes(), caches.bytes()};
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams &p, void *stream_pointer) {
  const bool quantize = p.src_dtype != p.kv_dtype;
  const char *name = quantize ? "cuda::reshape_and_cache_quantize" : "cuda::reshape_and_cache_copy";
  record_kernel("reshape_and_cache", name);
  if (p.num_tokens == 0 || p.num_blocks == 0) return;
  auto *stream = static_cast<cudaStream_t>(stream_pointer);
  const Widths widths = widest_accesses(p);
  if (!quantize) {
    return with_access(std::min(widths.tokens, widths.caches),
                       [&](auto access) { launch<CopyUnchanged<decltype(access)>>(p, stream, name); });
  }
  with_wide_type(p.src_dtype, [&](auto source) {
    with_float8_type(p.kv_dtype, [&](auto target) {
      using Source = decltype(source);
      using Target = decltype(target);
      // As many elements as fill an access to the cache; where threads would then be too few, or it does not allow
      // that, as fill one to the tokens.
      constexpr int kWide = 16 / static_cast<int>(sizeof(Source));
      const bool many = p.num_layers * p.num_tokens * p.num_kv_heads * p.head_dim >= kManyElements;
      if (many && widths.tokens == 16 && widths.caches == 16) {
        launch<Quantize<Source, Target, 16>>(p, stream, name);
      } else if (widths.tokens == 16 && widths.caches >= kWide) {
        launch<Quantize<Source, Target, kWide>>(p, stream, name);
      } else {
        launch<Quantize<Source, Target, 1>>(p, stream, name);
      }
    });
  });
}

}  // namespace pagedattn::cuda
