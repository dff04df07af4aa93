// Zeroed memory that the system provides page by page on first touch: a pool may be declared large and cost little.
//
// It begins at a cache line, so that elements whose size divides a line never lie in two. A large one begins at a huge
// page and asks for such: it is read here and there, and the processor knows where few small pages lie at a time.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pagedattn::blocks {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{1} << 21;

template <typename T>
class LazyArray {
 public:
  explicit LazyArray(int64_t size) {
    const auto count = static_cast<size_t>(size);
    if (count > std::numeric_limits<size_t>::max() / 2 / sizeof(T)) throw std::bad_alloc();
    const size_t bytes = count * sizeof(T);
    const size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
    memory_.reset(std::calloc(bytes + alignment, 1));
    if (memory_ == nullptr) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T *>((address + alignment - 1) / alignment * alignment);
#ifdef MADV_HUGEPAGE
    // Only whole ones, so that no more memory is used. A system that has none goes on as before.
    if (alignment == kHugePage) madvise(data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
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
