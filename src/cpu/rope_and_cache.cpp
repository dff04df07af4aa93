// rope_and_cache on the CPU: each head is widened to float32, rotated there, and rounded to where it goes.
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "status.h"

namespace pagedattn::cpu {
namespace {

// One head and its position's cosines and sines in float32.
class HeadRotation {
 public:
  HeadRotation(const RopeAndCacheParams &p, const Kernels &k)
      : p_(p), k_(k), head_(static_cast<size_t>(p.write.head_dim)), cos_sin_(static_cast<size_t>(p.rotary_dim)) {}

  void set_position(int64_t position) {
    const int64_t at = position * p_.cos_sin_stride * dtype_size(p_.cos_sin_dtype);
    k_.dequantize_row(DType::kFloat32, cos_sin_.data(), p_.cos_sin_dtype, static_cast<const char *>(p_.cos_sin) + at,
                      1.0f, p_.rotary_dim);
  }

  void write(const char *src, bool rotated, DType dst_dtype, char *dst, float scale) {
    const DType src_dtype = p_.write.src_dtype;
    const int64_t n = p_.write.head_dim;
    k_.dequantize_row(DType::kFloat32, head_.data(), src_dtype, src, 1.0f, n);
    if (rotated) rotate();
    k_.quantize_row(dst_dtype, dst, DType::kFloat32, head_.data(), scale, n);
  }

 private:
  void rotate() {
    const int32_t half = p_.rotary_dim / 2;
    const float *cosine = cos_sin_.data();
    const float *sine = cosine + half;
    float *x = head_.data();
    const auto rotate_pair = [&](int32_t i, float &a, float &b) {
      const float rotated_a = a * cosine[i] - b * sine[i];
      b = b * cosine[i] + a * sine[i];
      a = rotated_a;
    };
    if (p_.interleaved) {
      for (int32_t i = 0; i < half; ++i) rotate_pair(i, x[2 * i], x[2 * i + 1]);
    } else {
      for (int32_t i = 0; i < half; ++i) rotate_pair(i, x[i], x[half + i]);
    }
  }

  const RopeAndCacheParams &p_;
  const Kernels &k_;
  std::vector<float> head_;
  std::vector<float> cos_sin_;
};

const char *token_head(const TokensView &view, int64_t token, int64_t head, DType dtype) {
  return static_cast<const char *>(view.data) +
         (token * view.token_stride + head * view.head_stride) * dtype_size(dtype);
}

char *cache_head(const CacheView &view, int64_t block, int64_t offset, int64_t head, DType dtype) {
  return static_cast<char *>(view.data) +
         (block * view.block_stride + offset * view.token_stride + head * view.head_stride) * dtype_size(dtype);
}

void write_token(const RopeAndCacheParams &p, HeadRotation &rotation, int64_t token) {
  const ReshapeAndCacheParams &w = p.write;
  rotation.set_position(p.position(token));
  for (int32_t head = 0; head < p.num_q_heads; ++head) {
    char *out = const_cast<char *>(token_head(p.query_out, token, head, w.src_dtype));
    rotation.write(token_head(p.query, token, head, w.src_dtype), true, w.src_dtype, out, 1.0f);
  }
  const int64_t slot = w.slot_mapping[token];
  if (slot < 0) return;  // padding
  const int64_t block = slot / w.block_size, offset = slot % w.block_size;
  for (int32_t head = 0; head < w.num_kv_heads; ++head) {
    rotation.write(token_head(w.key, token, head, w.src_dtype), true, w.kv_dtype,
                   cache_head(w.k_cache, block, offset, head, w.kv_dtype), w.k_scale.of_head(head));
    rotation.write(token_head(w.value, token, head, w.src_dtype), false, w.kv_dtype,
                   cache_head(w.v_cache, block, offset, head, w.kv_dtype), w.v_scale.of_head(head));
  }
}

}  // namespace

void rope_and_cache(const RopeAndCacheParams &p) {
  const ReshapeAndCacheParams &w = p.write;
  const Kernels &k = kernels();
  // In float32, through which every element goes.
  const int64_t token_bytes = 8 * (p.num_q_heads + int64_t{2} * w.num_kv_heads) * w.head_dim;
  const int64_t tokens_a_task = std::max<int64_t>(1, kMinParallelWork / std::max<int64_t>(1, token_bytes));
  parallel_for((w.num_tokens + tokens_a_task - 1) / tokens_a_task, [&](int64_t task, int) {
    HeadRotation rotation(p, k);
    const int64_t end = std::min(w.num_tokens, (task + 1) * tokens_a_task);
    for (int64_t token = task * tokens_a_task; token < end; ++token) write_token(p, rotation, token);
  });
  record_kernel("rope_and_cache", k.rope_and_cache_name);
}

}  // namespace pagedattn::cpu
