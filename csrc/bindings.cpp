// ugsd_fast._C: the ops on raw pointers, shapes and strides. The Python side checks, allocates and owns; a null
// pointer stands for an absent tensor.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdlib>
#include <string>
#include <vector>

#include "ugsd/kernels.h"

namespace py = pybind11;
using namespace ugsd;

namespace {

// The instruction set in force.
const Kernels* table = &kernels();

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
PerRow<T> per_row(T number, uintptr_t rows) {
  return {number, pointer<const T>(rows)};
}

// (pointer, dtype, outer, inner, outer stride, inner stride, columns), as ops/native.py packs it
Rows unpack(const py::tuple& rows) {
  std::array<int64_t, 7> fields;
  for (size_t i = 0; i < fields.size(); ++i) fields[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(rows.ptr(), i));
  return {reinterpret_cast<const void*>(fields[0]),
          static_cast<DType>(fields[1]),
          fields[2],
          fields[3],
          fields[4],
          fields[5],
          fields[6]};
}

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

  m.def("token_stats",
        [](const py::tuple& logits, float temperature, uintptr_t temperatures, int threads, uintptr_t logsumexp,
           uintptr_t entropy, uintptr_t max_logit, uintptr_t argmax, uintptr_t margin) {
          const TokenStatsArgs args{unpack(logits),
                                    per_row(temperature, temperatures),
                                    {pointer<float>(logsumexp), pointer<float>(entropy), pointer<float>(max_logit),
                                     pointer<int64_t>(argmax), pointer<float>(margin)},
                                    threads};
          const py::gil_scoped_release release;
          table->token_stats(args);
        });

  m.def("logprob_rank", [](const py::tuple& logits, uintptr_t tokens, float temperature, uintptr_t temperatures,
                           uintptr_t logsumexp, int threads, uintptr_t logprob, uintptr_t rank) {
    const LogprobRankArgs args{unpack(logits),
                               pointer<const int64_t>(tokens),
                               per_row(temperature, temperatures),
                               pointer<const float>(logsumexp),
                               pointer<float>(logprob),
                               pointer<int64_t>(rank),
                               threads};
    const py::gil_scoped_release release;
    table->logprob_rank(args);
  });

  m.def("filter_logits",
        [](const py::tuple& logits, float temperature, uintptr_t temperatures, int64_t top_k, uintptr_t top_ks,
           float top_p, uintptr_t top_ps, float min_p, uintptr_t min_ps, int threads, uintptr_t out) {
          const FilterLogitsArgs args{unpack(logits),
                                      per_row(temperature, temperatures),
                                      {per_row(top_k, top_ks), per_row(top_p, top_ps), per_row(min_p, min_ps)},
                                      pointer<float>(out),
                                      threads};
          const py::gil_scoped_release release;
          table->filter_logits(args);
        });

  m.def("sample",
        [](const py::tuple& logits, float temperature, uintptr_t temperatures, int64_t top_k, uintptr_t top_ks,
           float top_p, uintptr_t top_ps, float min_p, uintptr_t min_ps, int64_t seed, uintptr_t seeds, int64_t offset,
           uintptr_t offsets, int threads, uintptr_t tokens, uintptr_t logprob, uintptr_t logsumexp, uintptr_t entropy,
           uintptr_t max_logit, uintptr_t argmax, uintptr_t margin) {
          const SampleArgs args{unpack(logits),
                                per_row(temperature, temperatures),
                                {per_row(top_k, top_ks), per_row(top_p, top_ps), per_row(min_p, min_ps)},
                                per_row(seed, seeds),
                                per_row(offset, offsets),
                                pointer<int64_t>(tokens),
                                pointer<float>(logprob),
                                {pointer<float>(logsumexp), pointer<float>(entropy), pointer<float>(max_logit),
                                 pointer<int64_t>(argmax), pointer<float>(margin)},
                                threads};
          const py::gil_scoped_release release;
          table->sample(args);
        });

  m.def("gate_block", [](uintptr_t entropy, int64_t batch, int64_t block, int64_t batch_stride, int64_t block_stride,
                         uintptr_t lengths, float threshold, uintptr_t thresholds, int reduce, uintptr_t uncertainty,
                         uintptr_t escalate) {
    gate_block({pointer<const float>(entropy), batch, block, batch_stride, block_stride,
                pointer<const int64_t>(lengths), per_row(threshold, thresholds), static_cast<Reduction>(reduce),
                pointer<float>(uncertainty), pointer<bool>(escalate)});
  });

  m.def("accept_block",
        [](const py::tuple& target, const py::tuple& draft, uintptr_t tokens, int64_t batch, int64_t block, int rule,
           uintptr_t lengths, double limit, uintptr_t limits, double slack, uintptr_t slacks, uintptr_t draft_logsumexp,
           bool bonus, int64_t seed, uintptr_t seeds, int64_t offset, uintptr_t offsets, uintptr_t uniforms,
           int threads, uintptr_t num_accepted, uintptr_t next_token, uintptr_t accept_prob) {
          const AcceptBlockArgs args{unpack(target),
                                     unpack(draft),
                                     pointer<const int64_t>(tokens),
                                     batch,
                                     block,
                                     static_cast<Rule>(rule),
                                     pointer<const int64_t>(lengths),
                                     per_row(limit, limits),
                                     per_row(slack, slacks),
                                     pointer<const float>(draft_logsumexp),
                                     bonus,
                                     per_row(seed, seeds),
                                     per_row(offset, offsets),
                                     pointer<const double>(uniforms),
                                     pointer<int64_t>(num_accepted),
                                     pointer<int64_t>(next_token),
                                     pointer<float>(accept_prob),
                                     threads};
          const py::gil_scoped_release release;
          table->accept_block(args);
        });

  // A layout is (heads, batch, head and slot strides, row length), the last four in bytes: one a tensor, or one for
  // all.
  m.def("kv_compact",
        [](const py::list& addresses, const py::list& layouts, int64_t batch, int64_t slots, uintptr_t keep,
           int64_t keep_stride, uintptr_t lengths, int align, int threads, uintptr_t kept) {
          std::vector<KvTensor> kv;
          kv.reserve(addresses.size());
          for (size_t i = 0; i < addresses.size(); ++i) {
            if (i < layouts.size()) {
              PyObject* layout = PyList_GET_ITEM(layouts.ptr(), i);
              std::array<int64_t, 5> fields;
              for (size_t k = 0; k < fields.size(); ++k) fields[k] = PyLong_AsLongLong(PyTuple_GET_ITEM(layout, k));
              kv.push_back({nullptr, fields[0], fields[1], fields[2], fields[3], fields[4]});
            } else {
              kv.push_back(kv.front());
            }
            kv.back().data = reinterpret_cast<char*>(PyLong_AsLongLong(PyList_GET_ITEM(addresses.ptr(), i)));
          }
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
          kv_compact(args);
        });

  m.def("lm_head_stats", [](const py::tuple& hidden, const py::tuple& weight, uintptr_t bias, float temperature,
                            uintptr_t temperatures, int threads, uintptr_t logsumexp, uintptr_t entropy,
                            uintptr_t max_logit, uintptr_t argmax, uintptr_t margin) {
    const LmHeadStatsArgs args{unpack(hidden),
                               unpack(weight),
                               pointer<const void>(bias),
                               per_row(temperature, temperatures),
                               {pointer<float>(logsumexp), pointer<float>(entropy), pointer<float>(max_logit),
                                pointer<int64_t>(argmax), pointer<float>(margin)},
                               threads};
    const py::gil_scoped_release release;
    table->lm_head_stats(args);
  });
}
