// Fetching a tile of keys or values ahead of its use.
//
// SPDX-License-Identifier: Apache-2.0
//
// Blocks lie anywhere and are no longer than a few pages, so the processor's own prefetchers reach from one to the next
// too late.  Kernels go over a tile head by head; memory likes it in the order of addresses.  So while one tile is
// computed with, the next one is walked as it lies, a few lines at a time, and into L2: L1 could not keep it, since the
// same head of successive tokens often lies a power of two apart and falls on the same few sets.
#pragma once

#include "kernels/attention_state.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

template <class T>
class Fetch {
 public:
  // Nothing to fetch.
  Fetch() = default;
  // The keys or values (`offsets`) of `count` tokens, for all heads of the item.
  Fetch(const CacheView &cache, const AttentionWork &work, const int64_t *offsets, int count, int head_dim)
      : base_(head_data<T>(cache, work, 0)),
        offsets_(offsets),
        head_stride_(cache.head_stride),
        count_(count),
        num_heads_(work.head_end - work.head_begin),
        heads_inside_(cache.head_stride < cache.token_stride) {
    if (head_stride_ == head_dim) {  // one run a token
      head_dim *= num_heads_;
      num_heads_ = 1;
    }
    lines_of_run_ = (head_dim * static_cast<int>(sizeof(typename T::Storage)) + kLine - 1) / kLine;
    runs_left_ = count * num_heads_;
    begin_run();
  }

  // Lines of one token and head.
  PA_INLINE int lines_of_row(int head_dim) {
    return (head_dim * static_cast<int>(sizeof(typename T::Storage)) + kLine - 1) / kLine;
  }

  // What a loop asks for.  Wide vectors ask in each step for as much as it uses, since a burst fills the buffers that
  // loads of the lines at hand need too; narrow ones, which take more steps for a line, for many steps at once.
  __attribute__((always_inline)) void before_steps(int num_lines) {
    if constexpr (!kInSteps) lines(num_lines);
  }
  template <int kBytes>
  __attribute__((always_inline)) void in_step() {
    if constexpr (!kInSteps) return;
    if constexpr (kBytes % kLine == 0) {
      lines(kBytes / kLine);
    } else {
      due_ += kBytes;
      lines(due_ / kLine);
      due_ %= kLine;
    }
  }

  // The next `n` lines.
  __attribute__((always_inline)) void lines(int n) {
    while (n > 0 && lines_left_ > 0) {
      const int now = n < lines_left_ ? n : lines_left_;
#pragma GCC unroll 4
      for (int i = 0; i < now; ++i) prefetch<Cache::kL2>(next_ + i * kLine);
      next_ += now * kLine;
      n -= now;
      lines_left_ -= now;
      if (lines_left_ == 0) begin_run();
    }
  }

 private:
  static constexpr int kLine = 64;
  static constexpr bool kInSteps = kWidth == 16;

  void begin_run() {
    if (runs_left_ == 0) return;
    --runs_left_;
    next_ = reinterpret_cast<const char *>(base_ + offsets_[token_] + head_ * head_stride_);
    lines_left_ = lines_of_run_;
    if (heads_inside_) {
      if (++head_ == num_heads_) head_ = 0, ++token_;
    } else {
      if (++token_ == count_) token_ = 0, ++head_;
    }
  }

  const char *next_ = nullptr;
  int due_ = 0;         // bytes that steps asked for and that make no line yet
  int lines_left_ = 0;  // of the run at hand
  int runs_left_ = 0;
  int lines_of_run_ = 0;
  const typename T::Storage *base_ = nullptr;
  const int64_t *offsets_ = nullptr;
  int64_t head_stride_ = 0;
  int count_ = 0;
  int num_heads_ = 0;
  bool heads_inside_ = true;
  int head_ = 0;
  int token_ = 0;
};

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
