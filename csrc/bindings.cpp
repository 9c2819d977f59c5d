// ugsd_fast._C: the ops on tensors that the Python side has checked; None stands for an absent one.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "operations.h"
#include "ugsd/kernels.h"

namespace py = pybind11;
using namespace ugsd;
using namespace ugsd::python;

namespace {

// The instruction set in force.
const Kernels* table = &kernels();

// Calls under this many logits keep the GIL: handing it over would cost more than they do.
constexpr int64_t kShortCall = 1 << 14;

template <class Kernel, class Args>
void call(Kernel* kernel, const Args& args, int64_t logits) {
  std::optional<py::gil_scoped_release> release;
  if (logits >= kShortCall) release.emplace();
  kernel(args);
}

int64_t size(const Rows& rows) { return rows.count() * rows.columns; }

// Takes a number of threads, and returns when they are done.
class Cpu {
 public:
  int threads = 1;

  void enter(PyObject*) {}
  void place(Arguments& in) { threads = static_cast<int>(in.integer()); }
  void run(const TokenStatsArgs& args) const { call(table->token_stats, args, size(args.logits)); }
  void run(const LogprobRankArgs& args) const { call(table->logprob_rank, args, size(args.logits)); }
  void run(const FilterLogitsArgs& args) const { call(table->filter_logits, args, size(args.logits)); }
  void run(const SampleArgs& args) const { call(table->sample, args, size(args.logits)); }
  void run(const GateBlockArgs& args) const { call(ugsd::gate_blocks, args, args.batch * args.block); }
  void run(const AcceptBlockArgs& args) const { call(table->accept_block, args, size(args.target)); }
  void run(const LmHeadStatsArgs& args) const { call(table->lm_head_stats, args, size(args.weight)); }
  void run(const KvCompactArgs& args) const {
    const py::gil_scoped_release release;
    ugsd::kv_compact(args, table->move_slots);
  }
};

// hidden, weight, bias, temperature and temperatures, place, out
PyObject* lm_head_stats(Arguments& in) {
  Cpu on;
  const Leading leading(in.peek());
  const Rows hidden = in.rows(), weight = in.rows();
  const void* bias = in.contiguous_data();
  const auto temperature = in.per_row<float>();
  on.place(in);
  Results<5> out = stats_results(in.object(), leading);
  on.run(LmHeadStatsArgs{hidden, weight, bias, temperature, stats_out(out, 0), on.threads});
  return out.release();
}

// Requests of a packed forward: a list of keys' and values' addresses, capacity, tokens and new tokens, one after the
// other.
std::vector<PackedRequest> packed_requests(PyObject* list) {
  std::vector<PackedRequest> requests(static_cast<size_t>(PyList_GET_SIZE(list) / 5));
  Py_ssize_t at = 0;
  const auto address = [&] { return static_cast<float*>(PyLong_AsVoidPtr(PyList_GET_ITEM(list, at++))); };
  const auto number = [&] { return PyLong_AsLongLong(PyList_GET_ITEM(list, at++)); };
  for (PackedRequest& request : requests) {
    request.keys = address();
    request.values = address();
    request.capacity = number();
    request.tokens = number();
    request.count = number();
  }
  if (PyErr_Occurred()) throw Raised();
  return requests;
}

// keys [1, H, N, D], values, requests
PyObject* append_slots(Arguments& in) {
  const dlpack::Tensor keys = borrow(in.object()), values = borrow(in.object());
  const std::vector<PackedRequest> requests = packed_requests(in.object());
  std::optional<py::gil_scoped_release> release;
  release.emplace();
  ugsd::append_slots({requests.data(), static_cast<int64_t>(requests.size()), keys.shape[1], keys.shape[3],
                      values.shape[3], static_cast<const float*>(keys.data), static_cast<const float*>(values.data),
                      keys.strides[1], keys.strides[2], values.strides[1], values.strides[2]});
  release.reset();
  Py_RETURN_NONE;
}

// query [1, H, N, D], out [1, N, H, D'], requests, kv_heads, scale, threads
PyObject* packed_attention(Arguments& in) {
  const dlpack::Tensor query = borrow(in.object()), out = borrow(in.object());
  const std::vector<PackedRequest> requests = packed_requests(in.object());
  const int64_t kv_heads = in.integer();
  const auto scale = static_cast<float>(in.number());
  const auto threads = static_cast<int>(in.integer());
  std::optional<py::gil_scoped_release> release;
  release.emplace();
  table->packed_attention({requests.data(), static_cast<int64_t>(requests.size()), query.shape[1], kv_heads,
                           query.shape[3], out.shape[3], static_cast<const float*>(query.data), query.strides[1],
                           query.strides[2], scale, static_cast<float*>(out.data), threads});
  release.reset();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"use_tensors_of", use_tensors_of, METH_O, "Read and make tensors by the C functions of this type."},
    method<python::token_stats<Cpu>>("token_stats"),
    method<python::logprob_rank<Cpu>>("logprob_rank"),
    method<python::filter_logits<Cpu>>("filter_logits"),
    method<python::sample<Cpu>>("sample"),
    method<python::gate_block<Cpu>>("gate_block"),
    method<python::accept_block<Cpu>>("accept_block"),
    method<python::kv_compact<Cpu>>("kv_compact"),
    method<lm_head_stats>("lm_head_stats"),
    method<append_slots>("append_slots"),
    method<packed_attention>("packed_attention"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ SIMD kernels of ugsd_fast.ops";
  if (const char* wanted = std::getenv("UGSD_CPU_ISA"))
    if (!kernels_of(wanted))
      throw py::import_error(std::string("UGSD_CPU_ISA is '") + wanted +
                             "', which this build or machine does not have");

  m.def("isa", [] { return table->isa; }, "Name of the instruction set in use.");
  m.def(
      "isas",
      [] {
        py::list names;
        for (const char* const* name = isas(); *name; ++name) names.append(*name);
        return py::tuple(names);
      },
      "Names of the instruction sets that this build has and this machine runs, best first.");
  m.def(
      "set_isa",
      [](const char* name) {
        const Kernels* named = kernels_of(name);
        if (!named) throw py::value_error(std::string("set_isa: this build or machine has no '") + name + "'");
        table = named;
      },
      "Use another instruction set of this build.");

  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();

  // The extension of the CUDA kernels, where it was built.
  m.def("cuda", [] { return py::module_::import("ugsd_fast._cuda"); });
}
