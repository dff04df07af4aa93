// Zeroed memory that the system provides page by page on first touch: a pool may be declared large and cost little.
//
// It begins at a cache line, so that elements whose size divides a line never lie in two.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace pagedattn::blocks {

constexpr size_t kCacheLine = 64;

template <typename T>
class LazyArray {
 public:
  explicit LazyArray(int64_t size) {
    const auto count = static_cast<size_t>(size);
    if (count > std::numeric_limits<size_t>::max() / 2 / sizeof(T)) throw std::bad_alloc();
    memory_.reset(std::calloc(count * sizeof(T) + kCacheLine, 1));
    if (memory_ == nullptr) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T *>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
  }
  T &operator[](int64_t i) { return data_[i]; }
  const T &operator[](int64_t i) const { return data_[i]; }

  // Soon to be read, or written: asks for the line now, so that the wait overlaps with other work.
  void prefetch(int64_t i) const { __builtin_prefetch(data_ + i); }
  void prefetch_for_writing(int64_t i) const { __builtin_prefetch(data_ + i, 1); }

 private:
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  T *data_ = nullptr;
};

inline int64_t checked_product(int64_t a, int64_t b) {
  if (b != 0 && a > std::numeric_limits<int64_t>::max() / b) throw std::bad_alloc();
  return a * b;
}

}  // namespace pagedattn::blocks
