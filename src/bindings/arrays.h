// Python arrays as pa_tensor views: NumPy and CuPy arrays directly, everything else through DLPack.  Nothing is copied.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bindings/dlpack_abi.h"
#include "pagedattn/pagedattn.h"

namespace pagedattn::bindings {

struct Cupy;

// Who asks, for messages, and the CUDA stream on which a DLPack producer must have its data ready.
struct Call {
  const char *operation;
  std::intptr_t stream = 0;
};

// An argument as messages name it: `q`, or `caches[3]`.
struct Name {
  Name(const char *argument, int64_t index = -1) : argument(argument), index(index) {}
  const char *argument;
  int64_t index;
};

// One array argument.  What a NumPy or CuPy array holds stays alive as long as the caller's reference to it.
class Array {
 public:
  // None gives an absent array.
  Array(const Call &call, const Name &name, pybind11::handle object);
  // Null if absent.  Valid as long as this object stays where it is.
  const pa_tensor *get() const { return present_ ? &tensor_ : nullptr; }
  const pa_tensor &tensor() const { return tensor_; }
  // What must be kept for the tensor to stay valid, if it is more than the array itself.
  const pybind11::object &owner() const { return owner_; }

 private:
  void from_numpy(const Call &call, const Name &name, pybind11::handle object);
  void from_cupy(const Call &call, const Name &name, const Cupy &cupy, pybind11::handle object);
  void from_dlpack(const Call &call, const Name &name, pybind11::handle object);
  void from_tensor(const Call &call, const Name &name, const dlpack::Tensor &source);
  void give_shape(const Call &call, const Name &name, pybind11::ssize_t ndim, const pybind11::ssize_t *shape);
  void give_strides(const Call &call, const Name &name, const pybind11::ssize_t *bytes, int64_t item_size);

  bool present_;
  pa_tensor tensor_;  // filled where present
  pybind11::object owner_;
};

// A list or tuple of arrays, which live as long as this object: another thread may change the list while the call
// computes without the GIL.
class ArrayList {
 public:
  ArrayList(const Call &call, const char *argument, pybind11::handle objects);
  const pa_tensor *data() const { return tensors_.data(); }
  int64_t size() const { return static_cast<int64_t>(tensors_.size()); }

 private:
  std::vector<pa_tensor> tensors_;
  std::vector<pybind11::object> owners_;
};

// An array, or a list or tuple of at least one.
class ArrayOrList {
 public:
  ArrayOrList(const Call &call, const char *argument, pybind11::handle objects);
  const pa_tensor *data() const { return list_ ? list_->data() : one_.get(); }
  int64_t size() const { return list_ ? list_->size() : 1; }

 private:
  Array one_;  // absent where there is a list
  std::optional<ArrayList> list_;
};

// A scale: None, a number, or an array.
class ScaleArgument {
 public:
  ScaleArgument(const Call &call, const char *argument, pybind11::handle object);
  const pa_tensor *array() const { return array_.get(); }
  double value() const { return value_; }

 private:
  ScaleArgument(const Call &call, const char *argument, pybind11::handle object, bool is_number);

  double value_;
  Array array_;
};

// Looks up what importing would otherwise do in the middle of a call, where another thread might wait with the GIL
// held.
void prepare();

}  // namespace pagedattn::bindings
