// sample: one token a row from softmax(filter(z / T)), with the row's statistics.
//
// The row is read once for its statistics; the draw reads one block of 4096 columns again, or, under filters, the
// blocks whose maximum reaches the threshold.
#pragma once

#include "ugsd/filters.h"
#include "ugsd/inverse_cdf.h"
#include "ugsd/philox.h"

namespace ugsd {

namespace detail {

struct Draw {
  int64_t token;
  double logprob;
};

// Draws among the columns at or over `threshold`.
template <class S, class T>
Draw draw_filtered(const T* z, int64_t columns, const BlockSums* blocks, float max, float scale, float threshold,
                   double u) {
  const int64_t room = columns + S::kLanes;
  auto* values = static_cast<float*>(scratch(1, 2 * room * sizeof(float)));
  auto* numbers = reinterpret_cast<int32_t*>(values + room);
  const int64_t n = collect<S>(z, columns, blocks, threshold, values, numbers);
  const ColumnMass<S, float> mass(values, n, max, scale);
  double total = 0;
  for (int64_t i = 0; i < n; i += S::kLanes) total += S::sum(mass(i));
  const int64_t chosen = draw_column<S>(n, u * total, mass);
  return {numbers[chosen], (static_cast<double>(values[chosen]) - max) * scale - std::log(total)};
}

template <class S, class T>
void sample(const SampleArgs& args) {
  const Rows& rows = args.logits;
  const auto finish = [&](int64_t r, float scale, const BlockSums* blocks, const RowStats& stats) {
    const T* z = rows.row<T>(r);
    store_stats(stats, args.out, r);
    Draw drawn{stats.argmax, stats.argmax < 0 ? -kInfinity : -std::log(stats.mass)};
    if (args.temperature[r] > 0 && stats.argmax >= 0) {
      const double u = uniform(args.seed[r], args.offset[r], r, Stream::kDraft);
      const RowFilter filter(args.filters, r, rows.columns);
      if (filter.any()) {
        const float threshold = filter_threshold<S>(z, rows.columns, blocks, stats, scale, filter);
        drawn = draw_filtered<S>(z, rows.columns, blocks, stats.max, scale, threshold, u);
      } else {
        drawn.token = draw_token<S>(z, rows.columns, blocks, scale, u);
        drawn.logprob = (static_cast<double>(logit(z, drawn.token)) - stats.max) * scale - std::log(stats.mass);
      }
    }
    args.tokens[r] = drawn.token;
    args.logprob[r] = static_cast<float>(drawn.logprob);
  };
  for_row_stats<S, T>(rows, args.temperature, args.threads, finish);
}

}  // namespace detail

template <class S>
void sample(const SampleArgs& args) {
  with_dtype(args.logits.dtype, [&](auto zero) { detail::sample<S, decltype(zero)>(args); });
}

}  // namespace ugsd
