// How wide an access may be, and how threads are laid over rows of accesses.
//
// SPDX-License-Identifier: Apache-2.0
//
// The operations that move rows (tokens, blocks) differ in where a row lies, not in how it is moved: each thread takes
// the widest access that all addresses and strides allow, up to 16 bytes, and neighbouring threads take neighbours.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "status.h"

namespace pagedattn::cuda {

constexpr int kThreadsPerBlock = 256;

// Gathers what an access must divide: addresses, strides and lengths, all in bytes.
class AccessWidth {
 public:
  explicit AccessWidth(int64_t row_bytes) : bits_(kWidest | static_cast<uint64_t>(row_bytes)) {}

  void address(const void *pointer) { bits_ |= reinterpret_cast<uintptr_t>(pointer); }

  // The stride of a dimension that has one index is never used, and arrays may hold anything there.
  void stride(int64_t bytes, int64_t extent) {
    if (extent > 1) bits_ |= static_cast<uint64_t>(bytes);
  }

  // 16, 8, 4, 2 or 1: the lowest bit set in any of them.
  int64_t bytes() const { return int64_t{1} << std::countr_zero(bits_); }

 private:
  static constexpr uint64_t kWidest = 16;
  uint64_t bits_;
};

// Calls `f` with a value of an unsigned type of `bytes` bytes.
template <class F>
void with_access(int64_t bytes, F &&f) {
  switch (bytes) {
    case 16:
      return f(uint4{});
    case 8:
      return f(uint2{});
    case 4:
      return f(uint32_t{});
    case 2:
      return f(uint16_t{});
    default:
      return f(uint8_t{});
  }
}

inline int checked_int(int64_t value, const char *what) {
  if (value <= std::numeric_limits<int32_t>::max()) return static_cast<int>(value);
  throw Error(PA_ERROR_UNSUPPORTED, std::string("too many ") + what + " for one launch: " + std::to_string(value));
}

inline unsigned checked_unsigned(int64_t value, const char *what) {
  return static_cast<unsigned>(checked_int(value, what));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads that share a row of `accesses`: enough to pass over it in equal strides, whole warps where it is long.
inline unsigned lanes_for_row(int64_t accesses) {
  if (accesses <= 32) return std::bit_ceil(static_cast<unsigned>(accesses));
  const int64_t passes = ceil_div(accesses, kThreadsPerBlock);
  return static_cast<unsigned>(ceil_div(ceil_div(accesses, passes), 32) * 32);
}

// A block of threads: x along a row, y over rows.
inline dim3 threads_over_rows(int64_t accesses) {
  const unsigned lanes = lanes_for_row(accesses);
  return dim3(lanes, static_cast<unsigned>(kThreadsPerBlock) / lanes);
}

inline unsigned blocks_over_rows(int64_t num_rows, int64_t rows_per_block) {
  return checked_unsigned(ceil_div(num_rows, rows_per_block), "rows");
}

__device__ inline void prefetch_to_l2(const void *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

}  // namespace pagedattn::cuda
