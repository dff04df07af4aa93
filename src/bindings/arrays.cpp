// SPDX-License-Identifier: Apache-2.0
#include "bindings/arrays.h"

#include <pybind11/numpy.h>

#include "bindings/dlpack_abi.h"

namespace py = pybind11;

namespace pagedattn::bindings {

namespace {

[[noreturn]] void raise(const char *exception, const std::string &message) {
  const py::object type = py::module_::import("pagedattn._errors").attr(exception);
  PyErr_SetString(type.ptr(), message.c_str());
  throw py::error_already_set();
}

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

[[noreturn]] void raise_unknown_type(const Call &call, const std::string &argument, const std::string &got) {
  raise_invalid(
      std::string(call.operation) + ": `" + argument +
      "` must be of a type that pagedattn knows (float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int32, "
      "int64, uint8, uint16, of native byte order); got " +
      got);
}

int checked_ndim(const Call &call, const std::string &argument, py::ssize_t ndim) {
  if (ndim > PA_MAX_DIMS) {
    raise_invalid(std::string(call.operation) + ": `" + argument + "` must be of at most " +
                  std::to_string(PA_MAX_DIMS) + " dimensions; got " + std::to_string(ndim));
  }
  return static_cast<int>(ndim);
}

int64_t element_stride(const Call &call, const std::string &argument, int64_t bytes, int64_t item_size,
                       int64_t extent) {
  if (bytes % item_size != 0 && extent > 1) {
    raise_invalid(std::string(call.operation) + ": `" + argument + "` must have strides of whole elements; got " +
                  std::to_string(bytes) + " bytes for elements of " + std::to_string(item_size));
  }
  return bytes / item_size;
}

// cupy.ndarray, or null as long as CuPy has not been imported.
py::handle cupy_ndarray() {
  static py::handle type;
  if (!type) {
    const py::dict modules = py::module_::import("sys").attr("modules");
    if (!modules.contains("cupy")) return type;
    const py::object cupy = modules["cupy"];
    if (!py::hasattr(cupy, "ndarray")) return type;     // still being imported
    type = py::object(cupy.attr("ndarray")).release();  // kept for the process's life
  }
  return type;
}

// JAX arrays are immutable, but their DLPack capsules do not say so.
bool is_jax(py::handle object) {
  const auto module = py::str(py::type::of(object).attr("__module__")).cast<std::string>();
  return module.starts_with("jax");
}

bool is_cupy(py::handle object) {
  const py::handle type = cupy_ndarray();
  return type && py::isinstance(object, type);
}

}  // namespace

void prepare() { MlDtypes::get(); }

void raise_invalid(const std::string &message) { raise("InvalidArgumentError", message); }

void raise_on_error(pa_status status, const pa_error &error) {
  switch (status) {
    case PA_OK:
      return;
    case PA_ERROR_INVALID_ARGUMENT:
      raise("InvalidArgumentError", error.message);
    case PA_ERROR_UNSUPPORTED:
      raise("UnsupportedError", error.message);
    case PA_ERROR_OUT_OF_MEMORY:
      raise("OutOfMemoryError", error.message);
    case PA_ERROR_NO_DEVICE:
    case PA_ERROR_CUDA:
      raise("DeviceError", error.message);
    default:
      raise("PagedAttnError", std::string("internal error: ") + error.message);
  }
}

Array::Array(const Call &call, const std::string &argument, py::handle object) {
  if (object.is_none()) return;
  present_ = true;
  if (py::isinstance<py::array>(object)) {
    from_numpy(call, argument, object);
  } else if (is_cupy(object)) {
    from_cupy(call, argument, object);
  } else if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    from_dlpack(call, argument, object);
  } else {
    raise_invalid(std::string(call.operation) + ": `" + argument +
                  "` must be a NumPy array, a CuPy array or an array with __dlpack__; got " +
                  py::str(py::type::of(object).attr("__name__")).cast<std::string>());
  }
}

void Array::from_numpy(const Call &call, const std::string &argument, py::handle object) {
  const auto array = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = array.dtype();
  tensor_.dtype = dtype_of(dtype);
  if (tensor_.dtype == PA_DTYPE_NONE) raise_unknown_type(call, argument, py::str(dtype).cast<std::string>());
  tensor_.data = const_cast<void *>(array.data());
  tensor_.device_type = PA_CPU;
  tensor_.ndim = checked_ndim(call, argument, array.ndim());
  tensor_.flags = array.writeable() ? 0u : PA_TENSOR_READONLY;
  const auto item_size = static_cast<int64_t>(dtype.itemsize());
  for (int i = 0; i < tensor_.ndim; ++i) {
    tensor_.shape[i] = array.shape(i);
    tensor_.strides[i] = element_stride(call, argument, array.strides(i), item_size, tensor_.shape[i]);
  }
}

void Array::from_cupy(const Call &call, const std::string &argument, py::handle object) {
  const py::dtype dtype = object.attr("dtype").cast<py::dtype>();
  tensor_.dtype = dtype_of(dtype);
  if (tensor_.dtype == PA_DTYPE_NONE) raise_unknown_type(call, argument, py::str(dtype).cast<std::string>());
  const py::object memory = object.attr("data");
  tensor_.data = reinterpret_cast<void *>(memory.attr("ptr").cast<std::uintptr_t>());
  tensor_.device_type = PA_CUDA;
  tensor_.device_id = memory.attr("device_id").cast<int32_t>();
  const py::tuple shape = object.attr("shape"), strides = object.attr("strides");
  tensor_.ndim = checked_ndim(call, argument, static_cast<py::ssize_t>(shape.size()));
  const auto item_size = static_cast<int64_t>(dtype.itemsize());
  for (int i = 0; i < tensor_.ndim; ++i) {
    const auto at = static_cast<py::size_t>(i);
    tensor_.shape[i] = shape[at].cast<int64_t>();
    tensor_.strides[i] = element_stride(call, argument, strides[at].cast<int64_t>(), item_size, tensor_.shape[i]);
  }
}

void Array::from_dlpack(const Call &call, const std::string &argument, py::handle object) {
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
  if (PyCapsule_IsValid(owner_.ptr(), "dltensor_versioned")) {
    const auto *managed =
        static_cast<dlpack::ManagedTensorVersioned *>(PyCapsule_GetPointer(owner_.ptr(), "dltensor_versioned"));
    if (managed->version.major != 1) {
      raise_invalid(std::string(call.operation) + ": `" + argument + "` speaks DLPack " +
                    std::to_string(managed->version.major) + "; pagedattn reads version 1");
    }
    tensor_.flags = (managed->flags & dlpack::kFlagReadOnly) ? PA_TENSOR_READONLY : 0u;
    source = &managed->tensor;
  } else if (PyCapsule_IsValid(owner_.ptr(), "dltensor")) {
    source = &static_cast<dlpack::ManagedTensor *>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"))->tensor;
  } else {
    raise_invalid(std::string(call.operation) + ": `" + argument + "` gave no DLPack capsule");
  }
  if (is_jax(object)) tensor_.flags |= PA_TENSOR_READONLY;
  tensor_.dtype = dtype_of(source->dtype);
  if (tensor_.dtype == PA_DTYPE_NONE) {
    raise_unknown_type(call, argument,
                       "DLPack type code " + std::to_string(source->dtype.code) + " of " +
                           std::to_string(source->dtype.bits) + " bits");
  }
  tensor_.data = static_cast<char *>(source->data) + source->byte_offset;
  tensor_.device_type = source->device.type;
  tensor_.device_id = source->device.id;
  tensor_.ndim = checked_ndim(call, argument, source->ndim);
  int64_t dense = 1;
  for (int i = tensor_.ndim - 1; i >= 0; --i) {
    tensor_.shape[i] = source->shape[i];
    tensor_.strides[i] = source->strides != nullptr ? source->strides[i] : dense;
    dense *= source->shape[i];
  }
}

ArrayList::ArrayList(const Call &call, const std::string &argument, py::handle objects) {
  if (!py::isinstance<py::list>(objects) && !py::isinstance<py::tuple>(objects)) {
    raise_invalid(std::string(call.operation) + ": `" + argument + "` must be a list or tuple of arrays");
  }
  const auto sequence = py::reinterpret_borrow<py::sequence>(objects);
  const py::size_t count = sequence.size();
  arrays_.reserve(count);
  tensors_.reserve(count);
  for (py::size_t i = 0; i < count; ++i) {
    const std::string name = argument + "[" + std::to_string(i) + "]";
    const py::object object = sequence[i];
    if (object.is_none()) raise_invalid(std::string(call.operation) + ": `" + name + "` must be an array; got None");
    arrays_.emplace_back(call, name, object);
    tensors_.push_back(arrays_.back().tensor());
  }
}

bool ScaleArgument::is_number(py::handle object) {
  if (object.is_none() || py::isinstance<py::array>(object) || is_cupy(object)) return false;
  if (PyFloat_Check(object.ptr()) || PyLong_Check(object.ptr())) return true;
  return !py::hasattr(object, "__dlpack__") && PyNumber_Check(object.ptr());  // NumPy scalars
}

ScaleArgument::ScaleArgument(const Call &call, const std::string &argument, py::handle object)
    : value_(is_number(object) ? py::float_(py::reinterpret_borrow<py::object>(object)).cast<double>() : 1.0),
      array_(call, argument, is_number(object) ? py::handle(Py_None) : object) {}

}  // namespace pagedattn::bindings
