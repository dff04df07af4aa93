// SPDX-License-Identifier: Apache-2.0
#include "bindings/arrays.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/cupy.h"
#include "bindings/dlpack_abi.h"
#include "bindings/errors.h"
#include "bindings/libraries.h"
#include "bindings/torch.h"

namespace py = pybind11;

namespace pagedattn::bindings {

namespace {

// Type numbers of the ml_dtypes types, which NumPy hands out when they are registered.
struct MlDtypes {
  int bfloat16, float8_e4m3, float8_e5m2;

  static const MlDtypes &get() {
    static const MlDtypes types = [] {
      const py::module_ ml_dtypes = py::module_::import("ml_dtypes");
      const auto number = [&](const char *name) { return py::dtype::from_args(ml_dtypes.attr(name)).num(); };
      return MlDtypes{number("bfloat16"), number("float8_e4m3fn"), number("float8_e5m2")};
    }();
    return types;
  }
};

// The pa_dtype of a NumPy dtype object, or PA_DTYPE_NONE.
pa_dtype dtype_of(const py::dtype &dtype) {
  const char order = dtype.byteorder();
  if (order != '=' && order != '|' && order != '<') return PA_DTYPE_NONE;
  const MlDtypes &ml = MlDtypes::get();
  const int number = dtype.num();
  if (number == ml.bfloat16) return PA_BFLOAT16;
  if (number == ml.float8_e4m3) return PA_FLOAT8_E4M3;
  if (number == ml.float8_e5m2) return PA_FLOAT8_E5M2;
  const char kind = dtype.kind();
  const auto size = dtype.itemsize();
  if (kind == 'f') return size == 4 ? PA_FLOAT32 : size == 2 ? PA_FLOAT16 : size == 8 ? PA_FLOAT64 : PA_DTYPE_NONE;
  if (kind == 'i') return size == 4 ? PA_INT32 : size == 8 ? PA_INT64 : PA_DTYPE_NONE;
  if (kind == 'u') return size == 1 ? PA_UINT8 : size == 2 ? PA_UINT16 : PA_DTYPE_NONE;
  return PA_DTYPE_NONE;
}

// The same for a descriptor that was seen before.  NumPy and CuPy have one of each type, and descriptors never change.
pa_dtype remembered_dtype_of(const py::dtype &dtype) {
  struct Seen {
    PyObject *descriptor;  // kept for the process's life
    pa_dtype dtype;
  };
  static std::array<Seen, 16> all_seen;
  static size_t count = 0;
  for (size_t i = 0; i < count; ++i) {
    if (all_seen[i].descriptor == dtype.ptr()) return all_seen[i].dtype;
  }
  const pa_dtype result = dtype_of(dtype);
  if (count < all_seen.size()) all_seen[count++] = {py::object(dtype).release().ptr(), result};
  return result;
}

pa_dtype dtype_of(const dlpack::DataType &type) {
  if (type.lanes != 1) return PA_DTYPE_NONE;
  switch (type.code) {
    case dlpack::kFloat:
      return type.bits == 32 ? PA_FLOAT32 : type.bits == 16 ? PA_FLOAT16 : type.bits == 64 ? PA_FLOAT64 : PA_DTYPE_NONE;
    case dlpack::kBFloat:
      return type.bits == 16 ? PA_BFLOAT16 : PA_DTYPE_NONE;
    case dlpack::kInt:
      return type.bits == 32 ? PA_INT32 : type.bits == 64 ? PA_INT64 : PA_DTYPE_NONE;
    case dlpack::kUInt:
      return type.bits == 8 ? PA_UINT8 : type.bits == 16 ? PA_UINT16 : PA_DTYPE_NONE;
    case dlpack::kFloat8E4M3Fn:
      return PA_FLOAT8_E4M3;
    case dlpack::kFloat8E5M2:
      return PA_FLOAT8_E5M2;
    default:
      return PA_DTYPE_NONE;
  }
}

// "operation: `argument`", how every message begins.
std::string subject(const Call &call, const Name &name) {
  const std::string index = name.index < 0 ? "" : "[" + std::to_string(name.index) + "]";
  return std::string(call.operation) + ": `" + name.argument + index + "`";
}

[[noreturn]] void raise_unknown_type(const Call &call, const Name &name, const std::string &got) {
  raise_invalid(subject(call, name) +
                " must be of a type that pagedattn knows (float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, "
                "int32, int64, uint8, uint16, of native byte order); got " +
                got);
}

pa_dtype known_dtype(const Call &call, const Name &name, const py::dtype &dtype) {
  const pa_dtype known = remembered_dtype_of(dtype);
  if (known == PA_DTYPE_NONE) raise_unknown_type(call, name, py::str(dtype).cast<std::string>());
  return known;
}

int checked_ndim(const Call &call, const Name &name, py::ssize_t ndim) {
  if (ndim > PA_MAX_DIMS) {
    raise_invalid(subject(call, name) + " must be of at most " + std::to_string(PA_MAX_DIMS) + " dimensions; got " +
                  std::to_string(ndim));
  }
  return static_cast<int>(ndim);
}

int64_t element_stride(const Call &call, const Name &name, int64_t bytes, int64_t item_size, int64_t extent) {
  if (bytes % item_size != 0 && extent > 1) {
    raise_invalid(subject(call, name) + " must have strides of whole elements; got " + std::to_string(bytes) +
                  " bytes for elements of " + std::to_string(item_size));
  }
  return bytes / item_size;
}

// Row-major strides, from the shape.
void make_dense(pa_tensor *tensor) {
  int64_t dense = 1;
  for (int i = tensor->ndim - 1; i >= 0; --i) {
    tensor->strides[i] = dense;
    dense *= tensor->shape[i];
  }
}

// Whether what is enqueued on the call's stream finds the tensor's data without waiting for torch's stream.
bool is_ready(const Call &call, const dlpack::Tensor &tensor) {
  return tensor.device.type != PA_CUDA || torch_stream(tensor.device.id) == call.stream;
}

}  // namespace

void prepare() { MlDtypes::get(); }

Array::Array(const Call &call, const Name &name, py::handle object) : present_(!object.is_none()) {
  if (!present_) return;
  if (is_numpy(object)) {
    from_numpy(call, name, object);
  } else if (const Cupy *const cupy = Cupy::of(object)) {
    from_cupy(call, name, *cupy, object);
  } else if (const auto tensor = view_of_torch_tensor(object); tensor && is_ready(call, *tensor)) {
    tensor_.flags = 0;
    from_tensor(call, name, *tensor);
  } else if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    from_dlpack(call, name, object);
  } else {
    raise_invalid(subject(call, name) + " must be a NumPy array, a CuPy array or an array with __dlpack__; got " +
                  py::str(py::type::of(object).attr("__name__")).cast<std::string>());
  }
}

void Array::give_shape(const Call &call, const Name &name, py::ssize_t ndim, const py::ssize_t *shape) {
  tensor_.ndim = checked_ndim(call, name, ndim);
  std::copy_n(shape, tensor_.ndim, tensor_.shape);
}

void Array::give_strides(const Call &call, const Name &name, const py::ssize_t *bytes, int64_t item_size) {
  for (int i = 0; i < tensor_.ndim; ++i) {
    tensor_.strides[i] = element_stride(call, name, bytes[i], item_size, tensor_.shape[i]);
  }
}

void Array::from_numpy(const Call &call, const Name &name, py::handle object) {
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  tensor_.dtype = known_dtype(call, name, dtype);
  tensor_.data = const_cast<void *>(array.data());
  tensor_.device_type = PA_CPU;
  tensor_.device_id = 0;
  tensor_.flags = array.writeable() ? 0u : PA_TENSOR_READONLY;
  give_shape(call, name, array.ndim(), array.shape());
  give_strides(call, name, array.strides(), dtype.itemsize());
}

void Array::from_cupy(const Call &call, const Name &name, const Cupy &cupy, py::handle object) {
  tensor_.device_type = PA_CUDA;
  tensor_.flags = 0;
  if (const CupyArray *const array = cupy.fields(object)) {
    const auto dtype = py::reinterpret_borrow<py::dtype>(array->dtype);
    tensor_.dtype = known_dtype(call, name, dtype);
    tensor_.data = reinterpret_cast<void *>(array->data->address);
    tensor_.device_id = array->data->device_id;
    give_shape(call, name, array->shape.size(), array->shape.data());
    if (array->is_c_contiguous != 0) return make_dense(&tensor_);
    give_strides(call, name, array->strides.data(), dtype.itemsize());
  } else {
    const py::dtype dtype = object.attr("dtype");
    const py::object memory = object.attr("data");
    const auto shape = object.attr("shape").cast<std::vector<py::ssize_t>>();
    const auto strides = object.attr("strides").cast<std::vector<py::ssize_t>>();
    tensor_.dtype = known_dtype(call, name, dtype);
    tensor_.data = pointer(memory.attr("ptr"));
    tensor_.device_id = static_cast<int32_t>(integer(memory.attr("device_id")));
    give_shape(call, name, shape.size(), shape.data());
    give_strides(call, name, strides.data(), dtype.itemsize());
  }
}

void Array::from_dlpack(const Call &call, const Name &name, py::handle object) {
  const py::tuple device = object.attr("__dlpack_device__")();
  const int device_type = py::int_(device[0]).cast<int>();
  py::dict keywords;
  if (device_type == PA_CUDA) {
    // DLPack's names: 1 is the legacy default stream, 0 is ambiguous.
    keywords["stream"] = call.stream == 0 ? 1 : call.stream;
  }
  keywords["max_version"] = py::make_tuple(1, 1);
  try {
    owner_ = object.attr("__dlpack__")(**keywords);
  } catch (py::error_already_set &error) {
    if (!error.matches(PyExc_TypeError)) throw;
    keywords.attr("pop")("max_version");  // a producer from before DLPack 1.0
    owner_ = object.attr("__dlpack__")(**keywords);
  }
  const dlpack::Tensor *source = nullptr;
  tensor_.flags = 0;
  if (PyCapsule_IsValid(owner_.ptr(), "dltensor_versioned")) {
    const auto *managed =
        static_cast<dlpack::ManagedTensorVersioned *>(PyCapsule_GetPointer(owner_.ptr(), "dltensor_versioned"));
    if (managed->version.major != 1) {
      raise_invalid(subject(call, name) + " speaks DLPack " + std::to_string(managed->version.major) +
                    "; pagedattn reads version 1");
    }
    if (managed->flags & dlpack::kFlagReadOnly) tensor_.flags = PA_TENSOR_READONLY;
    source = &managed->tensor;
  } else if (PyCapsule_IsValid(owner_.ptr(), "dltensor")) {
    source = &static_cast<dlpack::ManagedTensor *>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"))->tensor;
  } else {
    raise_invalid(subject(call, name) + " gave no DLPack capsule");
  }
  // JAX arrays are immutable, but their capsules do not say so.
  if (library_of(object).starts_with("jax")) tensor_.flags = PA_TENSOR_READONLY;
  from_tensor(call, name, *source);
}

void Array::from_tensor(const Call &call, const Name &name, const dlpack::Tensor &source) {
  tensor_.dtype = dtype_of(source.dtype);
  if (tensor_.dtype == PA_DTYPE_NONE) {
    raise_unknown_type(
        call, name,
        "DLPack type code " + std::to_string(source.dtype.code) + " of " + std::to_string(source.dtype.bits) + " bits");
  }
  tensor_.data = static_cast<char *>(source.data) + source.byte_offset;
  tensor_.device_type = source.device.type;
  tensor_.device_id = source.device.id;
  tensor_.ndim = checked_ndim(call, name, source.ndim);
  std::copy_n(source.shape, tensor_.ndim, tensor_.shape);
  if (source.strides != nullptr) {
    std::copy_n(source.strides, tensor_.ndim, tensor_.strides);
  } else {
    make_dense(&tensor_);
  }
}

namespace {

bool is_list(py::handle objects) { return PyList_Check(objects.ptr()) || PyTuple_Check(objects.ptr()); }

}  // namespace

ArrayOrList::ArrayOrList(const Call &call, const char *argument, py::handle objects)
    : one_(call, argument, is_list(objects) ? py::handle(Py_None) : objects) {
  if (!is_list(objects)) return;
  list_.emplace(call, argument, objects);
  if (list_->size() == 0) raise_invalid(subject(call, argument) + " must have at least one array; got none");
}

namespace {

// Behind a call that was waited for, a processor's caches have lost the arrays, and each would take some trips to
// memory, one behind the other.  So those of a list are made together: first to the arrays,
void fetch_array(const PyObject *array) {
  constexpr std::size_t kLine = 64;
  for (std::size_t at = 0; at < sizeof(CupyArray); at += kLine) {
    __builtin_prefetch(reinterpret_cast<const char *>(array) + at);
  }
}

// and then to what they point at.
void fetch_fields(py::handle array) {
  if (is_numpy(array)) {
    __builtin_prefetch(py::detail::array_proxy(array.ptr())->dimensions);
  } else if (const Cupy *const cupy = Cupy::of(array); cupy != nullptr && cupy->has_known_layout) {
    const auto *const fields = reinterpret_cast<const CupyArray *>(array.ptr());
    __builtin_prefetch(fields->shape.data());
    __builtin_prefetch(&fields->data->device_id);
  }
}

}  // namespace

ArrayList::ArrayList(const Call &call, const char *argument, py::handle objects) {
  if (!is_list(objects)) {
    raise_invalid(subject(call, argument) + " must be a list or tuple of arrays");
  }
  const auto size = static_cast<size_t>(PySequence_Fast_GET_SIZE(objects.ptr()));
  tensors_.reserve(size);
  owners_.reserve(size);
  // The size anew each time, for an array's own code may change the list.
  const auto for_each = [&](const auto &f) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(objects.ptr()); ++i) {
      f(i, PySequence_Fast_GET_ITEM(objects.ptr(), i));
    }
  };
  for_each([](Py_ssize_t, const PyObject *array) { fetch_array(array); });
  for_each([](Py_ssize_t, PyObject *array) { fetch_fields(array); });
  for_each([&](Py_ssize_t i, PyObject *item) {
    const Name name(argument, i);
    auto object = py::reinterpret_borrow<py::object>(item);
    if (object.is_none()) raise_invalid(subject(call, name) + " must be an array; got None");
    const Array array(call, name, object);
    tensors_.push_back(array.tensor());
    owners_.push_back(std::move(object));
    if (array.owner()) owners_.push_back(array.owner());
  });
}

namespace {

bool is_number(py::handle object) {
  if (object.is_none() || is_numpy(object) || is_cupy(object)) return false;
  if (PyFloat_Check(object.ptr()) || PyLong_Check(object.ptr())) return true;
  return !py::hasattr(object, "__dlpack__") && PyNumber_Check(object.ptr());  // NumPy scalars
}

}  // namespace

ScaleArgument::ScaleArgument(const Call &call, const char *argument, py::handle object)
    : ScaleArgument(call, argument, object, is_number(object)) {}

ScaleArgument::ScaleArgument(const Call &call, const char *argument, py::handle object, bool is_number)
    : value_(is_number ? number(call.operation, argument, object, "a positive finite number or an array") : 1.0),
      array_(call, argument, is_number ? py::handle(Py_None) : object) {}

}  // namespace pagedattn::bindings
