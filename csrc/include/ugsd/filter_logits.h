// filter_logits: z / T with -inf where top-k, top-p or min-p cut, in float32.
//
// One read of the row for what the filters need, one more with the write.
#pragma once

#include "ugsd/filters.h"

namespace ugsd {

namespace detail {

template <class S, class T>
void filter_logits(const FilterLogitsArgs& args) {
  const Rows& rows = args.logits;
  const auto finish = [&](int64_t r, float scale, const BlockSums* blocks, const RowStats& stats) {
    const T* z = rows.row<T>(r);
    float* out = args.out + r * rows.columns;
    const float t = args.temperature[r];
    const RowFilter filter(args.filters, r, rows.columns);
    const bool greedy = !(t > 0);
    float threshold = stats.max;
    if (!greedy)
      threshold = filter.any() ? filter_threshold<S>(z, rows.columns, blocks, stats, scale, filter) : -kInfinity;
    const auto bound = S::set(threshold), masked = S::set(-kInfinity), largest = S::set(kLargest);
    const auto divisor = S::set(greedy ? 1.0f : t);
    for (int64_t i = 0; i < rows.columns; i += S::kLanes) {
      const int n = static_cast<int>(rows.columns - i);
      const auto x = S::min(largest, S::load_partial(z + i, n, -kInfinity));
      const auto kept = S::select(S::greater_equal(x, bound), S::div(x, divisor), masked);
      S::store_partial(out + i, kept, n);
    }
    if (greedy) {  // ties with the maximum go, the first of them stays
      const float best = stats.argmax < 0 ? -kInfinity : out[stats.argmax];
      for (int64_t i = 0; i < rows.columns; ++i) out[i] = i == stats.argmax ? best : -kInfinity;
    }
  };
  for_row_stats<S, T>(rows, args.temperature, args.threads, finish);
}

}  // namespace detail

template <class S>
void filter_logits(const FilterLogitsArgs& args) {
  with_dtype(args.logits.dtype, [&](auto zero) { detail::filter_logits<S, decltype(zero)>(args); });
}

}  // namespace ugsd
