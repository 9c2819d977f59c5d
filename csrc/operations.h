// The ops as Python functions, on any device: arguments in order, then where to run, then `out`.
//
// `On` says where: `enter` is given one of the tensors, `place` takes its own arguments of the call, and `run` knows
// the op by its arguments.
#pragma once

#include "arguments.h"

namespace ugsd::python {

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

inline Results<5> stats_results(PyObject* given, const Leading& rows) {
  const Result number = result<float>(rows.dims);
  return {given, rows.shape, {number, number, number, result<int64_t>(rows.dims), number}};
}

// logits, temperature and temperatures, place, out
template <class On>
PyObject* token_stats(Arguments& in) {
  On on;
  on.enter(in.peek());
  const Leading leading(in.peek());
  const Rows logits = in.rows();
  const auto temperature = in.per_row<float>();
  on.place(in);
  Results<5> out = stats_results(in.object(), leading);
  on.run(TokenStatsArgs{logits, temperature, stats_out(out, 0), on.threads});
  return out.release();
}

// logits, tokens, temperature and temperatures, logsumexp, place, out
template <class On>
PyObject* logprob_rank(Arguments& in) {
  On on;
  on.enter(in.peek());
  const Leading leading(in.peek());
  const Rows logits = in.rows();
  const auto* tokens = in.elements<int64_t>();
  const auto temperature = in.per_row<float>();
  const auto* logsumexp = in.elements<float>();
  on.place(in);
  Results<2> out(in.object(), leading.shape, {result<float>(leading.dims), result<int64_t>(leading.dims)});
  on.run(LogprobRankArgs{logits, tokens, temperature, logsumexp, out.data<float>(0), out.data<int64_t>(1), on.threads});
  return out.release();
}

// logits, four settings with their tensors, place, out
template <class On>
PyObject* filter_logits(Arguments& in) {
  On on;
  on.enter(in.peek());
  const dlpack::Tensor given = borrow(in.peek());
  const Rows logits = in.rows();
  const auto temperature = in.per_row<float>();
  const Filters settings = filters(in);
  on.place(in);
  Results<1> out(in.object(), given.shape, {result<float>(given.dims)});
  on.run(FilterLogitsArgs{logits, temperature, settings, out.data<float>(0), on.threads});
  return out.release();
}

// logits, four settings, seed and offset with their tensors, place, out
template <class On>
PyObject* sample(Arguments& in) {
  On on;
  on.enter(in.peek());
  const Leading leading(in.peek());
  const Rows logits = in.rows();
  const auto temperature = in.per_row<float>();
  const Filters settings = filters(in);
  const auto seed = in.per_row<int64_t>(), offset = in.per_row<int64_t>();
  on.place(in);
  const Result number = result<float>(leading.dims), id = result<int64_t>(leading.dims);
  Results<7> out(in.object(), leading.shape, {id, number, number, number, number, id, number});
  on.run(SampleArgs{logits, temperature, settings, seed, offset, out.data<int64_t>(0), out.data<float>(1),
                    stats_out(out, 2), on.threads});
  return out.release();
}

// entropy, lengths, threshold and thresholds, reduction, place, out
template <class On>
PyObject* gate_block(Arguments& in) {
  On on;
  on.enter(in.peek());
  const dlpack::Tensor entropy = borrow(in.object());
  const auto* lengths = in.elements<int64_t>();
  const auto threshold = in.per_row<float>();
  const auto reduce = static_cast<Reduction>(in.integer());
  on.place(in);
  Results<2> out(in.object(), entropy.shape, {result<float>(1), result<bool>(1)});
  on.run(GateBlockArgs{static_cast<const float*>(entropy.data), entropy.shape[0], entropy.shape[1], entropy.strides[0],
                       entropy.strides[1], lengths, threshold, reduce, out.data<float>(0), out.data<bool>(1)});
  return out.release();
}

// target logits, draft logits, draft tokens, rule, lengths, limit and limits, slack and slacks, logsumexp of the draft
// rows, bonus, seed and seeds, offset and offsets, uniforms, place, out
template <class On>
PyObject* accept_block(Arguments& in) {
  On on;
  on.enter(in.peek());
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
  on.place(in);
  Results<3> out(in.object(), shape, {result<int64_t>(1), result<int64_t>(1), result<float>(2)});
  on.run(AcceptBlockArgs{target, draft, tokens, shape[0], shape[1], rule, lengths, limit, slack, draft_logsumexp, bonus,
                         seed, offset, uniforms, out.data<int64_t>(0), out.data<int64_t>(1), out.data<float>(2),
                         on.threads});
  return out.release();
}

// addresses, layouts, batch, slots, keep mask and its stride, lengths, alignment, place, kept
template <class On>
PyObject* kv_compact(Arguments& in) {
  On on;
  PyObject *addresses = in.object(), *layouts = in.object();
  const std::vector<KvTensor> kv = kv_tensors(addresses, layouts);
  const int64_t batch = in.integer(), slots = in.integer();
  const auto* keep = reinterpret_cast<const bool*>(in.integer());
  const int64_t stride = in.integer();
  const auto* lengths = reinterpret_cast<const int64_t*>(in.integer());
  const auto align = static_cast<Align>(in.integer());
  on.place(in);
  on.enter(in.peek());
  auto* kept = static_cast<int64_t*>(borrow(in.object()).data);
  on.run(KvCompactArgs{kv.data(), static_cast<int64_t>(kv.size()), batch, slots, keep, stride, lengths, align, kept,
                       on.threads});
  Py_RETURN_NONE;
}

}  // namespace ugsd::python
