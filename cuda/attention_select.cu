// Chooses the attention kernels for a call, and lists them.
//
// SPDX-License-Identifier: Apache-2.0
//
// Lengths are known on the device alone, so sequences of few rows a KV head (decode) and of many (prefill) are told
// apart there: where a batch may hold both, both kernels are launched and each passes over the other's sequences.
#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "attention.h"
#include "attention_select.h"
#include "runtime.h"
#include "status.h"
#include "tensor_map.h"
#include "work_schedule.cuh"

namespace pagedattn::cuda {
namespace {

constexpr std::array<int, kNumHeadDimTiles> kHeadDimTiles = {64, 128, 256};

int head_dim_tile(int head_dim) {
  int tile = 0;
  while (kHeadDimTiles[static_cast<size_t>(tile)] < head_dim) ++tile;
  return tile;
}

const AttentionKernelPair &mma_kernels(DType kv_dtype, int tile) {
  switch (kv_dtype) {
    case DType::kFloat16:
      return attention_mma_float16(tile);
    case DType::kBFloat16:
      return attention_mma_bfloat16(tile);
    case DType::kFloat8E4M3:
      return attention_mma_float8_e4m3(tile);
    case DType::kFloat8E5M2:
      return attention_mma_float8_e5m2(tile);
    default:
      throw Error(PA_ERROR_INTERNAL, "paged_attention: no CUDA kernel for this cache type");
  }
}

HopperKernels decode_kernels(DType kv_dtype) {
  switch (kv_dtype) {
    case DType::kFloat16:
      return hopper_decode_float16();
    case DType::kBFloat16:
      return hopper_decode_bfloat16();
    case DType::kFloat8E4M3:
      return hopper_decode_float8_e4m3();
    case DType::kFloat8E5M2:
      return hopper_decode_float8_e5m2();
    default:
      throw Error(PA_ERROR_INTERNAL, "paged_attention: no CUDA kernel for this cache type");
  }
}

HopperKernels tall_decode_kernels(DType kv_dtype) {
  switch (kv_dtype) {
    case DType::kFloat16:
      return hopper_tall_decode_float16();
    case DType::kBFloat16:
      return hopper_tall_decode_bfloat16();
    default:
      return {};
  }
}

HopperKernels few_sequences_kernels(DType kv_dtype) {
  switch (kv_dtype) {
    case DType::kFloat16:
      return hopper_few_sequences_float16();
    case DType::kBFloat16:
      return hopper_few_sequences_bfloat16();
    default:
      return {};
  }
}

HopperKernels prefill_kernels(DType kv_dtype) {
  switch (kv_dtype) {
    case DType::kFloat16:
      return hopper_prefill_float16();
    case DType::kBFloat16:
      return hopper_prefill_bfloat16();
    case DType::kFloat8E4M3:
      return hopper_prefill_float8_e4m3();
    case DType::kFloat8E5M2:
      return hopper_prefill_float8_e5m2();
    default:
      throw Error(PA_ERROR_INTERNAL, "paged_attention: no CUDA kernel for this cache type");
  }
}

// For queries of the cache's type, of some head dimensions.
HopperKernels prefill_products_kernels(DType q_dtype) {
  switch (q_dtype) {
    case DType::kFloat8E4M3:
      return hopper_prefill_products_float8_e4m3();
    case DType::kFloat8E5M2:
      return hopper_prefill_products_float8_e5m2();
    default:
      return {};
  }
}

// Is PAGEDATTN_CUDA_ARCH set to the generic kernels' architecture?
bool generic_kernels_wanted() {
  static const bool wanted = [] {
    const char *value = std::getenv("PAGEDATTN_CUDA_ARCH");
    if (value == nullptr || *value == '\0') return false;
    if (std::string(value) == "sm_80") return true;
    throw_invalid("paged_attention: `PAGEDATTN_CUDA_ARCH` must be sm_80 (the generic kernels) or unset; got `" +
                  std::string(value) + "`");
  }();
  return wanted;
}

// A kernel whose items always have several heads reads them faster, but one block joins all the partial results of an
// item: if sequences are few, or one is far longer than the others, which the host does not know, that takes longer.
// What a sequence gets must not depend on the batch if results are to be deterministic.
bool many_heads_pay(const AttentionParams &params, const HopperKernel &kernel) {
  if (params.deterministic || most_rows(params) > kFewRows || !heads_fill_rows(params, kernel.rows)) return false;
  return int64_t{params.num_seqs} * (params.num_kv_heads / kernel.rows.heads) * kMostSharers >=
         device_facts().num_multiprocessors;
}

bool hopper_kernels_serve(const AttentionParams &params, ArrayAlignment alignment) {
  if (generic_kernels_wanted() || !PAGEDATTN_SM_90A || device_facts().compute_capability != 90) return false;
  if (!shape_fits_tensor_maps(params) || alignment == ArrayAlignment::kAssumedBad) return false;
  return alignment == ArrayAlignment::kAssumedGood || strides_fit_tensor_maps(params);
}

// Whether a block for every KV head in each of some columns fills the device, and one block can join the parts of all
// columns.  Their cuts depend on the batch.
bool columns_pay(const AttentionParams &params) {
  constexpr int kFewestColumns = 8, kMostColumns = 16;
  const int blocks = device_facts().num_multiprocessors, columns = blocks / params.num_kv_heads;
  return !params.deterministic && columns >= kFewestColumns && columns <= kMostColumns &&
         columns * params.num_kv_heads >= blocks - blocks / 8;
}

const HopperKernel *few_sequences_kernel_for(const AttentionParams &params) {
  constexpr int64_t kMostTokens = int64_t{1} << 28;  // that a warp adds up in 31 bits
  const int64_t capacity = int64_t{params.max_blocks_per_seq} * params.block_size;
  if (params.num_seqs > kFewSequences || most_rows(params) > kFewSequencesRows || !columns_pay(params)) return nullptr;
  if (capacity > kMostTokens) return nullptr;
  for (const HopperKernel &kernel : few_sequences_kernels(params.kv_dtype)) {
    if (kernel.kernel.head_dim == params.head_dim) return &kernel;
  }
  return nullptr;
}

// For calls where decode serves sequences of more rows than a warp: unless two heads of these would make one item of
// the other kernel's, which reads short sequences faster.
const HopperKernel *tall_kernel_for(const AttentionParams &params, const HopperKernel &other) {
  // What a sequence gets must not depend on the batch if results are to be deterministic.
  const int64_t group = params.num_q_heads / params.num_kv_heads, most = most_rows(params);
  const int64_t rows = params.deterministic || most > kHopperRows ? group : most;
  if (rows <= kFewRows) return nullptr;
  const bool in_pairs =
      2 * rows <= kHopperRows && params.num_kv_heads % 2 == 0 && params.head_dim <= 128 && !params.deterministic;
  const int64_t items = int64_t{params.num_seqs} * params.num_kv_heads;
  if (in_pairs && items > device_facts().num_multiprocessors) return nullptr;
  for (const HopperKernel &kernel : tall_decode_kernels(params.kv_dtype)) {
    if (kernel.kernel.head_dim == other.kernel.head_dim) return &kernel;
  }
  return nullptr;
}

const HopperKernel *decode_kernel_for(const AttentionParams &params, ArrayAlignment alignment) {
  if (!hopper_kernels_serve(params, alignment)) return nullptr;
  if (const HopperKernel *few = few_sequences_kernel_for(params)) return few;
  const HopperKernel *of_one_head = nullptr;
  for (const HopperKernel &kernel : decode_kernels(params.kv_dtype)) {
    if (kernel.rows.heads > 1) {
      if (many_heads_pay(params, kernel)) return &kernel;
    } else if (of_one_head == nullptr && kernel.kernel.head_dim >= params.head_dim) {
      of_one_head = &kernel;
    }
  }
  if (const HopperKernel *tall = tall_kernel_for(params, *of_one_head)) return tall;
  return of_one_head;
}

// Rows that do not fill narrow columns would come column by column, in more requests than the next kernel's take, and
// so would float8 ones of several columns.
bool wants_full_rows(const HopperKernel &kernel) {
  const CacheRowLayout &rows = kernel.rows;
  const bool several_of_float8 = rows.columns > 1 && rows.columns * rows.row_bytes == kernel.kernel.head_dim;
  return rows.is_cut && (rows.row_bytes < 128 || several_of_float8);
}

const HopperKernel *prefill_kernel_for(const AttentionParams &params, ArrayAlignment alignment) {
  if (!hopper_kernels_serve(params, alignment)) return nullptr;
  if (alignment == ArrayAlignment::kAsGiven && !queries_fit_tensor_map(params)) return nullptr;
  for (const HopperKernels kernels : {prefill_products_kernels(params.q_dtype), prefill_kernels(params.kv_dtype)}) {
    for (const HopperKernel &kernel : kernels) {
      const int most = kernel.kernel.head_dim, least = wants_full_rows(kernel) ? most : 1;
      const bool fits = params.head_dim >= least && params.head_dim <= most;
      if (fits && kernel.kernel.rows >= params.num_q_heads / params.num_kv_heads) return &kernel;
    }
  }
  return nullptr;
}

// The name of the launch of both, which is kept for good.
const char *joint_name(const AttentionKernel &few, const AttentionKernel &many) {
  static std::mutex mutex;
  static std::map<std::pair<const char *, const char *>, std::string> names;
  const std::lock_guard lock(mutex);
  std::string &name = names[{few.name, many.name}];
  if (name.empty()) name = std::string(few.name) + "+" + many.name;
  return name.c_str();
}

std::string make_kernel_table() {
  std::string table;
  const auto add = [&](const std::string &types, int tile, const char *rows, const AttentionKernel &kernel,
                       const char *relation = ", D <= ") {
    table += "paged_attention\t" + types + relation + std::to_string(tile) + rows + "\t" + kernel.name + "\n";
  };
  const std::pair<const char *, DType> types[] = {{"float16", DType::kFloat16},
                                                  {"bfloat16", DType::kBFloat16},
                                                  {"float8_e4m3 cache", DType::kFloat8E4M3},
                                                  {"float8_e5m2 cache", DType::kFloat8E5M2}};
  for (const auto &[name, dtype] : types) {
    if (PAGEDATTN_SM_90A) {
      for (const HopperKernel &kernel : decode_kernels(dtype)) {
        const bool many = kernel.rows.heads > 1;
        add(name, kernel.kernel.head_dim,
            many ? ", at most 16 rows a KV head, many sequences, sm_90" : ", at most 64 rows a KV head, sm_90",
            kernel.kernel);
      }
      for (const HopperKernel &kernel : tall_decode_kernels(dtype)) {
        add(name, kernel.kernel.head_dim, ", 17 to 64 rows a KV head, sm_90", kernel.kernel);
      }
      for (const HopperKernel &kernel : few_sequences_kernels(dtype)) {
        add(name, kernel.kernel.head_dim,
            ", at most 32 sequences and 8 rows a KV head, 8 KV heads and some more, sm_90", kernel.kernel);
      }
      for (const HopperKernel &kernel : prefill_kernels(dtype)) {
        add(name, kernel.kernel.head_dim, ", more rows, sm_90", kernel.kernel,
            wants_full_rows(kernel) ? ", D = " : ", D <= ");
      }
      for (const HopperKernel &kernel : prefill_products_kernels(dtype)) {
        add(name, kernel.kernel.head_dim, ", more rows, float8 queries, sm_90", kernel.kernel,
            wants_full_rows(kernel) ? ", D = " : ", D <= ");
      }
    }
    for (int tile = 0; tile < kNumHeadDimTiles; ++tile) {
      const AttentionKernelPair &pair = mma_kernels(dtype, tile);
      add(name, kHeadDimTiles[static_cast<size_t>(tile)], ", at most 16 rows a KV head", pair.few_rows);
      add(name, kHeadDimTiles[static_cast<size_t>(tile)], ", more rows", pair.many_rows);
    }
  }
  for (int tile = 0; tile < kNumHeadDimTiles; ++tile) {
    add("float32", kHeadDimTiles[static_cast<size_t>(tile)], "", attention_fma_float32(tile));
  }
  return table;
}

}  // namespace

int64_t most_rows(const AttentionParams &params) {
  return params.max_query_len * (params.num_q_heads / params.num_kv_heads);
}

AttentionSelection select_attention(const AttentionParams &params, ArrayAlignment alignment) {
  const int tile = head_dim_tile(params.head_dim);
  if (params.q_dtype == DType::kFloat32) {
    const AttentionKernel &kernel = attention_fma_float32(tile);
    return {kernel.name, 1, {{&kernel}}};
  }
  const AttentionKernelPair &pair = mma_kernels(params.kv_dtype, tile);
  const HopperKernel *const decode = decode_kernel_for(params, alignment);
  const AttentionKernel &few = decode != nullptr ? decode->kernel : pair.few_rows;
  const int most_few = decode != nullptr ? kHopperRows : kFewRows;
  if (most_rows(params) <= most_few) return {few.name, 1, {{&few, decode, 1, most_few}}};

  const HopperKernel *const prefill = prefill_kernel_for(params, alignment);
  const AttentionKernel &many = prefill != nullptr ? prefill->kernel : pair.many_rows;
  // Prompts of one length.  What is shorter, though starts should end with T, the kernel for many rows serves as well.
  const bool all_have_most = params.num_tokens == params.num_seqs * params.max_query_len;
  if (all_have_most || params.num_q_heads / params.num_kv_heads > most_few) return {many.name, 1, {{&many, prefill}}};
  return {joint_name(few, many), 2, {{&many, prefill, most_few + 1}, {&few, decode, 1, most_few}}};
}

const char *attention_kernel_table() {
  static const std::string table = make_kernel_table();
  return table.c_str();
}

}  // namespace pagedattn::cuda
