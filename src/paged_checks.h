// The checks of what operations have in common: caches, their types and scales, lengths and block tables.
//
// SPDX-License-Identifier: Apache-2.0
//
// Params is any of the structs of params.h that has the fields in question.
#pragma once

#include <string>

#include "describe.h"
#include "params.h"
#include "tensor_checks.h"

namespace pagedattn {

// What a cache holds: the tensor's own type, or what `kv_dtype` says that its uint8 or uint16 storage is.
DType cache_dtype(const Checker &check, const char *argument, const pa_tensor &cache, int32_t kv_dtype);
// The type of q, key or an output: float32, float16, bfloat16, or uint16 storage of the 16-bit type that kv_dtype
// names.
DType wide_dtype(const Checker &check, const char *argument, const pa_tensor &tensor, int32_t kv_dtype);
// A scale, from a tensor of one or Hkv elements or a number.  Where the tensor is a row of one with a row a layer, the
// latter is `layers`.
Scale head_scale(const Checker &check, const char *argument, const pa_tensor *tensor, double value,
                 int32_t num_kv_heads, const pa_tensor *layers = nullptr);
// The scale of a cache.
Scale cache_scale(const Checker &check, const char *argument, const pa_tensor *tensor, double value, DType kv_dtype,
                  int32_t num_kv_heads, const pa_tensor *layers = nullptr);

CacheView cache_view(const pa_tensor &tensor);
TokensView tokens_view(const pa_tensor &tensor);

// The two caches of one layer, alike but for their strides, of `num_kv_heads` and `head_dim` or of any.
template <class Params>
void validate_cache_pair(const Checker &check, const pa_tensor *k_cache, const pa_tensor *v_cache, int64_t num_kv_heads,
                         int64_t head_dim, int32_t kv_dtype, Params *p) {
  check.shaped("k_cache", k_cache,
               {{"num_blocks"}, {"block_size"}, {"num_kv_heads", num_kv_heads}, {"head_dim", head_dim}});
  const int64_t *shape = k_cache->shape;
  check.shaped(
      "v_cache", v_cache,
      {{"num_blocks", shape[0]}, {"block_size", shape[1]}, {"num_kv_heads", shape[2]}, {"head_dim", shape[3]}});
  check.unit_last_stride("k_cache", *k_cache);
  check.unit_last_stride("v_cache", *v_cache);
  p->num_blocks = shape[0];
  p->block_size = check.fits_int32("k_cache", "block_size", shape[1]);
  p->num_kv_heads = check.fits_int32("k_cache", "num_kv_heads", shape[2]);
  p->head_dim = check.fits_int32("k_cache", "head_dim", shape[3]);
  if (p->block_size < 1 || p->num_kv_heads < 1 || p->head_dim < 1) {
    check.fail("k_cache", "of a block_size, num_kv_heads and head_dim of at least 1", tensor_text(*k_cache));
  }
  p->kv_dtype = cache_dtype(check, "k_cache", *k_cache, kv_dtype);
  if (cache_dtype(check, "v_cache", *v_cache, kv_dtype) != p->kv_dtype) {
    check.fail("v_cache", std::string("of the type of `k_cache`, ") + dtype_name(k_cache->dtype),
               tensor_text(*v_cache));
  }
  p->k_cache = cache_view(*k_cache);
  p->v_cache = cache_view(*v_cache);
}

// seq_lens and block_tables.
template <class Params>
void validate_sequences(const Checker &check, const pa_tensor *seq_lens, const pa_tensor *block_tables, Params *p) {
  check.tensor("seq_lens", seq_lens);
  const int64_t num_seqs = seq_lens->ndim == 1 ? seq_lens->shape[0] : Dim::kAny;
  check.vector("seq_lens", seq_lens, PA_INT32, {"num_seqs", num_seqs});
  p->num_seqs = check.fits_int32("seq_lens", "num_seqs", num_seqs);
  p->seq_lens = static_cast<const int32_t *>(seq_lens->data);

  const std::initializer_list<Dim> table_dims = {{"num_seqs", num_seqs}, {"max_blocks"}};
  check.tensor("block_tables", block_tables);
  check.dtype("block_tables", *block_tables, PA_INT32, table_dims);
  check.shaped("block_tables", block_tables, table_dims);
  check.unit_last_stride("block_tables", *block_tables);
  p->block_tables = static_cast<const int32_t *>(block_tables->data);
  p->block_table_stride = block_tables->strides[0];
  p->max_blocks_per_seq = check.fits_int32("block_tables", "max_blocks", block_tables->shape[1]);
}

}  // namespace pagedattn
