// Copies past the caches: what is written is not read into them first, and pushes nothing else out.
//
// SPDX-License-Identifier: Apache-2.0
//
// An ordinary store fetches its line before it overwrites it, so a copy moves three bytes for each two; the C library
// avoids that for large copies, and a block is too small for it to see.  The processor's prefetcher stops at the end of
// a page, which is the end of many a block, so lines are asked for a distance ahead, across runs.
#pragma once

#include "kernels/simd.h"

namespace pagedattn::cpu::PAGEDATTN_ISA {

#if defined(__x86_64__)
// A page: within it the processor's own prefetcher runs ahead.  Into the second level, which has room for it.
constexpr int64_t kStreamAhead = 4096;
constexpr int kSecondLevel = 2;

#if defined(__AVX512F__)
constexpr int64_t kStreamBytes = 64;
PA_INLINE void stream_bytes(char *dst, const char *src) {
  _mm512_stream_si512((__m512i *)dst, _mm512_loadu_si512(src));
}
#elif defined(__AVX2__)
constexpr int64_t kStreamBytes = 32;
PA_INLINE void stream_bytes(char *dst, const char *src) {
  _mm256_stream_si256((__m256i *)dst, _mm256_loadu_si256((const __m256i *)src));
}
#else
constexpr int64_t kStreamBytes = 16;
PA_INLINE void stream_bytes(char *dst, const char *src) {
  _mm_stream_si128((__m128i *)dst, _mm_loadu_si128((const __m128i *)src));
}
#endif

static void stream_run(void *dst, const void *src, const void *next, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  char *to = static_cast<char *>(dst);
  const char *from = static_cast<const char *>(src);
  const char *following = static_cast<const char *>(next);
  const int64_t distance = bytes < kStreamAhead ? bytes : kStreamAhead;
  int64_t i = static_cast<int64_t>(-(uintptr_t)to & (kLineBytes - 1));
  if (i > bytes) i = bytes;
  __builtin_memcpy(to, from, static_cast<size_t>(i));
  for (; i + kLineBytes <= bytes; i += kLineBytes) {
    const int64_t ahead = i + distance;
    __builtin_prefetch(ahead < bytes ? from + ahead : following + (ahead - bytes), 0, kSecondLevel);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kLineBytes; k += kStreamBytes) stream_bytes(to + i + k, from + i + k);
  }
  __builtin_memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

static void finish_streaming() { _mm_sfence(); }

#else

static void stream_run(void *dst, const void *src, const void *, int64_t bytes) {
  __builtin_memcpy(dst, src, static_cast<size_t>(bytes));
}

static void finish_streaming() {}

#endif

}  // namespace pagedattn::cpu::PAGEDATTN_ISA
