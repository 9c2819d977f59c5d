// The DLPack 1 ABI, as far as the bindings use it (https://github.com/dmlc/dlpack, Apache-2.0): how tensors cross
// between torch and C++ without a torch header.
#pragma once

#include <cstdint>

namespace dlpack {

struct Version {
  uint32_t major, minor;
};

constexpr int32_t kCpu = 1, kCuda = 2;

struct Device {
  int32_t type, id;
};

enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4, kBool = 6 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null stands for row-major in what version 1.0 makes
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* owner;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

// What `torch.Tensor.__dlpack_c_exchange_api__` points to.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor*, ManagedTensor**, void*, void (*)(void*, const char*, const char*));
  int (*export_owned)(void* object, ManagedTensor**);
  int (*import_owned)(ManagedTensor*, void** object);
  int (*borrow)(void* object, Tensor*);
  int (*current_stream)(int32_t, int32_t, void**);
};

}  // namespace dlpack
