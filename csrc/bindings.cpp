// ugsd_fast._C: the ops on tensors that the Python side has checked; None stands for an absent one.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "ugsd/kernels.h"

namespace py = pybind11;
using namespace ugsd;
using namespace ugsd::python;

namespace {

// The instruction set in force.
const Kernels* table = &kernels();

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Calls under this many logits keep the GIL: handing it over would cost more than they do.
constexpr int64_t kShortCall = 1 << 14;

template <class Kernel, class Args>
void call(Kernel* kernel, const Args& args, int64_t logits) {
  std::optional<py::gil_scoped_release> release;
  if (logits >= kShortCall) release.emplace();
  kernel(args);
}

// The rows' shape: the dimensions of logits before the last.
struct Leading {
  explicit Leading(PyObject* logits) {
    const dlpack::Tensor tensor = borrow(logits);
    shape = tensor.shape;
    dims = tensor.dims - 1;
  }
  const int64_t* shape;
  int32_t dims;
};

Results<5> stats_results(PyObject* given, const Leading& rows) {
  const Result number = result<float>(rows.dims);
  return {given, rows.shape, {number, number, number, result<int64_t>(rows.dims), number}};
}

// logits, temperature and temperatures, threads, out
PyObject* token_stats(Arguments& in) {
  const Leading leading(in.peek());
  const Rows logits = in.rows();
  const auto temperature = in.per_row<float>();
  const int threads = static_cast<int>(in.integer());
  Results<5> out = stats_results(in.object(), leading);
  call(table->token_stats, TokenStatsArgs{logits, temperature, stats_out(out, 0), threads},
       logits.count() * logits.columns);
  return out.release();
}

// logits, tokens, temperature and temperatures, logsumexp, threads, out
PyObject* logprob_rank(Arguments& in) {
  const Leading leading(in.peek());
  const Rows logits = in.rows();
  const auto* tokens = in.elements<int64_t>();
  const auto temperature = in.per_row<float>();
  const auto* logsumexp = in.elements<float>();
  const int threads = static_cast<int>(in.integer());
  Results<2> out(in.object(), leading.shape, {result<float>(leading.dims), result<int64_t>(leading.dims)});
  call(table->logprob_rank,
       LogprobRankArgs{logits, tokens, temperature, logsumexp, out.data<float>(0), out.data<int64_t>(1), threads},
       logits.count() * logits.columns);
  return out.release();
}

// logits, four settings with their tensors, threads, out
PyObject* filter_logits(Arguments& in) {
  const dlpack::Tensor given = borrow(in.peek());
  const Rows logits = in.rows();
  const auto temperature = in.per_row<float>();
  const Filters settings = filters(in);
  const int threads = static_cast<int>(in.integer());
  Results<1> out(in.object(), given.shape, {result<float>(given.dims)});
  call(table->filter_logits, FilterLogitsArgs{logits, temperature, settings, out.data<float>(0), threads},
       logits.count() * logits.columns);
  return out.release();
}

// logits, four settings, seed and offset with their tensors, threads, out
PyObject* sample(Arguments& in) {
  const Leading leading(in.peek());
  const Rows logits = in.rows();
  const auto temperature = in.per_row<float>();
  const Filters settings = filters(in);
  const auto seed = in.per_row<int64_t>(), offset = in.per_row<int64_t>();
  const int threads = static_cast<int>(in.integer());
  const Result number = result<float>(leading.dims), id = result<int64_t>(leading.dims);
  Results<7> out(in.object(), leading.shape, {id, number, number, number, number, id, number});
  call(table->sample,
       SampleArgs{logits, temperature, settings, seed, offset, out.data<int64_t>(0), out.data<float>(1),
                  stats_out(out, 2), threads},
       logits.count() * logits.columns);
  return out.release();
}

// entropy, lengths, threshold and thresholds, reduction, out
PyObject* gate_block(Arguments& in) {
  const dlpack::Tensor entropy = borrow(in.object());
  const auto* lengths = in.elements<int64_t>();
  const auto threshold = in.per_row<float>();
  const auto reduce = static_cast<Reduction>(in.integer());
  Results<2> out(in.object(), entropy.shape, {result<float>(1), result<bool>(1)});
  call(ugsd::gate_blocks,
       GateBlockArgs{static_cast<const float*>(entropy.data), entropy.shape[0], entropy.shape[1], entropy.strides[0],
                     entropy.strides[1], lengths, threshold, reduce, out.data<float>(0), out.data<bool>(1)},
       entropy.shape[0] * entropy.shape[1]);
  return out.release();
}

// target logits, draft logits, draft tokens, rule, lengths, limit and limits, slack and slacks, logsumexp of the draft
// rows, bonus, seed and seeds, offset and offsets, uniforms, threads, out
PyObject* accept_block(Arguments& in) {
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
  const int threads = static_cast<int>(in.integer());
  Results<3> out(in.object(), shape, {result<int64_t>(1), result<int64_t>(1), result<float>(2)});
  call(table->accept_block,
       AcceptBlockArgs{target, draft, tokens, shape[0], shape[1], rule, lengths, limit, slack, draft_logsumexp, bonus,
                       seed, offset, uniforms, out.data<int64_t>(0), out.data<int64_t>(1), out.data<float>(2), threads},
       target.count() * target.columns);
  return out.release();
}

// hidden, weight, bias, temperature and temperatures, threads, out
PyObject* lm_head_stats(Arguments& in) {
  const Leading leading(in.peek());
  const Rows hidden = in.rows(), weight = in.rows();
  const void* bias = in.contiguous_data();
  const auto temperature = in.per_row<float>();
  const int threads = static_cast<int>(in.integer());
  Results<5> out = stats_results(in.object(), leading);
  call(table->lm_head_stats, LmHeadStatsArgs{hidden, weight, bias, temperature, stats_out(out, 0), threads},
       weight.count() * weight.columns);
  return out.release();
}

PyMethodDef methods[] = {
    {"use_tensors_of", use_tensors_of, METH_O, "Read and make tensors by the C functions of this type."},
    method<token_stats>("token_stats"),
    method<logprob_rank>("logprob_rank"),
    method<filter_logits>("filter_logits"),
    method<sample>("sample"),
    method<gate_block>("gate_block"),
    method<accept_block>("accept_block"),
    method<lm_head_stats>("lm_head_stats"),
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

  m.def("kv_compact",
        [](const py::list& addresses, const py::list& layouts, int64_t batch, int64_t slots, uintptr_t keep,
           int64_t keep_stride, uintptr_t lengths, int align, int threads, uintptr_t kept) {
          const std::vector<KvTensor> kv = kv_tensors(addresses.ptr(), layouts.ptr());
          const KvCompactArgs args{kv.data(),
                                   static_cast<int64_t>(kv.size()),
                                   batch,
                                   slots,
                                   pointer<const bool>(keep),
                                   keep_stride,
                                   pointer<const int64_t>(lengths),
                                   static_cast<Align>(align),
                                   pointer<int64_t>(kept),
                                   threads};
          const py::gil_scoped_release release;
          kv_compact(args, table->move_slots);
        });

  // The extension of the CUDA kernels, where it was built.
  m.def("cuda", [] { return py::module_::import("ugsd_fast._cuda"); });
}
