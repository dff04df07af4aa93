// SPDX-License-Identifier: Apache-2.0
#include "bindings/block_reader.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "bindings/errors.h"

namespace py = pybind11;

namespace pagedattn::bindings {

namespace {

constexpr int64_t kLine = 64;

// The dense blocks of one cache, which may have gaps between them.
struct Blocks {
  const char *data;
  int64_t count;
  int64_t stride;  // bytes
  int64_t bytes;   // of one

  Blocks(const char *argument, const py::array &cache)
      : data(static_cast<const char *>(cache.data())),
        count(cache.ndim() > 0 ? cache.shape(0) : 0),
        stride(count > 0 ? cache.strides(0) : 0),
        bytes(count > 0 ? cache.nbytes() / count : 0) {
    int64_t extent = cache.itemsize();
    bool forward = true;
    for (py::ssize_t i = 1; i < cache.ndim(); ++i) {
      extent += (cache.shape(i) - 1) * cache.strides(i);
      forward = forward && cache.strides(i) > 0;
    }
    if (count < 1 || !forward || extent != bytes || (count > 1 && stride < bytes)) {
      raise_invalid(std::string("read_blocks: `") + argument +
                    "` must hold at least one block, and blocks without gaps inside that follow each other; got "
                    "shape " +
                    py::str(cache.attr("shape")).cast<std::string>() + ", strides " +
                    py::str(cache.attr("strides")).cast<std::string>());
    }
  }

  const char *at(int64_t block) const { return data + block * stride; }
};

// Whole lines of a block, and meanwhile those of the next one are fetched: the processor's own prefetchers do not know
// where it lies.
uint64_t read(const char *block, const char *next, int64_t bytes) {
  constexpr int kWords = kLine / 8;
  uint64_t sums[kWords] = {};
  for (int64_t i = 0; i + kLine <= bytes; i += kLine) {
    __builtin_prefetch(next + i, 0, 2);
    uint64_t words[kWords];
    std::memcpy(words, block + i, kLine);
    for (int w = 0; w < kWords; ++w) sums[w] += words[w];
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}

}  // namespace

uint64_t read_blocks(const py::array &k_cache, const py::array &v_cache,
                     const py::array_t<int32_t, py::array::c_style> &blocks, int64_t passes) {
  const Blocks k("k_cache", k_cache), v("v_cache", v_cache);
  const int32_t *const numbers = blocks.data();
  const int64_t size = blocks.size(), most = std::min(k.count, v.count);
  for (int64_t i = 0; i < size; ++i) {
    if (numbers[i] < 0 || numbers[i] >= most) {
      raise_invalid("read_blocks: `blocks` must lie in 0 ... " + std::to_string(most - 1) + "; got " +
                    std::to_string(numbers[i]));
    }
  }
  const py::gil_scoped_release released;
  uint64_t sum = 0;
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (int64_t i = 0; i < size; ++i) {
      const int32_t next = numbers[i + 1 < size ? i + 1 : 0];
      sum += read(k.at(numbers[i]), k.at(next), k.bytes);
      sum += read(v.at(numbers[i]), v.at(next), v.bytes);
    }
  }
  return sum;
}

}  // namespace pagedattn::bindings
