// merge_states on the CPU: a weighted mean of the parts' rows, weights proportional to exp(lse).
//
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/backend.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "status.h"

namespace pagedattn::cpu {
namespace {

// Weights of the parts of one row; returns the row's lse.  Parts at -inf get 0, and are then not read.
float row_weights(const MergeStatesParams &p, int64_t token, int64_t head, float *weights) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const auto lse_of = [&](int64_t part) {
    const MergeStatesParams::Lse &lse = p.lses[part];
    return lse.data[token * lse.token_stride + head * lse.head_stride];
  };
  float largest = kNothing;
  for (int64_t part = 0; part < p.num_parts; ++part) largest = std::max(largest, lse_of(part));
  double sum = 0.0;
  for (int64_t part = 0; part < p.num_parts; ++part) {
    const float lse = lse_of(part);
    weights[part] = lse == kNothing ? 0.0f : std::exp(lse - largest);
    sum += static_cast<double>(weights[part]);
  }
  if (sum == 0.0) return kNothing;
  for (int64_t part = 0; part < p.num_parts; ++part) {
    weights[part] = static_cast<float>(static_cast<double>(weights[part]) / sum);
  }
  return static_cast<float>(static_cast<double>(largest) + std::log(sum));
}

}  // namespace

void merge_states(const MergeStatesParams &p) {
  const Kernels &k = kernels();
  const int64_t element = dtype_size(p.dtype);
  const int64_t token_bytes = (p.num_parts + 1) * p.num_heads * p.head_dim * element;
  const int64_t tokens_a_task = std::max<int64_t>(1, kMinParallelWork / std::max<int64_t>(1, token_bytes));
  const int64_t num_tasks = (p.num_tokens + tokens_a_task - 1) / tokens_a_task;

  parallel_for(num_tasks, [&](int64_t task, int) {
    std::vector<float> weights(static_cast<size_t>(p.num_parts));
    std::vector<const void *> rows(static_cast<size_t>(p.num_parts));
    const int64_t end = std::min(p.num_tokens, (task + 1) * tokens_a_task);
    for (int64_t token = task * tokens_a_task; token < end; ++token) {
      for (int64_t head = 0; head < p.num_heads; ++head) {
        const auto row_of = [&](const TokensView &view) {
          return static_cast<char *>(view.data) + (token * view.token_stride + head * view.head_stride) * element;
        };
        const float lse = row_weights(p, token, head, weights.data());
        for (int64_t part = 0; part < p.num_parts; ++part) rows[static_cast<size_t>(part)] = row_of(p.outs[part]);
        k.merge_row(p.dtype, row_of(p.out), rows.data(), weights.data(), p.num_parts, p.head_dim);
        if (p.out_lse != nullptr) p.out_lse[token * p.out_lse_token_stride + head * p.out_lse_head_stride] = lse;
      }
    }
  });
  record_kernel("merge_states", k.merge_states_name);
}

}  // namespace pagedattn::cpu
