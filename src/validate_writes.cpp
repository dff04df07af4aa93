// reshape_and_cache and rope_and_cache: new tokens on their way into the cache.
//
// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "describe.h"
#include "paged_checks.h"
#include "placement.h"
#include "validate.h"

namespace pagedattn {

namespace {

// Keys and values of new tokens, the caches of their layer and their slots: what both operations have.
template <class Args>
void validate_write(const Checker &check, const Args &args, ReshapeAndCacheParams *p) {
  check.check_mode(args.check);
  check.shaped("key", args.key, {{"T"}, {"num_kv_heads"}, {"head_dim"}});
  const int64_t *shape = args.key->shape;
  check.shaped("value", args.value, {{"T", shape[0]}, {"num_kv_heads", shape[1]}, {"head_dim", shape[2]}});
  check.unit_last_stride("key", *args.key);
  check.unit_last_stride("value", *args.value);
  p->src_dtype = wide_dtype(check, "key", *args.key, args.kv_dtype);
  if (wide_dtype(check, "value", *args.value, args.kv_dtype) != p->src_dtype) {
    check.fail("value", std::string("of the type of `key`, ") + dtype_name(args.key->dtype), tensor_text(*args.value));
  }
  validate_cache_pair(check, args.k_cache, args.v_cache, shape[1], shape[2], args.kv_dtype, p);
  if (p->kv_dtype != p->src_dtype && !is_float8(p->kv_dtype)) {
    check.fail("k_cache",
               std::string("of the type of `key`, ") + dtype_name(static_cast<int32_t>(p->src_dtype)) + ", or float8",
               dtype_name(static_cast<int32_t>(p->kv_dtype)));
  }
  check.vector("slot_mapping", args.slot_mapping, PA_INT64, {"T"});
  p->num_tokens = args.slot_mapping->shape[0];
  if (p->num_tokens > shape[0]) {
    check.fail("slot_mapping", "no longer than `key`, of " + std::to_string(shape[0]) + " tokens",
               std::to_string(p->num_tokens) + " slots");
  }
  p->slot_mapping = static_cast<const int64_t *>(args.slot_mapping->data);
  p->key = tokens_view(*args.key);
  p->value = tokens_view(*args.value);
  check.output("k_cache", *args.k_cache);
  check.output("v_cache", *args.v_cache);
}

// A scale of one layer, or of each: [num_layers, 1] or [num_layers, Hkv].
Scale layer_scale(const Checker &check, const char *argument, const pa_tensor *tensor, double value,
                  const ReshapeAndCacheParams &p, int64_t *layer_stride) {
  *layer_stride = 0;
  if (tensor == nullptr || tensor->ndim != 2) {
    return cache_scale(check, argument, tensor, value, p.kv_dtype, p.num_kv_heads);
  }
  check.shaped(argument, tensor, {{"num_layers", p.num_layers}, {"1 or num_kv_heads"}});
  pa_tensor row = *tensor;
  row.ndim = 1;
  row.shape[0] = tensor->shape[1];
  row.strides[0] = tensor->strides[1];
  *layer_stride = tensor->strides[0];
  return cache_scale(check, argument, &row, value, p.kv_dtype, p.num_kv_heads, tensor);
}

// The arrays of all layers, none of which writes where another lies.
void validate_layers(const Checker &check, const pa_reshape_and_cache_args &args) {
  const Checker::List key = {"key", args.key, args.num_layers, false},
                      value = {"value", args.value, args.num_layers, false},
                      k_cache = {"k_cache", args.k_cache, args.num_layers, true},
                      v_cache = {"v_cache", args.v_cache, args.num_layers, true};
  for (const Checker::List &list : {key, value, k_cache, v_cache}) {
    check.alike(list);
    if (!list.written) continue;
    check.disjoint(list, "slot_mapping", args.slot_mapping);
    check.disjoint(list, "k_scale", args.k_scale);
    check.disjoint(list, "v_scale", args.v_scale);
  }
  check.disjoint_lists({key, value, k_cache, v_cache});
}

}  // namespace

Placement validate_reshape_and_cache(const pa_reshape_and_cache_args &args, ValidatedWrite *write) {
  Checker check("reshape_and_cache");
  check.set_device("key", args.key);
  if (args.num_layers < 1) check.fail("num_layers", "at least 1", std::to_string(args.num_layers));
  ReshapeAndCacheParams &p = write->params;
  validate_write(check, args, &p);
  p.num_layers = args.num_layers;
  p.k_scale = layer_scale(check, "k_scale", args.k_scale, args.k_scale_value, p, &p.k_scale_layer_stride);
  p.v_scale = layer_scale(check, "v_scale", args.v_scale, args.v_scale_value, p, &p.v_scale_layer_stride);
  if (args.num_layers > 1) {
    validate_layers(check, args);
  } else {
    Neighbours neighbours;
    neighbours.read("key", args.key);
    neighbours.read("value", args.value);
    neighbours.read("slot_mapping", args.slot_mapping);
    neighbours.read("k_scale", args.k_scale);
    neighbours.read("v_scale", args.v_scale);
    neighbours.written(check, "k_cache", args.k_cache);
    neighbours.written(check, "v_cache", args.v_cache);
  }
  write->layers.reserve(static_cast<size_t>(args.num_layers));
  for (int64_t i = 0; i < args.num_layers; ++i) {
    write->layers.push_back({args.key[i].data, args.value[i].data, args.k_cache[i].data, args.v_cache[i].data});
  }
  p.layers = write->layers.data();
  return placement_of(check, args.check);
}

namespace {

void validate_rotation(const Checker &check, const pa_rope_and_cache_args &args, RopeAndCacheParams *p) {
  const ReshapeAndCacheParams &w = p->write;
  if (w.head_dim % 2 != 0) check.fail("key", "of an even head_dim", tensor_text(*args.key));
  check.tensor("positions", args.positions);
  p->long_positions = args.positions->dtype == PA_INT64;
  check.vector("positions", args.positions, p->long_positions ? PA_INT64 : PA_INT32, {"T", w.num_tokens});
  p->positions = args.positions->data;

  check.shaped("cos_sin", args.cos_sin, {{"max_position"}, {"rotary_dim"}});
  check.unit_last_stride("cos_sin", *args.cos_sin);
  p->cos_sin_dtype = wide_dtype(check, "cos_sin", *args.cos_sin, args.kv_dtype);
  p->cos_sin = args.cos_sin->data;
  p->cos_sin_stride = args.cos_sin->strides[0];
  p->max_position = args.cos_sin->shape[0];
  const int64_t rotary_dim = args.cos_sin->shape[1];
  if (rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > w.head_dim) {
    check.fail("cos_sin", "of an even rotary_dim of 2 ... head_dim = " + std::to_string(w.head_dim),
               tensor_text(*args.cos_sin));
  }
  p->rotary_dim = static_cast<int32_t>(rotary_dim);
  check.flag("interleaved", args.interleaved);
  p->interleaved = args.interleaved != 0;
}

void validate_query(const Checker &check, const pa_rope_and_cache_args &args, RopeAndCacheParams *p) {
  if (args.query == nullptr) {
    if (args.query_out != nullptr) check.fail("query_out", "absent where there is no `query`", "an array");
    return;
  }
  const int64_t num_rows = args.key->shape[0];
  check.shaped("query", args.query, {{"T", num_rows}, {"num_q_heads"}, {"head_dim", p->write.head_dim}});
  p->num_q_heads = check.fits_int32("query", "num_q_heads", args.query->shape[1]);
  check.shaped("query_out", args.query_out,
               {{"T", num_rows}, {"num_q_heads", p->num_q_heads}, {"head_dim", p->write.head_dim}});
  struct Given {
    const char *name;
    const pa_tensor *tensor;
  };
  for (const Given &given : {Given{"query", args.query}, Given{"query_out", args.query_out}}) {
    check.unit_last_stride(given.name, *given.tensor);
    if (wide_dtype(check, given.name, *given.tensor, args.kv_dtype) == p->write.src_dtype) continue;
    check.fail(given.name, std::string("of the type of `key`, ") + dtype_name(args.key->dtype),
               tensor_text(*given.tensor));
  }
  check.output("query_out", *args.query_out);
  p->query = tokens_view(*args.query);
  p->query_out = tokens_view(*args.query_out);
}

// A query may be rotated in place, which is where each thread reads and writes the same elements.
bool in_place(const RopeAndCacheParams &p) {
  return p.query.data == p.query_out.data && p.query.token_stride == p.query_out.token_stride &&
         p.query.head_stride == p.query_out.head_stride;
}

}  // namespace

Placement validate_rope_and_cache(const pa_rope_and_cache_args &args, RopeAndCacheParams *p) {
  Checker check("rope_and_cache");
  check.set_device("key", args.key);
  ReshapeAndCacheParams &w = p->write;
  validate_write(check, args, &w);
  w.k_scale = cache_scale(check, "k_scale", args.k_scale, args.k_scale_value, w.kv_dtype, w.num_kv_heads);
  w.v_scale = cache_scale(check, "v_scale", args.v_scale, args.v_scale_value, w.kv_dtype, w.num_kv_heads);
  validate_rotation(check, args, p);
  validate_query(check, args, p);
  Neighbours neighbours;
  neighbours.read("key", args.key);
  neighbours.read("value", args.value);
  neighbours.read("slot_mapping", args.slot_mapping);
  neighbours.read("positions", args.positions);
  neighbours.read("cos_sin", args.cos_sin);
  neighbours.read("k_scale", args.k_scale);
  neighbours.read("v_scale", args.v_scale);
  if (!in_place(*p)) neighbours.read("query", args.query);
  neighbours.written(check, "query_out", args.query_out);
  neighbours.written(check, "k_cache", args.k_cache);
  neighbours.written(check, "v_cache", args.v_cache);
  return placement_of(check, args.check);
}

}  // namespace pagedattn
