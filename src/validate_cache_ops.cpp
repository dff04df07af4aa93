// merge_states, copy_blocks, swap_blocks, gather_kv.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>
#include <vector>

#include "describe.h"
#include "paged_checks.h"
#include "placement.h"
#include "validate.h"

namespace pagedattn {

Placement validate_merge_states(const pa_merge_states_args &args, ValidatedMerge *merge) {
  Checker check("merge_states");
  if (args.num_parts < 1) check.fail("outs", "at least one part", std::to_string(args.num_parts));
  if (args.outs == nullptr) check.fail("`outs` is required");
  if (args.lses == nullptr) check.fail("`lses` is required");
  check.set_device("outs", args.outs);

  check.shaped("outs[0]", args.outs, {{"T"}, {"num_heads"}, {"head_dim"}});
  const int64_t *shape = args.outs->shape;
  check.shaped("out", args.out, {{"T", shape[0]}, {"num_heads", shape[1]}, {"head_dim", shape[2]}});
  check.unit_last_stride("out", *args.out);
  check.output("out", *args.out);
  MergeStatesParams &p = merge->params;
  p.dtype = wide_dtype(check, "outs[0]", *args.outs, PA_DTYPE_NONE);
  if (args.out->dtype != args.outs->dtype) {
    check.fail("out", std::string("of the type of `outs[0]`, ") + dtype_name(args.outs->dtype), tensor_text(*args.out));
  }
  const std::initializer_list<Dim> lse_dims = {{"T", shape[0]}, {"num_heads", shape[1]}};
  if (args.lse != nullptr) {
    check.shaped("lse", args.lse, lse_dims);
    check.dtype("lse", *args.lse, PA_FLOAT32, lse_dims);
    check.output("lse", *args.lse);
    check.disjoint("lse", *args.lse, "out", args.out);
  }
  for (int64_t i = 0; i < args.num_parts; ++i) {
    const Name out_name("outs", i), lse_name("lses", i);
    const pa_tensor &out = args.outs[i], &lse = args.lses[i];
    check.shaped(out_name, &out, {{"T", shape[0]}, {"num_heads", shape[1]}, {"head_dim", shape[2]}});
    check.unit_last_stride(out_name, out);
    if (out.dtype != args.outs->dtype) {
      check.fail(out_name, std::string("of the type of `outs[0]`, ") + dtype_name(args.outs->dtype), tensor_text(out));
    }
    check.shaped(lse_name, &lse, lse_dims);
    check.dtype(lse_name, lse, PA_FLOAT32, lse_dims);
    check.disjoint("out", *args.out, out_name, &out);
    check.disjoint("out", *args.out, lse_name, &lse);
    if (args.lse != nullptr) {
      check.disjoint("lse", *args.lse, out_name, &out);
      check.disjoint("lse", *args.lse, lse_name, &lse);
    }
    merge->outs.push_back(tokens_view(out));
    merge->lses.push_back({static_cast<const float *>(lse.data), lse.strides[0], lse.strides[1]});
  }
  p.num_parts = args.num_parts;
  p.outs = merge->outs.data();
  p.lses = merge->lses.data();
  p.out = tokens_view(*args.out);
  if (args.lse != nullptr) {
    p.out_lse = static_cast<float *>(args.lse->data);
    p.out_lse_token_stride = args.lse->strides[0];
    p.out_lse_head_stride = args.lse->strides[1];
  }
  p.num_tokens = shape[0];
  p.num_heads = check.fits_int32("out", "num_heads", shape[1]);
  p.head_dim = check.fits_int32("out", "head_dim", shape[2]);
  return placement_of(check, 0);
}

namespace {

// A block of `src` and `dst` as far as one run of bytes describes both.
void set_block_layout(const pa_tensor &src, const pa_tensor &dst, int64_t element_size, CopyBlocksParams *p) {
  BlockLayout &block = p->block;
  block.ndim = src.ndim - 1;
  block.element_size = element_size;
  int64_t elements = 1;
  bool dense = true;
  for (int32_t i = src.ndim - 1; i >= 1; --i) {
    block.shape[i - 1] = src.shape[i];
    block.src_strides[i - 1] = src.strides[i];
    block.dst_strides[i - 1] = dst.strides[i];
    dense = dense && (src.shape[i] == 1 || (src.strides[i] == elements && dst.strides[i] == elements));
    elements *= src.shape[i];
  }
  block.contiguous_bytes = dense ? elements * element_size : 0;
  p->src_block_stride = src.strides[0];
  p->dst_block_stride = dst.strides[0];
  p->num_src_blocks = src.shape[0];
  p->num_dst_blocks = dst.shape[0];
}

void set_mapping(const Checker &check, const pa_tensor *mapping, CopyBlocksParams *p) {
  const std::initializer_list<Dim> dims = {{"num_pairs"}, {"2", 2}};
  check.tensor("block_mapping", mapping);
  check.dtype("block_mapping", *mapping, PA_INT64, dims);
  check.shaped("block_mapping", mapping, dims);
  check.unit_last_stride("block_mapping", *mapping);
  if (mapping->shape[0] > 1 && mapping->strides[0] != 2) {
    check.fail("block_mapping", "contiguous", "strides " + shape_text(2, mapping->strides));
  }
  p->mapping = static_cast<const int64_t *>(mapping->data);
  p->num_pairs = mapping->shape[0];
}

// Strides and numbers of blocks may differ between the sides of a swap.
void same_blocks(const Checker &check, const pa_tensor &src, const pa_tensor &dst) {
  bool same = dst.ndim == src.ndim && dst.dtype == src.dtype;
  for (int32_t i = 1; same && i < dst.ndim; ++i) same = dst.shape[i] == src.shape[i];
  if (!same) check.fail("dst[0]", "of the type and block shape of `src[0]`, " + tensor_text(src), tensor_text(dst));
}

// The caches of one side.
void validate_caches(const Checker &check, const Checker::List &caches, const pa_tensor *mapping,
                     std::vector<void *> *addresses) {
  check.alike(caches);
  if (caches.tensors[0].ndim < 1) {
    check.fail(Name(caches.argument, 0), "of shape (num_blocks, ...)", tensor_text(caches.tensors[0]));
  }
  if (caches.written) check.disjoint(caches, "block_mapping", mapping);
  addresses->reserve(static_cast<size_t>(caches.count));
  for (int64_t i = 0; i < caches.count; ++i) addresses->push_back(caches.tensors[i].data);
}

}  // namespace

Placement validate_copy_blocks(const pa_copy_blocks_args &args, ValidatedCopy *copy) {
  Checker check("copy_blocks");
  if (args.num_caches < 1) check.fail("caches", "at least one cache", std::to_string(args.num_caches));
  if (args.caches == nullptr) check.fail("`caches` is required");
  check.set_device("caches", args.caches);
  check.check_mode(args.check);
  CopyBlocksParams &p = copy->params;
  set_mapping(check, args.block_mapping, &p);
  const Checker::List caches = {"caches", args.caches, args.num_caches, true};
  validate_caches(check, caches, args.block_mapping, &copy->src);
  check.disjoint_lists({caches});
  set_block_layout(args.caches[0], args.caches[0], element_size(args.caches[0].dtype), &p);
  p.num_caches = args.num_caches;
  p.src = copy->src.data();
  p.dst = copy->src.data();
  return placement_of(check, args.check);
}

Placement validate_swap_blocks(const pa_swap_blocks_args &args, ValidatedCopy *copy) {
  Checker host("swap_blocks");
  if (args.num_caches < 1) host.fail("src", "at least one cache", std::to_string(args.num_caches));
  if (args.src == nullptr) host.fail("`src` is required");
  if (args.dst == nullptr) host.fail("`dst` is required");
  // Each side has a device of its own; the mapping is the host's.
  Checker src_check("swap_blocks"), dst_check("swap_blocks");
  src_check.set_device("src", args.src);
  dst_check.set_device("dst", args.dst);
  CopyBlocksParams &p = copy->params;
  set_mapping(host, args.block_mapping, &p);
  const Checker::List src = {"src", args.src, args.num_caches, false}, dst = {"dst", args.dst, args.num_caches, true};
  validate_caches(src_check, src, args.block_mapping, &copy->src);
  validate_caches(dst_check, dst, args.block_mapping, &copy->dst);
  dst_check.disjoint_lists({src, dst});
  same_blocks(host, args.src[0], args.dst[0]);
  if (src_check.on_cuda() && dst_check.on_cuda() && src_check.device_id() != dst_check.device_id()) {
    host.fail("dst", "on the device of `src` or on the host", device_text(PA_CUDA, dst_check.device_id()));
  }
  set_block_layout(args.src[0], args.dst[0], element_size(args.src[0].dtype), &p);
  p.num_caches = args.num_caches;
  p.src = copy->src.data();
  p.dst = copy->dst.data();
  p.src_on_host = !src_check.on_cuda();
  p.dst_on_host = !dst_check.on_cuda();
  if (args.event != nullptr && p.src_on_host && p.dst_on_host) {
    host.fail("event", "absent for host arrays, which have been copied on return", "an event");
  }
  p.event = args.event;
  return placement_of(src_check.on_cuda() ? src_check : dst_check, 1);
}

Placement validate_gather_kv(const pa_gather_kv_args &args, GatherKvParams *p) {
  Checker check("gather_kv");
  check.set_device("k_cache", args.k_cache);
  check.check_mode(args.check);
  validate_cache_pair(check, args.k_cache, args.v_cache, Dim::kAny, Dim::kAny, args.kv_dtype, p);

  validate_sequences(check, args.seq_lens, args.block_tables, p);
  const int64_t num_seqs = p->num_seqs;
  if (args.seq_starts != nullptr) {
    check.vector("seq_starts", args.seq_starts, PA_INT32, {"num_seqs", num_seqs});
    p->seq_starts = static_cast<const int32_t *>(args.seq_starts->data);
  }
  if (args.out_start_loc != nullptr) {
    check.vector("out_start_loc", args.out_start_loc, PA_INT32, {"num_seqs + 1", num_seqs + 1});
    p->out_start_loc = static_cast<const int32_t *>(args.out_start_loc->data);
  }

  check.shaped("k_out", args.k_out, {{"R"}, {"num_kv_heads", p->num_kv_heads}, {"head_dim", p->head_dim}});
  p->num_rows = args.k_out->shape[0];
  check.shaped("v_out", args.v_out, {{"R", p->num_rows}, {"num_kv_heads", p->num_kv_heads}, {"head_dim", p->head_dim}});
  // An output of the cache's own type, or of its storage's, is a plain copy; any other must be a wider float.
  const bool raw = args.k_out->dtype == args.k_cache->dtype || args.k_out->dtype == static_cast<int32_t>(p->kv_dtype);
  p->out_dtype = raw ? p->kv_dtype : wide_dtype(check, "k_out", *args.k_out, PA_DTYPE_NONE);
  if (p->out_dtype != p->kv_dtype && !is_float8(p->kv_dtype)) {
    check.fail("k_out", std::string("of the type of `k_cache`, ") + dtype_name(static_cast<int32_t>(p->kv_dtype)),
               tensor_text(*args.k_out));
  }
  if (args.v_out->dtype != args.k_out->dtype) {
    check.fail("v_out", std::string("of the type of `k_out`, ") + dtype_name(args.k_out->dtype),
               tensor_text(*args.v_out));
  }
  if (p->out_dtype == p->kv_dtype &&
      (args.k_scale != nullptr || args.v_scale != nullptr || args.k_scale_value != 1.0 || args.v_scale_value != 1.0)) {
    const bool of_keys = args.k_scale != nullptr || args.k_scale_value != 1.0;
    check.fail(of_keys ? "k_scale" : "v_scale", "absent unless a float8 cache is dequantised",
               "a scale for a plain copy");
  }
  p->k_scale = cache_scale(check, "k_scale", args.k_scale, args.k_scale_value, p->kv_dtype, p->num_kv_heads);
  p->v_scale = cache_scale(check, "v_scale", args.v_scale, args.v_scale_value, p->kv_dtype, p->num_kv_heads);

  struct Written {
    const char *name;
    const pa_tensor *tensor;
  };
  for (const Written &written : {Written{"k_out", args.k_out}, Written{"v_out", args.v_out}}) {
    check.unit_last_stride(written.name, *written.tensor);
    check.output(written.name, *written.tensor);
    check.disjoint(written.name, *written.tensor, "k_cache", args.k_cache);
    check.disjoint(written.name, *written.tensor, "v_cache", args.v_cache);
    check.disjoint(written.name, *written.tensor, "block_tables", args.block_tables);
    check.disjoint(written.name, *written.tensor, "seq_lens", args.seq_lens);
    check.disjoint(written.name, *written.tensor, "seq_starts", args.seq_starts);
    check.disjoint(written.name, *written.tensor, "out_start_loc", args.out_start_loc);
    check.disjoint(written.name, *written.tensor, "k_scale", args.k_scale);
    check.disjoint(written.name, *written.tensor, "v_scale", args.v_scale);
  }
  check.disjoint("v_out", *args.v_out, "k_out", args.k_out);
  p->k_out = tokens_view(*args.k_out);
  p->v_out = tokens_view(*args.v_out);
  return placement_of(check, args.check);
}

}  // namespace pagedattn
