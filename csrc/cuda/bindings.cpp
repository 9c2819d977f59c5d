// ugsd_fast._cuda: the ops on CUDA tensors that the Python side has checked, results included; None stands for an
// absent one. Calls enqueue and return.
#include <pybind11/pybind11.h>

#include <optional>

#include "../operations.h"
#include "ugsd/cuda/kernels.h"

// A build for tests runs the kernels on CPU tensors.
#ifndef UGSD_MODULE
#define UGSD_MODULE _cuda
#define UGSD_DEVICE_TYPE dlpack::kCuda
#endif

namespace py = pybind11;
using namespace ugsd;
using namespace ugsd::python;

namespace {

// The device of a call's tensors, current while it lasts.
class Device {
 public:
  explicit Device(int device) {
    check(cudaGetDevice(&before_));
    if (before_ == device) return;
    check(cudaSetDevice(device));
    changed_ = true;
  }
  explicit Device(PyObject* tensor) : Device(borrow(tensor).device.id) {}
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }

  int before_ = 0;
  bool changed_ = false;
};

// Asks the caller's function (counters, bytes) -> (address of counters, address of bytes).
cuda::Workspace reserve(void* owner, int64_t counters, int64_t bytes) {
  PyObject* made = PyObject_CallFunction(static_cast<PyObject*>(owner), "LL", static_cast<long long>(counters),
                                         static_cast<long long>(bytes));
  if (!made) throw Raised();
  cuda::Workspace workspace{};
  if (PyTuple_Check(made) && PyTuple_GET_SIZE(made) == 2) {
    workspace.counters = static_cast<unsigned*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(made, 0)));
    workspace.bytes = static_cast<char*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(made, 1)));
  }
  Py_DECREF(made);
  if (PyErr_Occurred()) throw Raised();
  return workspace;
}

// Takes a workspace function and a stream handle, and enqueues there.
class Cuda {
 public:
  static constexpr int threads = 0;

  void enter(PyObject* tensor) { device_.emplace(tensor); }
  void place(Arguments& in) {
    PyObject* owner = in.object();
    on_ = {reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(in.integer())), reserve, owner};
  }
  void run(const TokenStatsArgs& args) const { cuda::token_stats(args, on_); }
  void run(const LogprobRankArgs& args) const { cuda::logprob_rank(args, on_); }
  void run(const FilterLogitsArgs& args) const { cuda::filter_logits(args, on_); }
  void run(const SampleArgs& args) const { cuda::sample(args, on_); }
  void run(const GateBlockArgs& args) const { cuda::gate_block(args, on_); }
  void run(const AcceptBlockArgs& args) const { cuda::accept_block(args, on_); }
  void run(const KvCompactArgs& args) const { cuda::kv_compact(args, on_); }

 private:
  std::optional<Device> device_;
  cuda::Launch on_{};
};

PyMethodDef methods[] = {
    {"use_tensors_of", use_tensors_of, METH_O, "Read tensors by the C functions of this type."},
    method<python::token_stats<Cuda>>("token_stats"),
    method<python::logprob_rank<Cuda>>("logprob_rank"),
    method<python::filter_logits<Cuda>>("filter_logits"),
    method<python::sample<Cuda>>("sample"),
    method<python::gate_block<Cuda>>("gate_block"),
    method<python::accept_block<Cuda>>("accept_block"),
    method<python::kv_compact<Cuda>>("kv_compact"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(UGSD_MODULE, m) {
  m.doc() = "CUDA kernels of ugsd_fast.ops";
  m.attr("archs") = UGSD_ARCHS;  // what they were compiled for
  device_type = UGSD_DEVICE_TYPE;
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}
