// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <string>

#include "describe.h"
#include "paged_checks.h"
#include "placement.h"
#include "validate.h"

namespace pagedattn {

namespace {

constexpr int32_t kMaxHeadDim = 256;

// Float8 queries are of the cache's type, so that `kv_dtype` names what both hold.
DType query_dtype(const Checker &check, const pa_attention_args &args) {
  const pa_tensor &q = *args.q;
  const bool wide = (q.dtype >= PA_FLOAT32 && q.dtype <= PA_BFLOAT16) || q.dtype == PA_UINT16;
  return wide ? wide_dtype(check, "q", q, args.kv_dtype) : cache_dtype(check, "q", q, args.kv_dtype);
}

void validate_heads(const Checker &check, const pa_attention_args &args, AttentionParams *p) {
  check.shaped("q", args.q, {{"T"}, {"num_q_heads"}, {"head_dim"}});
  p->num_tokens = args.q->shape[0];
  p->num_q_heads = check.fits_int32("q", "num_q_heads", args.q->shape[1]);
  const int64_t head_dim = args.q->shape[2];
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    check.fail("`q` must have a head_dim that is a multiple of 8 from 8 to 256; got " + tensor_text(*args.q));
  }
  p->head_dim = static_cast<int32_t>(head_dim);
  check.unit_last_stride("q", *args.q);
  p->q_dtype = query_dtype(check, args);
  p->q = tokens_view(*args.q);
}

void validate_caches(const Checker &check, const pa_attention_args &args, AttentionParams *p) {
  validate_cache_pair(check, args.k_cache, args.v_cache, Dim::kAny, p->head_dim, args.kv_dtype, p);
  if (p->num_q_heads < 1 || p->num_q_heads % p->num_kv_heads != 0) {
    check.fail("`q` must have a positive multiple of the " + std::to_string(p->num_kv_heads) +
               " KV heads of `k_cache` as query heads; got " + std::to_string(p->num_q_heads));
  }
  if (p->kv_dtype != p->q_dtype && !(is_float8(p->kv_dtype) && dtype_size(p->q_dtype) == 2)) {
    check.fail("k_cache",
               std::string("of the type of `q`, ") + dtype_name(static_cast<int32_t>(p->q_dtype)) +
                   (is_float8(p->q_dtype) ? "" : ", or float8 with a 16-bit `q`"),
               dtype_name(static_cast<int32_t>(p->kv_dtype)));
  }
  if (!is_float8(p->q_dtype) && (args.q_scale != nullptr || args.q_scale_value != 1.0)) {
    check.fail("q_scale", "absent: only float8 queries are scaled",
               std::string("a scale for ") + dtype_name(static_cast<int32_t>(p->q_dtype)) + " queries");
  }
  p->q_scale = head_scale(check, "q_scale", args.q_scale, args.q_scale_value, p->num_kv_heads);
  p->k_scale = cache_scale(check, "k_scale", args.k_scale, args.k_scale_value, p->kv_dtype, p->num_kv_heads);
  p->v_scale = cache_scale(check, "v_scale", args.v_scale, args.v_scale_value, p->kv_dtype, p->num_kv_heads);
}

void validate_queries(const Checker &check, const pa_attention_args &args, AttentionParams *p) {
  const int64_t num_seqs = p->num_seqs;
  check.fits_int32("q", "T", p->num_tokens);
  if (args.query_start_loc != nullptr) {
    check.vector("query_start_loc", args.query_start_loc, PA_INT32, {"num_seqs + 1", num_seqs + 1});
    p->query_start_loc = static_cast<const int32_t *>(args.query_start_loc->data);
  } else if (p->num_tokens != num_seqs) {
    check.fail("query_start_loc",
               "given unless every sequence has one query token (T = num_seqs = " + std::to_string(num_seqs) + ")",
               "none with T = " + std::to_string(p->num_tokens));
  }
  if (args.max_query_len < 0) {
    check.fail("max_query_len", "at least 1 (absent: not known)", std::to_string(args.max_query_len));
  }
  const int64_t most = args.query_start_loc == nullptr ? 1 : p->num_tokens;
  p->max_query_len = args.max_query_len == 0 ? most : std::min(args.max_query_len, most);
}

// Whether float32 has a number for it that is 0 only where it is, and as precise as others.
bool fits_float32(double value) {
  const float size = std::abs(static_cast<float>(value));
  return value == 0.0 || (size >= std::numeric_limits<float>::min() && size <= std::numeric_limits<float>::max());
}

void validate_options(const Checker &check, const pa_attention_args &args, AttentionParams *p) {
  // A smaller one would become 0, and attention the mean of all values.
  if (!std::isnan(args.scale) && !fits_float32(args.scale)) {
    check.fail("scale", "0 or a finite number in the range of normal float32", number_text(args.scale));
  }
  p->scale =
      std::isnan(args.scale) ? 1.0f / std::sqrt(static_cast<float>(p->head_dim)) : static_cast<float>(args.scale);
  p->softcap = static_cast<float>(args.softcap);
  // A smaller one would be off in float32, or scores divided by it infinite.
  if (!(args.softcap >= 0.0) || !fits_float32(args.softcap)) {
    check.fail("softcap", "0 (off) or a finite positive number in the range of normal float32",
               number_text(args.softcap));
  }
  if (args.window < 0) check.fail("window", "at least 1 (absent: no window)", std::to_string(args.window));
  p->window = args.window;
  check.flag("causal", args.causal);
  check.flag("deterministic", args.deterministic);
  p->causal = args.causal != 0;
  p->deterministic = args.deterministic != 0;
  const Dim heads{"num_q_heads", p->num_q_heads};
  if (args.alibi_slopes != nullptr) {
    check.vector("alibi_slopes", args.alibi_slopes, PA_FLOAT32, heads);
    p->alibi_slopes = static_cast<const float *>(args.alibi_slopes->data);
  }
  if (args.sinks != nullptr) {
    check.vector("sinks", args.sinks, PA_FLOAT32, heads);
    p->sinks = static_cast<const float *>(args.sinks->data);
  }
}

void validate_written_apart(const Checker &check, const pa_attention_args &args) {
  Neighbours neighbours;
  neighbours.read("q", args.q);
  neighbours.read("k_cache", args.k_cache);
  neighbours.read("v_cache", args.v_cache);
  neighbours.read("block_tables", args.block_tables);
  neighbours.read("seq_lens", args.seq_lens);
  neighbours.read("query_start_loc", args.query_start_loc);
  neighbours.read("alibi_slopes", args.alibi_slopes);
  neighbours.read("sinks", args.sinks);
  neighbours.read("q_scale", args.q_scale);
  neighbours.read("k_scale", args.k_scale);
  neighbours.read("v_scale", args.v_scale);
  neighbours.written(check, "out", args.out);
  neighbours.written(check, "lse", args.lse);
  neighbours.written(check, "workspace", args.workspace);
}

void validate_outputs(const Checker &check, const pa_attention_args &args, AttentionParams *p) {
  const pa_tensor &q = *args.q;
  check.shaped("out", args.out, {{"T", q.shape[0]}, {"num_q_heads", q.shape[1]}, {"head_dim", q.shape[2]}});
  check.unit_last_stride("out", *args.out);
  p->out_dtype = wide_dtype(check, "out", *args.out, args.kv_dtype);
  if (is_float8(p->q_dtype) && dtype_size(p->out_dtype) != 2) {
    check.fail("out", "float16 or bfloat16 with a float8 `q`", tensor_text(*args.out));
  }
  if (!is_float8(p->q_dtype) && p->out_dtype != p->q_dtype) {
    check.fail("out", std::string("of the type of `q`, ") + dtype_name(q.dtype), tensor_text(*args.out));
  }
  check.output("out", *args.out);
  p->out = tokens_view(*args.out);

  if (args.lse != nullptr) {
    const std::initializer_list<Dim> dims = {{"T", q.shape[0]}, {"num_q_heads", q.shape[1]}};
    check.shaped("lse", args.lse, dims);
    check.dtype("lse", *args.lse, PA_FLOAT32, dims);
    check.output("lse", *args.lse);
    p->lse = static_cast<float *>(args.lse->data);
    p->lse_token_stride = args.lse->strides[0];
    p->lse_head_stride = args.lse->strides[1];
  }
  if (args.workspace != nullptr) {
    check.vector("workspace", args.workspace, PA_UINT8, {"bytes"});
    check.output("workspace", *args.workspace);
    if (reinterpret_cast<uintptr_t>(args.workspace->data) % 16 != 0) {
      check.fail("workspace", "aligned to 16 bytes", "an address that is not");
    }
    p->workspace = args.workspace->data;
    p->workspace_size = static_cast<size_t>(args.workspace->shape[0]);
  }
  validate_written_apart(check, args);
}

}  // namespace

Placement validate_attention(const pa_attention_args &args, bool needs_out, AttentionParams *params) {
  Checker check("paged_attention");
  check.set_device("q", args.q);
  check.check_mode(args.check);
  validate_heads(check, args, params);
  validate_caches(check, args, params);
  validate_sequences(check, args.seq_lens, args.block_tables, params);
  validate_queries(check, args, params);
  validate_options(check, args, params);
  if (needs_out) validate_outputs(check, args, params);
  return placement_of(check, args.check);
}

}  // namespace pagedattn
