// Scratch memory that a thread keeps between calls.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <new>

namespace pagedattn::cpu {

// A buffer that only grows.  Meant to be thread_local: get() may move it and keeps none of its contents.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { release(); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;

  // At least `size` bytes, aligned to 64.
  void *get(size_t size) {
    if (!reserve(size)) throw std::bad_alloc();
    return data_;
  }
  // The same, or null where there is not as much memory; `size` is at least 1.
  void *try_get(size_t size) noexcept { return reserve(size) ? data_ : nullptr; }

 private:
  static constexpr std::align_val_t kAlignment{64};

  bool reserve(size_t size) noexcept {
    if (size <= size_) return true;
    release();
    data_ = ::operator new(size, kAlignment, std::nothrow);
    if (data_ != nullptr) size_ = size;
    return data_ != nullptr;
  }

  void release() noexcept {
    if (data_ != nullptr) ::operator delete(data_, kAlignment);
    data_ = nullptr;
    size_ = 0;
  }

  void *data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace pagedattn::cpu
