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
#include <limits>
#include <string>

#include "describe.h"
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
  [[noreturn]] void fail(Name argument, const std::string &expected, const std::string &got) const;

  // Takes the operation's device from its leading tensor.  Throws if this build or machine cannot serve it.
  void set_device(Name argument, const pa_tensor *tensor);
  bool on_cuda() const { return device_type_ == PA_CUDA; }
  int32_t device_id() const { return device_id_; }

  // A well-formed tensor on the operation's device: pointer, sizes, strides that fit in 64 bits, none negative.
  void tensor(Name argument, const pa_tensor *tensor) const;
  // An extent for each dimension.
  void shape(Name argument, const pa_tensor &tensor, std::initializer_list<Dim> dims) const;
  // Both.
  void shaped(Name argument, const pa_tensor *tensor, std::initializer_list<Dim> dims) const;
  // A dense one-dimensional array of one type.
  void vector(Name argument, const pa_tensor *tensor, int32_t dtype, Dim dim) const;
  void dtype(Name argument, const pa_tensor &tensor, int32_t expected, std::initializer_list<Dim> dims) const;
  void unit_last_stride(Name argument, const pa_tensor &tensor) const;
  // Writable, each element at an address of its own.
  void output(Name argument, const pa_tensor &tensor) const;
  // No element of `written` lies where one of `other` does.  `other` may be null.
  void disjoint(Name argument, const pa_tensor &written, Name other_argument, const pa_tensor *other) const;

  // The arrays of all layers, at least one.
  struct List {
    const char *argument;
    const pa_tensor *tensors;
    int64_t count;
    bool written;
  };
  // Each is a well-formed tensor of the type, shape and strides of the first, and an output if it is written.
  void alike(const List &list) const;
  // `other`, which may be null, shares no memory with those of a list that are alike.
  void disjoint(const List &list, const char *other_argument, const pa_tensor *other) const;
  // Those that are written share memory neither with each other nor with those of the other lists.
  void disjoint_lists(std::initializer_list<List> lists) const;

  int32_t fits_int32(Name argument, const char *symbol, int64_t value) const;
  void flag(Name argument, int32_t value) const;  // 0 or 1
  void check_mode(int32_t value) const;           // -1, 0 or 1
  double positive_finite(Name argument, double value) const;

 private:
  // An extent of [B, max_blocks]-like arrays in words: "int32 with shape (num_seqs, max_blocks) = (8, 32)".
  static std::string shape_expected(const pa_tensor &tensor, std::initializer_list<Dim> dims);

  const char *operation_;
  int32_t device_type_ = PA_CPU;
  int32_t device_id_ = 0;
};

// Whether it may be a scale.
inline bool is_positive_finite(float value) { return value > 0.0f && value <= std::numeric_limits<float>::max(); }

// Bytes of an element, 0 for a type that is not a pa_dtype.
int64_t element_size(int32_t dtype);

// The addresses from a tensor's first byte to behind its last.
struct Span {
  Span() = default;
  explicit Span(const pa_tensor &tensor);
  // Of an array that is like another.
  Span(const pa_tensor &tensor, const Span &like)
      : start(reinterpret_cast<uintptr_t>(tensor.data)), end(start + (like.end - like.start)) {}
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
