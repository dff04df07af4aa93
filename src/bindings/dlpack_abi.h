// The DLPack structures, as far as reading a tensor needs them.  The layout is DLPack's binary interface, version 1;
// unversioned capsules ("dltensor") carry DLManagedTensor, versioned ones ("dltensor_versioned") the other.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace pagedattn::dlpack {

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kFloat8E4M3Fn = 10, kFloat8E5M2 = 12 };

struct Tensor {
  void *data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape;
  int64_t *strides;  // in elements; null: dense, row-major
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void *context;
  void (*deleter)(ManagedTensor *);
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

constexpr uint64_t kFlagReadOnly = 1;

struct ManagedTensorVersioned {
  Version version;
  void *context;
  void (*deleter)(ManagedTensorVersioned *);
  uint64_t flags;
  Tensor tensor;
};

// The table of C functions that a type of tensors may have, as a capsule.  The functions return 0, or -1 with a Python
// exception set.
struct ExchangeTable {
  static constexpr const char *kAttribute = "__dlpack_c_exchange_api__", *kCapsule = "dlpack_exchange_api";
  Version version;
  ExchangeTable *older;
  void *allocate, *export_owned, *import_owned;
  int (*view)(void *object, Tensor *tensor);  // null where there is none; does not order streams
  int (*current_stream)(int32_t device_type, int32_t device_id, void **stream);
};

}  // namespace pagedattn::dlpack
