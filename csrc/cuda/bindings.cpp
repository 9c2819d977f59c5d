// ugsd_fast._cuda: the ops on CUDA tensors that the Python side has checked, results included; None stands for an
// absent one. Calls enqueue and return.
#include <pybind11/pybind11.h>

#include "../arguments.h"
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

// Workspace function and stream handle.
cuda::Launch launch(Arguments& in) {
  PyObject* owner = in.object();
  const auto stream = static_cast<uintptr_t>(in.integer());
  return {reinterpret_cast<cudaStream_t>(stream), reserve, owner};
}

// logits, temperature and temperatures, launch, out
PyObject* token_stats(Arguments& in) {
  const Device device(in.peek());
  const Rows logits = in.rows();
  const auto temperature = in.per_row<float>();
  const cuda::Launch on = launch(in);
  Results<5> out(in.object());
  cuda::token_stats({logits, temperature, stats_out(out, 0), 0}, on);
  return out.release();
}

// logits, tokens, temperature and temperatures, logsumexp, launch, out
PyObject* logprob_rank(Arguments& in) {
  const Device device(in.peek());
  const Rows logits = in.rows();
  const auto* tokens = in.elements<int64_t>();
  const auto temperature = in.per_row<float>();
  const auto* logsumexp = in.elements<float>();
  const cuda::Launch on = launch(in);
  Results<2> out(in.object());
  cuda::logprob_rank({logits, tokens, temperature, logsumexp, out.data<float>(0), out.data<int64_t>(1), 0}, on);
  return out.release();
}

// logits, four settings with their tensors, launch, out
PyObject* filter_logits(Arguments& in) {
  const Device device(in.peek());
  const Rows logits = in.rows();
  const auto temperature = in.per_row<float>();
  const Filters settings = filters(in);
  const cuda::Launch on = launch(in);
  Results<1> out(in.object());
  cuda::filter_logits({logits, temperature, settings, out.data<float>(0), 0}, on);
  return out.release();
}

// logits, four settings, seed and offset with their tensors, launch, out
PyObject* sample(Arguments& in) {
  const Device device(in.peek());
  const Rows logits = in.rows();
  const auto temperature = in.per_row<float>();
  const Filters settings = filters(in);
  const auto seed = in.per_row<int64_t>(), offset = in.per_row<int64_t>();
  const cuda::Launch on = launch(in);
  Results<7> out(in.object());
  cuda::sample(
      {logits, temperature, settings, seed, offset, out.data<int64_t>(0), out.data<float>(1), stats_out(out, 2), 0},
      on);
  return out.release();
}

// entropy, lengths, threshold and thresholds, reduction, launch, out
PyObject* gate_block(Arguments& in) {
  const Device device(in.peek());
  const dlpack::Tensor entropy = borrow(in.object());
  const auto* lengths = in.elements<int64_t>();
  const auto threshold = in.per_row<float>();
  const auto reduce = static_cast<Reduction>(in.integer());
  const cuda::Launch on = launch(in);
  Results<2> out(in.object());
  cuda::gate_block({static_cast<const float*>(entropy.data), entropy.shape[0], entropy.shape[1], entropy.strides[0],
                    entropy.strides[1], lengths, threshold, reduce, out.data<float>(0), out.data<bool>(1)},
                   on);
  return out.release();
}

// target logits, draft logits, draft tokens, rule, lengths, limit and limits, slack and slacks, logsumexp of the draft
// rows, bonus, seed and seeds, offset and offsets, uniforms, launch, out
PyObject* accept_block(Arguments& in) {
  const Device device(in.peek());
  const Rows target = in.rows(), draft = in.rows();
  const int64_t* shape = borrow(in.peek()).shape;
  const auto* tokens = in.elements<int64_t>();
  const auto rule = static_cast<Rule>(in.integer());
  const auto* lengths = in.elements<int64_t>();
  const auto limit = in.per_row<double>(), slack = in.per_row<double>();
  const auto* draft_logsumexp = in.elements<float>();
  const bool bonus = in.object() == Py_True;
  const auto seed = in.per_row<int64_t>(), offset = in.per_row<int64_t>();
  const auto* uniforms = in.elements<double>();
  const cuda::Launch on = launch(in);
  Results<3> out(in.object());
  cuda::accept_block({target, draft, tokens, shape[0], shape[1], rule, lengths, limit, slack, draft_logsumexp, bonus,
                      seed, offset, uniforms, out.data<int64_t>(0), out.data<int64_t>(1), out.data<float>(2), 0},
                     on);
  return out.release();
}

// addresses, layouts, batch, slots, keep mask and its stride, lengths, alignment, launch, kept
PyObject* kv_compact(Arguments& in) {
  PyObject *addresses = in.object(), *layouts = in.object();
  const std::vector<KvTensor> kv = kv_tensors(addresses, layouts);
  const int64_t batch = in.integer(), slots = in.integer();
  const auto* keep = reinterpret_cast<const bool*>(in.integer());
  const int64_t stride = in.integer();
  const auto* lengths = reinterpret_cast<const int64_t*>(in.integer());
  const auto align = static_cast<Align>(in.integer());
  const cuda::Launch on = launch(in);
  const Device device(in.peek());
  auto* kept = static_cast<int64_t*>(borrow(in.object()).data);
  cuda::kv_compact({kv.data(), static_cast<int64_t>(kv.size()), batch, slots, keep, stride, lengths, align, kept, 0},
                   on);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"use_tensors_of", use_tensors_of, METH_O, "Read tensors by the C functions of this type."},
    method<token_stats>("token_stats"),
    method<logprob_rank>("logprob_rank"),
    method<filter_logits>("filter_logits"),
    method<sample>("sample"),
    method<gate_block>("gate_block"),
    method<accept_block>("accept_block"),
    method<kv_compact>("kv_compact"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(UGSD_MODULE, m) {
  m.doc() = "CUDA kernels of ugsd_fast.ops";
  m.attr("archs") = UGSD_ARCHS;  // what they were compiled for
  device_type = UGSD_DEVICE_TYPE;
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}
