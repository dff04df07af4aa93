// SPDX-License-Identifier: Apache-2.0
#include "bindings/torch.h"

#include "bindings/libraries.h"
#include "pagedattn/pagedattn.h"

namespace py = pybind11;

namespace pagedattn::bindings {

namespace {

struct Torch {
  PyTypeObject *tensor = nullptr;
  const dlpack::ExchangeTable *table = nullptr;  // null where this torch has none
};

const dlpack::ExchangeTable *find_table(py::handle tensor) {
  const py::object capsule = py::getattr(tensor, dlpack::ExchangeTable::kAttribute, py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::ExchangeTable::kCapsule)) return nullptr;
  const auto *const table =
      static_cast<const dlpack::ExchangeTable *>(PyCapsule_GetPointer(capsule.ptr(), dlpack::ExchangeTable::kCapsule));
  return table->version.major == 1 && table->view != nullptr ? table : nullptr;
}

// Without a type as long as nobody has imported torch, or its import has not come to an end.
const Torch &find_torch() {
  static Torch torch;
  if (torch.tensor != nullptr) return torch;
  static PyObject *const name = PyUnicode_InternFromString("torch");
  const auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name));
  if (!module || !py::hasattr(module, "Tensor")) return torch;
  const py::object tensor = module.attr("Tensor");
  torch.table = find_table(tensor);
  torch.tensor = reinterpret_cast<PyTypeObject *>(py::object(tensor).release().ptr());
  return torch;
}

// Such a tensor is not to be written, which the table does not look after.
bool requires_grad(py::handle tensor) {
  static PyObject *const name = PyUnicode_InternFromString("requires_grad");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
  if (!answer) throw py::error_already_set();
  return answer.ptr() != Py_False;
}

}  // namespace

std::optional<dlpack::Tensor> view_of_torch_tensor(py::handle object) {
  const Torch &torch = find_torch();
  if (torch.table == nullptr || Py_TYPE(object.ptr()) != torch.tensor || requires_grad(object)) return std::nullopt;
  dlpack::Tensor tensor;
  if (torch.table->view(object.ptr(), &tensor) == 0) return tensor;
  PyErr_Clear();  // __dlpack__ will say it in its own words
  return std::nullopt;
}

std::intptr_t torch_stream(int device) {
  if (const dlpack::ExchangeTable *const table = find_torch().table) {
    void *stream = nullptr;
    if (table->current_stream(PA_CUDA, device, &stream) != 0) throw py::error_already_set();
    return reinterpret_cast<std::intptr_t>(stream);
  }
  const py::object stream = py::module_::import("torch").attr("cuda").attr("current_stream")(device);
  return reinterpret_cast<std::intptr_t>(pointer(stream.attr("cuda_stream")));
}

}  // namespace pagedattn::bindings
