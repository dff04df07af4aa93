// The checks that every operation shares: types, shapes, strides, devices, overlap.
//
// SPDX-License-Identifier: Apache-2.0
//
// A Checker knows the operation's name and the device that its first tensor chose.  Each method either returns or
// throws PA_ERROR_INVALID_ARGUMENT with a message of the form
//   operation: `argument` must be <expected>; got <what was given>
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "pagedattn/pagedattn.h"

namespace pagedattn {

// An expected extent: its symbol, for the message, and its value, or kAny.
struct Dim {
  static constexpr int64_t kAny = -1;
  const char *symbol;
  int64_t size = kAny;
};

class Checker {
 public:
  explicit Checker(const char *operation) : operation_(operation) {}

  [[noreturn]] void fail(const std::string &sentence) const;  // "operation: sentence"
  [[noreturn]] void fail(const char *argument, const std::string &expected, const std::string &got) const;

  // Takes the operation's device from its leading tensor.  Throws if this build or machine cannot serve it.
  void set_device(const char *argument, const pa_tensor *tensor);
  bool on_cuda() const { return device_type_ == PA_CUDA; }
  int32_t device_id() const { return device_id_; }

  // A well-formed tensor on the operation's device: pointer, sizes, strides that fit in 64 bits, none negative.
  void tensor(const char *argument, const pa_tensor *tensor) const;
  // An extent for each dimension.
  void shape(const char *argument, const pa_tensor &tensor, std::initializer_list<Dim> dims) const;
  // Both.
  void shaped(const char *argument, const pa_tensor *tensor, std::initializer_list<Dim> dims) const;
  // A dense one-dimensional array of one type.
  void vector(const char *argument, const pa_tensor *tensor, int32_t dtype, Dim dim) const;
  void dtype(const char *argument, const pa_tensor &tensor, int32_t expected, std::initializer_list<Dim> dims) const;
  void unit_last_stride(const char *argument, const pa_tensor &tensor) const;
  // Writable, each element at an address of its own.
  void output(const char *argument, const pa_tensor &tensor) const;
  // No element of `written` lies where one of `other` does.  `other` may be null.
  void disjoint(const char *argument, const pa_tensor &written, const char *other_argument,
                const pa_tensor *other) const;

  // The arrays of lists that are written share memory neither with each other nor with those of the other lists.
  struct List {
    const char *argument;
    const pa_tensor *tensors;
    int64_t count;
    bool written;
  };
  void disjoint_lists(std::initializer_list<List> lists) const;

  int32_t fits_int32(const char *argument, const char *symbol, int64_t value) const;
  void flag(const char *argument, int32_t value) const;  // 0 or 1
  void check_mode(int32_t value) const;                  // -1, 0 or 1
  double positive_finite(const char *argument, double value) const;

 private:
  // An extent of [B, max_blocks]-like arrays in words: "int32 with shape (num_seqs, max_blocks) = (8, 64)".
  static std::string shape_expected(const pa_tensor &tensor, std::initializer_list<Dim> dims);

  const char *operation_;
  int32_t device_type_ = PA_CPU;
  int32_t device_id_ = 0;
};

// Bytes of an element, 0 for a type that is not a pa_dtype.
int64_t element_size(int32_t dtype);

// The addresses from a tensor's first byte to behind its last.
struct Span {
  Span() = default;
  explicit Span(const pa_tensor &tensor);
  bool meets(const Span &other) const { return std::max(start, other.start) < std::min(end, other.end); }

  uintptr_t start, end;
};

// Whether two strided sets of addresses can share a byte.  Exact for slices of a common buffer; conservative otherwise.
bool may_overlap(const pa_tensor &a, const pa_tensor &b);

// The arrays of one call, each of whose span is computed once: what is written lies apart from all listed before it.
class Neighbours {
 public:
  // Either tensor may be null.
  void read(const char *argument, const pa_tensor *tensor);
  void written(const Checker &check, const char *argument, const pa_tensor *tensor);

 private:
  struct Listed {
    const char *argument;
    const pa_tensor *tensor;
    Span span;
  };
  static constexpr size_t kMost = 16;
  Listed listed_[kMost];
  size_t count_ = 0;
};

}  // namespace pagedattn
