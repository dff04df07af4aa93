// reshape_and_cache: the keys and values of new tokens go to their slots, quantised where the cache is float8.
//
// SPDX-License-Identifier: Apache-2.0
//
// A thread block takes a few tokens, a row of its threads takes one token, and a thread moves the same few elements of
// the token's key and value, so that two independent loads are under way at a time.  Accesses are 16 bytes wide on the
// wider side where addresses and strides allow; a quantising thread otherwise moves single elements.
//
// Bound by memory: every element is read once and written once.  Slots that do not exist, padding included, are skipped
// before anything is read or written.
#include "cache_rows.cuh"
#include "cuda_backend.h"
#include "runtime.h"

namespace pagedattn::cuda {
namespace {

struct Args {
  TokenRows key;
  TokenRows value;
  CacheRows k_cache;
  CacheRows v_cache;
  Scale k_scale;
  Scale v_scale;
  const int64_t *slot_mapping;
  int64_t num_tokens;
  int64_t num_slots;
  int32_t block_size;
  unsigned accesses_per_head;
  unsigned accesses_per_token;
};

template <class Convert>
__global__ void __launch_bounds__(kThreadsPerBlock) reshape_and_cache_kernel(const __grid_constant__ Args args) {
  using From = typename Convert::From;
  using To = typename Convert::To;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= args.num_tokens) return;
  const int64_t slot = args.slot_mapping[token];
  if (slot < 0 || slot >= args.num_slots) return;
  const int64_t block = quotient(slot, args.block_size);
  const int64_t offset = slot - block * args.block_size;

  for (unsigned i = threadIdx.x; i < args.accesses_per_token; i += blockDim.x) {
    const unsigned head = i / args.accesses_per_head;
    const unsigned access = i - head * args.accesses_per_head;
    const From key = reinterpret_cast<const From *>(args.key.head(token, head))[access];
    const From value = reinterpret_cast<const From *>(args.value.head(token, head))[access];
    const float k_scale = Convert::kScaled ? scale_of(args.k_scale, head) : 1.0f;
    const float v_scale = Convert::kScaled ? scale_of(args.v_scale, head) : 1.0f;
    reinterpret_cast<To *>(args.k_cache.head(block, offset, head))[access] = Convert::apply(key, k_scale);
    reinterpret_cast<To *>(args.v_cache.head(block, offset, head))[access] = Convert::apply(value, v_scale);
  }
}

template <class Convert>
void launch(Args args, int64_t head_bytes, int64_t num_heads, cudaStream_t stream, const char *name) {
  const int64_t accesses_per_head = head_bytes / static_cast<int64_t>(sizeof(typename Convert::From));
  args.accesses_per_head = checked_unsigned(accesses_per_head, "elements a head");
  args.accesses_per_token = checked_unsigned(accesses_per_head * num_heads, "elements a token");
  const dim3 threads = threads_over_rows(args.accesses_per_token);
  const unsigned blocks = blocks_over_rows(args.num_tokens, threads.y);
  reshape_and_cache_kernel<Convert><<<blocks, threads, 0, stream>>>(args);
  check_launch(name);
  record_kernel("reshape_and_cache", name);
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams &p, void *stream_pointer) {
  const bool quantize = p.src_dtype != p.kv_dtype;
  const char *name = quantize ? "cuda::reshape_and_cache_quantize" : "cuda::reshape_and_cache_copy";
  if (p.num_tokens == 0 || p.num_blocks == 0) return record_kernel("reshape_and_cache", name);
  auto *stream = static_cast<cudaStream_t>(stream_pointer);

  Args args = {};
  args.key = token_rows(p.key, p.src_dtype);
  args.value = token_rows(p.value, p.src_dtype);
  args.k_cache = cache_rows(p.k_cache, p.kv_dtype);
  args.v_cache = cache_rows(p.v_cache, p.kv_dtype);
  args.k_scale = p.k_scale;
  args.v_scale = p.v_scale;
  args.slot_mapping = p.slot_mapping;
  args.num_tokens = p.num_tokens;
  args.num_slots = p.num_blocks * p.block_size;
  args.block_size = p.block_size;

  const int64_t heads = p.num_kv_heads;
  const int64_t source_bytes = p.head_dim * dtype_size(p.src_dtype);
  const int64_t cache_bytes = p.head_dim * dtype_size(p.kv_dtype);
  const int64_t source_access = token_access(args.key, args.value, p.num_tokens, heads, source_bytes);
  const int64_t cache_width = cache_access(args.k_cache, args.v_cache, p.num_blocks, p.block_size, heads, cache_bytes);

  if (!quantize) {
    return with_access(std::min(source_access, cache_width), [&](auto access) {
      launch<CopyUnchanged<decltype(access)>>(args, source_bytes, heads, stream, name);
    });
  }
  with_wide_type(p.src_dtype, [&](auto source) {
    with_float8_type(p.kv_dtype, [&](auto target) {
      using Source = decltype(source);
      using Target = decltype(target);
      constexpr int kWide = 16 / static_cast<int>(sizeof(Source));
      if (source_access == 16 && cache_width >= kWide) {
        launch<Quantize<Source, Target, kWide>>(args, source_bytes, heads, stream, name);
      } else {
        launch<Quantize<Source, Target, 1>>(args, source_bytes, heads, stream, name);
      }
    });
  });
}

}  // namespace pagedattn::cuda
