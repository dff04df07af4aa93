// SPDX-License-Identifier: Apache-2.0
#include "tensor_checks.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "describe.h"
#include "status.h"

#if PAGEDATTN_HAS_CUDA
#include "cuda_backend.h"
#endif

namespace pagedattn {

int64_t element_size(int32_t dtype) {
  switch (dtype) {
    case PA_FLOAT32:
    case PA_INT32:
      return 4;
    case PA_FLOAT16:
    case PA_BFLOAT16:
    case PA_UINT16:
      return 2;
    case PA_FLOAT8_E4M3:
    case PA_FLOAT8_E5M2:
    case PA_UINT8:
      return 1;
    case PA_INT64:
    case PA_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

namespace {

bool is_empty(const pa_tensor &tensor) {
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] == 0) return true;
  }
  return false;
}

// Bytes from the first to behind the last element, or -1 if that number does not fit.
int64_t extent_bytes(const pa_tensor &tensor) {
  int64_t last = 0;
  bool overflows = false;
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] == 0) return 0;
    int64_t step = 0;
    overflows |= __builtin_mul_overflow(tensor.shape[i] - 1, tensor.strides[i], &step);
    overflows |= __builtin_add_overflow(last, step, &last);
  }
  int64_t bytes = 0;
  overflows |= __builtin_add_overflow(last, 1, &last);
  overflows |= __builtin_mul_overflow(last, element_size(tensor.dtype), &bytes);
  return overflows ? -1 : bytes;
}

}  // namespace

void Checker::fail(const std::string &sentence) const { throw_invalid(std::string(operation_) + ": " + sentence); }

void Checker::fail(Name argument, const std::string &expected, const std::string &got) const {
  fail("`" + argument.text() + "` must be " + expected + "; got " + got);
}

void Checker::set_device(Name argument, const pa_tensor *tensor) {
  if (tensor == nullptr) fail("`" + argument.text() + "` is required");
  device_type_ = tensor->device_type == PA_CUDA ? PA_CUDA : PA_CPU;
  device_id_ = tensor->device_type == PA_CUDA ? tensor->device_id : 0;
  if (device_type_ != PA_CUDA) return;
#if PAGEDATTN_HAS_CUDA
  // First of all: without a device, nothing else that can be said of CUDA memory helps.
  cuda::require_usable_device(device_id_);
#else
  throw Error(PA_ERROR_UNSUPPORTED,
              std::string(operation_) + ": `" + argument.text() + "` is on " + device_text(PA_CUDA, device_id_) +
                  ", but this build of pagedattn has no CUDA kernels. Install it again where nvcc "
                  "is found (PAGEDATTN_CUDA=ON makes a missing compiler an error)");
#endif
}

void Checker::tensor(Name argument, const pa_tensor *tensor) const {
  if (tensor == nullptr) fail("`" + argument.text() + "` is required");
  const int32_t device_type = tensor->device_type == PA_CUDA ? PA_CUDA : PA_CPU;
  if (tensor->device_type != PA_CPU && tensor->device_type != PA_CUDA && tensor->device_type != PA_CUDA_HOST) {
    fail("`" + argument.text() + "` lies on a device of DLPack type " + std::to_string(tensor->device_type) +
         "; pagedattn serves host memory (1, 3) and CUDA memory (2)");
  }
  if (device_type != device_type_ || (device_type == PA_CUDA && tensor->device_id != device_id_)) {
    fail(argument, "on " + device_text(device_type_, device_id_) + " like the other arguments",
         device_text(device_type, tensor->device_id));
  }
  if (tensor->ndim < 0 || tensor->ndim > PA_MAX_DIMS) {
    fail(argument, "of at most " + std::to_string(PA_MAX_DIMS) + " dimensions", std::to_string(tensor->ndim));
  }
  for (int32_t i = 0; i < tensor->ndim; ++i) {
    if (tensor->shape[i] < 0) fail(argument, "of non-negative shape", shape_text(tensor->ndim, tensor->shape));
    if (tensor->strides[i] < 0 && tensor->shape[i] > 1) {
      fail(argument, "without negative strides", "strides " + shape_text(tensor->ndim, tensor->strides));
    }
  }
  const int64_t size = element_size(tensor->dtype), bytes = extent_bytes(*tensor);
  if (size == 0) fail(argument, "of a known type", dtype_name(tensor->dtype));
  if (bytes < 0) {
    fail(argument, "addressable with 64 bits",
         "shape " + shape_text(tensor->ndim, tensor->shape) + ", strides " + shape_text(tensor->ndim, tensor->strides));
  }
  if (tensor->data == nullptr && bytes > 0) fail("`" + argument.text() + "` has no data");
  // Sizes are powers of two, which the compiler cannot know.
  if ((reinterpret_cast<uintptr_t>(tensor->data) & static_cast<uintptr_t>(size - 1)) != 0) {
    fail(argument, "aligned to its element size", "an address that is not");
  }
}

std::string Checker::shape_expected(const pa_tensor &tensor, std::initializer_list<Dim> dims) {
  std::string symbols = "(", sizes = "(";
  int32_t i = 0;
  for (const Dim &dim : dims) {
    const char *comma = i ? ", " : "";
    symbols += std::string(comma) + dim.symbol;
    // A free extent repeats what was given, so that the reader sees only the real difference.
    const bool free_known = dim.size == Dim::kAny && i < tensor.ndim && static_cast<size_t>(tensor.ndim) == dims.size();
    sizes += comma + (dim.size != Dim::kAny ? std::to_string(dim.size)
                      : free_known          ? std::to_string(tensor.shape[i])
                                            : std::string("any"));
    ++i;
  }
  const char *close = dims.size() == 1 ? ",)" : ")";
  const bool any_size = std::all_of(dims.begin(), dims.end(), [](const Dim &dim) { return dim.size == Dim::kAny; });
  return "shape " + symbols + close + (any_size ? "" : " = " + sizes + close);
}

void Checker::shaped(Name argument, const pa_tensor *tensor, std::initializer_list<Dim> dims) const {
  this->tensor(argument, tensor);
  shape(argument, *tensor, dims);
}

void Checker::shape(Name argument, const pa_tensor &tensor, std::initializer_list<Dim> dims) const {
  bool good = static_cast<size_t>(tensor.ndim) == dims.size();
  int32_t i = 0;
  for (const Dim &dim : dims) {
    good = good && (dim.size == Dim::kAny || tensor.shape[i] == dim.size);
    ++i;
  }
  if (!good) {
    fail("`" + argument.text() + "` must have " + shape_expected(tensor, dims) + "; got " + tensor_text(tensor));
  }
}

void Checker::dtype(Name argument, const pa_tensor &tensor, int32_t expected, std::initializer_list<Dim> dims) const {
  if (tensor.dtype == expected) return;
  fail(argument, std::string(dtype_name(expected)) + " with " + shape_expected(tensor, dims), tensor_text(tensor));
}

void Checker::vector(Name argument, const pa_tensor *tensor, int32_t expected, Dim dim) const {
  this->tensor(argument, tensor);
  dtype(argument, *tensor, expected, {dim});
  shape(argument, *tensor, {dim});
  if (tensor->shape[0] > 1 && tensor->strides[0] != 1) {
    fail(argument, "contiguous", "a stride of " + std::to_string(tensor->strides[0]) + " elements");
  }
}

void Checker::unit_last_stride(Name argument, const pa_tensor &tensor) const {
  if (is_empty(tensor)) return;  // whose strides NumPy sets to 0
  const int32_t last = tensor.ndim - 1;
  if (last >= 0 && tensor.shape[last] > 1 && tensor.strides[last] != 1) {
    fail(argument, "contiguous in its last dimension",
         "a last stride of " + std::to_string(tensor.strides[last]) + " elements");
  }
}

void Checker::output(Name argument, const pa_tensor &tensor) const {
  if (tensor.flags & PA_TENSOR_READONLY) fail(argument, "writable", "a read-only array");
  if (is_empty(tensor)) return;
  // Dimensions from the smallest stride up: each must step over all that lies inside it.
  bool used[PA_MAX_DIMS] = {};
  int64_t inner = 1;
  for (int32_t n = 0; n < tensor.ndim; ++n) {
    int32_t smallest = -1;
    for (int32_t i = 0; i < tensor.ndim; ++i) {
      if (!used[i] && (smallest < 0 || tensor.strides[i] < tensor.strides[smallest])) smallest = i;
    }
    used[smallest] = true;
    if (tensor.shape[smallest] == 1) continue;
    if (tensor.strides[smallest] < inner) {
      fail(argument, "an array whose elements do not share memory",
           "shape " + shape_text(tensor.ndim, tensor.shape) + " with strides " +
               shape_text(tensor.ndim, tensor.strides));
    }
    inner += (tensor.shape[smallest] - 1) * tensor.strides[smallest];
  }
}

void Checker::disjoint(Name argument, const pa_tensor &written, Name other_argument, const pa_tensor *other) const {
  if (other == nullptr || !may_overlap(written, *other)) return;
  fail(argument, "memory apart from `" + other_argument.text() + "`", "overlapping arrays");
}

namespace {

// Whether what `tensor` and `output` find out of `first` holds for `other` too.
bool same_but_for_address(const pa_tensor &first, const pa_tensor &other) {
  constexpr uintptr_t kMostAligned = 8;  // bytes of the largest element
  const auto address = reinterpret_cast<uintptr_t>(other.data);
  bool same = address != 0 && address % kMostAligned == 0 && other.dtype == first.dtype &&
              other.device_type == first.device_type && other.device_id == first.device_id &&
              other.ndim == first.ndim && other.flags == first.flags;
  for (int32_t i = 0; same && i < first.ndim; ++i) {
    same = other.shape[i] == first.shape[i] && other.strides[i] == first.strides[i];
  }
  return same;
}

// Strides of extents of one do not matter.
bool same_layout(const pa_tensor &first, const pa_tensor &other) {
  bool same = other.ndim == first.ndim && other.dtype == first.dtype;
  for (int32_t i = 0; same && i < first.ndim; ++i) {
    same = other.shape[i] == first.shape[i] && (other.strides[i] == first.strides[i] || other.shape[i] == 1);
  }
  return same;
}

}  // namespace

void Checker::alike(const List &list) const {
  const pa_tensor &first = list.tensors[0];
  for (int64_t i = 0; i < list.count; ++i) {
    const pa_tensor &tensor = list.tensors[i];
    if (i > 0 && same_but_for_address(first, tensor)) continue;
    const Name name(list.argument, i);
    this->tensor(name, &tensor);
    if (!same_layout(first, tensor)) {
      fail(name, "of the type, shape and strides of `" + Name(list.argument, 0).text() + "`, " + tensor_text(first),
           tensor_text(tensor));
    }
    if (list.written) output(name, tensor);
  }
}

void Checker::disjoint(const List &list, const char *other_argument, const pa_tensor *other) const {
  if (other == nullptr) return;
  const Span apart(*other), first(list.tensors[0]);
  for (int64_t i = 0; i < list.count; ++i) {
    if (!apart.meets(Span(list.tensors[i], first))) continue;
    disjoint(Name(list.argument, i), list.tensors[i], other_argument, other);
  }
}

void Checker::disjoint_lists(std::initializer_list<List> lists) const {
  struct Listed {
    Span span;
    const List *list;
    int64_t index;
    const pa_tensor &tensor() const { return list->tensors[index]; }
    Name name() const { return {list->argument, index}; }
    bool operator<(const Listed &other) const { return span.start < other.span.start; }
  };
  int64_t count = 0;
  for (const List &list : lists) count += list.count;
  std::vector<Listed> all;
  all.reserve(static_cast<size_t>(count));
  // In the order of addresses only the next few can reach into one another: a model has over a hundred caches.  Most
  // lists come in that order.
  for (const List &list : lists) {
    const auto before = static_cast<std::ptrdiff_t>(all.size());
    const Span first(list.tensors[0]);
    for (int64_t i = 0; i < list.count; ++i) all.push_back({Span(list.tensors[i], first), &list, i});
    const auto middle = all.begin() + before;
    if (!std::is_sorted(middle, all.end())) std::sort(middle, all.end());
    std::inplace_merge(all.begin(), middle, all.end());
  }
  for (size_t i = 0; i < all.size(); ++i) {
    for (size_t j = i + 1; j < all.size() && all[j].span.start < all[i].span.end; ++j) {
      // The message names the written one, of two written ones the later.
      const bool i_later = all[i].list == all[j].list ? all[i].index > all[j].index : all[i].list > all[j].list;
      const bool i_first = all[i].list->written && (!all[j].list->written || i_later);
      const Listed &culprit = i_first ? all[i] : all[j], &victim = i_first ? all[j] : all[i];
      if (culprit.list->written && may_overlap(culprit.tensor(), victim.tensor())) {
        disjoint(culprit.name(), culprit.tensor(), victim.name(), &victim.tensor());
      }
    }
  }
}

int32_t Checker::fits_int32(Name argument, const char *symbol, int64_t value) const {
  if (value > std::numeric_limits<int32_t>::max()) {
    fail("`" + argument.text() + "` must have " + symbol + " below 2**31; got " + std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

void Checker::flag(Name argument, int32_t value) const {
  if (value != 0 && value != 1) fail(argument, "0 or 1", std::to_string(value));
}

void Checker::check_mode(int32_t value) const {
  if (value < -1 || value > 1) fail("check", "-1, 0 or 1", std::to_string(value));
}

double Checker::positive_finite(Name argument, double value) const {
  if (!is_positive_finite(static_cast<float>(value))) fail(argument, "a positive finite number", number_text(value));
  return value;
}

namespace {

// Dimensions longer than one, in bytes, from the largest stride down; the elements themselves are a last, dense one.
struct StridedSet {
  int32_t ndim = 0;
  int64_t count[PA_MAX_DIMS + 1] = {};
  int64_t stride[PA_MAX_DIMS + 1] = {};

  explicit StridedSet(const pa_tensor &tensor) {
    const int64_t size = element_size(tensor.dtype);
    for (int32_t i = 0; i < tensor.ndim; ++i) {
      if (tensor.shape[i] == 1 || tensor.strides[i] == 0) continue;
      int32_t at = ndim++;
      for (; at > 0 && stride[at - 1] < tensor.strides[i] * size; --at) {
        stride[at] = stride[at - 1];
        count[at] = count[at - 1];
      }
      stride[at] = tensor.strides[i] * size;
      count[at] = tensor.shape[i];
    }
    stride[ndim] = 1;
    count[ndim++] = size;
  }
  // Bytes spanned by the dimensions from `from` inwards.
  int64_t extent(int32_t from) const {
    int64_t bytes = 1;
    for (int32_t i = from; i < ndim; ++i) bytes += (count[i] - 1) * stride[i];
    return bytes;
  }
};

// Whether `a` (from dimension i inwards) at address 0 and `b` (from j inwards) at address `offset` can meet.
bool sets_meet(const StridedSet &a, int32_t i, const StridedSet &b, int32_t j, int64_t offset) {
  if (offset >= a.extent(i) || offset + b.extent(j) <= 0) return false;
  const bool a_inner = i + 1 < a.ndim, b_inner = j + 1 < b.ndim;
  if (!a_inner || !b_inner || a.stride[i] != b.stride[j]) return true;
  const int64_t period = a.stride[i];
  if (a.extent(i + 1) > period || b.extent(j + 1) > period) return true;
  // Rows repeat with one period in both, so only the offset within it matters, seen from either neighbour.
  const int64_t within = ((offset % period) + period) % period;
  return sets_meet(a, i + 1, b, j + 1, within) || sets_meet(a, i + 1, b, j + 1, within - period);
}

}  // namespace

Span::Span(const pa_tensor &tensor)
    : start(reinterpret_cast<uintptr_t>(tensor.data)), end(start + static_cast<uintptr_t>(extent_bytes(tensor))) {}

bool may_overlap(const pa_tensor &a, const pa_tensor &b) {
  const Span at_a(a), at_b(b);
  if (!at_a.meets(at_b)) return false;
  return sets_meet(StridedSet(a), 0, StridedSet(b), 0, static_cast<int64_t>(at_b.start - at_a.start));
}

void Neighbours::read(const char *argument, const pa_tensor *tensor) {
  if (tensor != nullptr) listed_[count_++] = {argument, tensor, Span(*tensor)};
}

void Neighbours::written(const Checker &check, const char *argument, const pa_tensor *tensor) {
  if (tensor == nullptr) return;
  const Span span(*tensor);
  for (size_t i = 0; i < count_; ++i) {
    if (span.meets(listed_[i].span)) check.disjoint(argument, *tensor, listed_[i].argument, listed_[i].tensor);
  }
  listed_[count_++] = {argument, tensor, span};
}

}  // namespace pagedattn
