// Arguments and results of the ops' Python functions: tensors are read, and results made, through the C functions of
// DLPack that torch exports, which cost a tenth of the same steps in Python.
#pragma once

#include <Python.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "ugsd/args.h"

namespace ugsd::python {

// Thrown where Python's error indicator is set.
struct Raised : std::exception {};

inline const dlpack::ExchangeApi* exchange = nullptr;
inline PyTypeObject* tensor_type = nullptr;
inline int32_t device_type = dlpack::kCpu;  // of the tensors that this extension takes

// Takes torch.Tensor, whose C functions read and make every tensor from here on.
inline PyObject* use_tensors_of(PyObject*, PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  if (!capsule) return nullptr;
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  while (api && api->version.major > 1) api = api->previous;
  if (!api) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ImportError, "torch exports no DLPack 1 exchange API");
    return nullptr;
  }
  Py_INCREF(type);
  exchange = api;
  tensor_type = reinterpret_cast<PyTypeObject*>(type);
  Py_RETURN_NONE;
}

// Describes a tensor that its caller holds.
inline dlpack::Tensor borrow(PyObject* object) {
  dlpack::Tensor tensor;
  if (!PyObject_TypeCheck(object, tensor_type)) {
    PyErr_Format(PyExc_TypeError, "expected a tensor, got %R", object);
    throw Raised();
  }
  if (exchange->borrow(object, &tensor) != 0) throw Raised();
  if (tensor.device.type != device_type)
    throw std::invalid_argument(device_type == dlpack::kCpu ? "the cpp backend takes CPU tensors"
                                                            : "the cuda backend takes CUDA tensors");
  tensor.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return tensor;
}

inline bool contiguous(const dlpack::Tensor& tensor) {
  int64_t step = 1;
  for (int32_t i = tensor.dims; i-- > 0;) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != step) return false;
    step *= tensor.shape[i];
  }
  return true;
}

template <class T>
struct Element;
template <>
struct Element<float> {
  static constexpr dlpack::DataType dtype{dlpack::kFloat, 32, 1};
  static constexpr const char* convert = "float";
};
template <>
struct Element<double> {
  static constexpr dlpack::DataType dtype{dlpack::kFloat, 64, 1};
  static constexpr const char* convert = "double";
};
template <>
struct Element<bool> {
  static constexpr dlpack::DataType dtype{dlpack::kBool, 8, 1};
};
template <>
struct Element<int64_t> {
  static constexpr dlpack::DataType dtype{dlpack::kInt, 64, 1};
  static constexpr const char* convert = "long";
};

constexpr bool same(dlpack::DataType a, dlpack::DataType b) { return a.code == b.code && a.bits == b.bits; }

// The arguments of one call, taken in order. Copies that a conversion makes live as long as it.
class Arguments {
 public:
  Arguments(PyObject* const* arguments, Py_ssize_t count) : next_(arguments), end_(arguments + count) {}
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments() {
    while (num_copies_ > 0) Py_DECREF(copies_[--num_copies_]);
  }

  PyObject* peek() const {
    if (next_ == end_) throw std::invalid_argument("too few arguments");
    return *next_;
  }
  PyObject* object() {
    PyObject* next = peek();
    ++next_;
    return next;
  }

  double number() {
    const double value = PyFloat_AsDouble(object());
    if (value == -1 && PyErr_Occurred()) throw Raised();
    return value;
  }

  int64_t integer() {
    const long long value = PyLong_AsLongLong(object());
    if (value == -1 && PyErr_Occurred()) throw Raised();
    return value;
  }

  // Elements of a small side input, converted and made contiguous where they are not; null for None.
  template <class T>
  const T* elements() {
    PyObject* given = object();
    if (given == Py_None) return nullptr;
    dlpack::Tensor tensor = borrow(given);
    if (!same(tensor.dtype, Element<T>::dtype)) tensor = borrow(given = copy(given, Element<T>::convert));
    if (!contiguous(tensor)) tensor = borrow(copy(given, "contiguous"));
    return static_cast<const T*>(tensor.data);
  }

  // A tensor of any dtype, made contiguous; null for None.
  const void* contiguous_data() {
    PyObject* given = object();
    if (given == Py_None) return nullptr;
    const dlpack::Tensor tensor = borrow(given);
    return contiguous(tensor) ? tensor.data : borrow(copy(given, "contiguous")).data;
  }

  // A number followed by a tensor of one a row, or None.
  template <class T>
  PerRow<T> per_row() {
    T value;
    if constexpr (std::is_integral_v<T>) {
      value = integer();
    } else {
      value = static_cast<T>(number());
    }
    return {value, elements<T>()};
  }

  // Rows of logits; null data for None. Leading dimensions are taken as they lie where two strides describe them,
  // else the rows are copied.
  Rows rows() {
    PyObject* given = object();
    if (given == Py_None) return {};
    Rows rows;
    if (!describe(borrow(given), &rows)) describe(borrow(copy(given, "contiguous")), &rows);
    return rows;
  }

 private:
  PyObject* copy(PyObject* tensor, const char* method) {
    PyObject* made = PyObject_CallMethod(tensor, method, nullptr);
    if (!made) throw Raised();
    return copies_[num_copies_++] = made;
  }

  // False where the dimensions before the last two do not collapse into one.
  static bool describe(const dlpack::Tensor& tensor, Rows* rows) {
    const int32_t last = tensor.dims - 1;
    *rows = {tensor.data, dtype(tensor.dtype), 1, 1, 0, 0, tensor.shape[last]};
    if (last > 0) {
      rows->inner = tensor.shape[last - 1];
      rows->inner_stride = tensor.strides[last - 1];
    }
    for (int32_t i = last - 2; i >= 0; --i) {
      if (tensor.shape[i] == 1) continue;
      if (rows->outer == 1) rows->outer_stride = tensor.strides[i];
      if (tensor.strides[i] != rows->outer_stride * rows->outer) return false;
      rows->outer *= tensor.shape[i];
    }
    return true;
  }

  static DType dtype(dlpack::DataType type) {
    if (type.code == dlpack::kBFloat) return DType::kBFloat16;
    return type.bits == 16 ? DType::kFloat16 : DType::kFloat32;
  }

  PyObject* const* next_;
  PyObject* const* const end_;
  std::array<PyObject*, 20> copies_;
  int num_copies_ = 0;
};

inline Filters filters(Arguments& in) {
  const auto top_k = in.per_row<int64_t>();
  const auto top_p = in.per_row<float>();
  return {top_k, top_p, in.per_row<float>()};
}

// A list of addresses and one of layouts: (heads, batch, head and slot strides, row length), the last four in bytes;
// one a tensor, or one for all.
inline std::vector<KvTensor> kv_tensors(PyObject* addresses, PyObject* layouts) {
  std::vector<KvTensor> kv;
  kv.reserve(static_cast<size_t>(PyList_GET_SIZE(addresses)));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(addresses); ++i) {
    if (i < PyList_GET_SIZE(layouts)) {
      PyObject* layout = PyList_GET_ITEM(layouts, i);
      std::array<int64_t, 5> fields;
      for (size_t k = 0; k < fields.size(); ++k) fields[k] = PyLong_AsLongLong(PyTuple_GET_ITEM(layout, k));
      kv.push_back({nullptr, fields[0], fields[1], fields[2], fields[3], fields[4]});
    } else {
      kv.push_back(kv.front());
    }
    kv.back().data = static_cast<char*>(PyLong_AsVoidPtr(PyList_GET_ITEM(addresses, i)));
  }
  return kv;
}

// A function of positional arguments as CPython calls it, without pybind11's conversions.
template <PyObject* (*function)(Arguments&)>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    Arguments in(arguments, count);
    return function(in);
  } catch (const Raised&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <PyObject* (*function)(Arguments&)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<function>)), METH_FASTCALL, nullptr};
}

struct Result {
  dlpack::DataType dtype;
  int32_t dims;
};

template <class T>
constexpr Result result(int32_t dims) {
  return {Element<T>::dtype, dims};
}

// The tensors that a call writes: those given, or new ones, which share one allocation but no storage.
template <size_t N>
class Results {
 public:
  // `given` is a tuple of N checked tensors, or None on a CPU; the shape of a result is the first `dims` sizes of
  // `shape`.
  Results(PyObject* given, const int64_t* shape, const std::array<Result, N>& results) {
    if (given == Py_None && device_type == dlpack::kCpu) {
      allocate(shape, results);
    } else {
      take(given);
    }
  }
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;
  ~Results() { Py_XDECREF(tuple_); }

  template <class T>
  T* data(size_t i) const {
    return static_cast<T*>(data_[i]);
  }
  PyObject* release() { return std::exchange(tuple_, nullptr); }

 private:
  // One allocation: this header, the shape, then the data of each result on its own cache lines.
  struct Block {
    std::atomic<size_t> users;
    std::array<dlpack::ManagedTensor, N> managed;
  };

  void take(PyObject* given) {
    if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) != N) throw std::invalid_argument("out is not a full tuple");
    for (size_t i = 0; i < N; ++i) data_[i] = borrow(PyTuple_GET_ITEM(given, i)).data;
    Py_INCREF(given);
    tuple_ = given;
  }

  static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

  static void drop(dlpack::ManagedTensor* managed) {
    auto* block = static_cast<Block*>(managed->owner);
    if (block->users.fetch_sub(1, std::memory_order_acq_rel) == 1) std::free(block);
  }

  void allocate(const int64_t* shape, const std::array<Result, N>& results) {
    int32_t dims = 0;
    for (const Result& result : results) dims = std::max(dims, result.dims);
    std::array<size_t, N + 1> offsets{padded(sizeof(Block) + dims * sizeof(int64_t))};
    for (size_t i = 0; i < N; ++i) {
      size_t bytes = results[i].dtype.bits / 8;
      for (int32_t d = 0; d < results[i].dims; ++d) bytes *= static_cast<size_t>(shape[d]);
      offsets[i + 1] = offsets[i] + padded(bytes);
    }
    auto* memory = static_cast<char*>(std::aligned_alloc(64, offsets[N]));
    tuple_ = memory ? PyTuple_New(N) : PyErr_NoMemory();
    if (!tuple_) {
      std::free(memory);
      throw Raised();
    }
    auto* block = new (memory) Block;
    block->users = N;
    auto* sizes = reinterpret_cast<int64_t*>(block + 1);
    std::copy_n(shape, dims, sizes);
    for (size_t i = 0; i < N; ++i) {
      data_[i] = memory + offsets[i];
      const dlpack::Tensor tensor{data_[i], {dlpack::kCpu, 0}, results[i].dims, results[i].dtype, sizes, nullptr, 0};
      block->managed[i] = {{1, 0}, block, drop, 0, tensor};
      void* made = nullptr;
      if (exchange->import_owned(&block->managed[i], &made) != 0) {
        Py_CLEAR(tuple_);
        throw Raised();
      }
      PyTuple_SET_ITEM(tuple_, i, static_cast<PyObject*>(made));
    }
  }

  std::array<void*, N> data_;
  PyObject* tuple_ = nullptr;
};

template <size_t N>
StatsOut stats_out(const Results<N>& out, size_t first) {
  return {out.template data<float>(first), out.template data<float>(first + 1), out.template data<float>(first + 2),
          out.template data<int64_t>(first + 3), out.template data<float>(first + 4)};
}

}  // namespace ugsd::python
