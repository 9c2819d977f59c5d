// Top-k, top-p and min-p as one threshold on the logit: columns at or over it stay.
//
// No sort of the vocabulary. Top-k: the k-th largest of the maxima of small groups is a bound under which no
// survivor lies; the few columns over it are collected. Top-p: columns under (1 - p) / V of the mass cannot, all
// together, hold what is cut; the others are collected. A selection by bisection of the collected values follows.
#pragma once

#include "ugsd/token_stats.h"

namespace ugsd {

namespace detail {

// Values of the columns at or over `bound` (and not masked), in column order; room for kLanes more must follow.
// Blocks that cannot reach the bound are not read.
template <class S, class T>
int64_t collect(const T* z, int64_t columns, const BlockSums* blocks, float bound, float* values, int32_t* numbers) {
  if (bound == -kInfinity) bound = -kLargest;
  const auto b = S::set(bound), largest = S::set(kLargest);
  int64_t count = 0;
  for (int64_t j = 0; j < blocks_of(columns); ++j) {
    if (blocks[j].bound < bound) continue;
    const int64_t end = j * kBlock + block_size(columns, j);
    for (int64_t i = j * kBlock; i < end; i += S::kLanes) {
      const auto x = S::min(largest, S::load_partial(z + i, static_cast<int>(end - i), -kInfinity));
      const auto over = S::greater_equal(x, b);
      if (!S::bits(over)) continue;
      if (numbers) S::compress_columns(numbers + count, over, static_cast<int32_t>(i));
      count += S::compress(values + count, over, x);
    }
  }
  return count;
}

// Maxima of disjoint groups of columns, one a lane and stretch of 32 vectors; masked groups are left out.
template <class S, class T>
int64_t group_maxima(const T* z, int64_t columns, float* maxima) {
  constexpr int64_t kStretch = 32 * S::kLanes;
  const auto largest = S::set(kLargest), masked = S::set(-kInfinity);
  int64_t count = 0;
  for (int64_t i = 0; i < columns;) {
    auto even = masked, odd = masked, a = masked, b = masked;
    const int64_t end = columns - i < kStretch ? columns : i + kStretch;
    for (; i + 2 * S::kLanes <= end; i += 2 * S::kLanes) {
      S::load_pair(z + i, a, b);
      even = S::max(a, even);
      odd = S::max(b, odd);
    }
    for (; i < end; i += S::kLanes) even = S::max(S::load_partial(z + i, static_cast<int>(end - i), -kInfinity), even);
    const auto m = S::min(largest, S::max(even, odd));
    count += S::compress(maxima + count, S::greater(m, masked), m);
  }
  return count;
}

// Lowest of the largest values that together reach `target`, each counted with weight(v): ties stay together. The
// values are reordered; `spare` has room for as many and two vectors.
template <class S, class Weight, class ScalarWeight>
float select_threshold(float* values, int64_t n, double target, float* spare, const Weight& weight,
                       const ScalarWeight& scalar_weight) {
  float low = kInfinity, high = -kInfinity;
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] < low) low = values[i];
    if (values[i] > high) high = values[i];
  }
  double above = 0;
  while (n > 48 && low < high) {
    float pivot = 0.5f * low + 0.5f * high;
    const bool adjacent = !(pivot > low && pivot < high);  // no float between them
    if (adjacent) pivot = low;
    const auto p = S::set(pivot);
    // The larger values go to the spare, the others stay: both ends grow behind the reading position.
    int64_t larger = 0, others = 0;
    double mass = 0;
    for (int64_t i = 0; i < n;) {
      auto sum = S::set(0);
      for (const int64_t end = i + 64 * S::kLanes; i < n && i < end; i += S::kLanes) {
        const auto v = S::load_partial(values + i, static_cast<int>(n - i), -kInfinity);
        const auto over = S::greater(v, p);
        const auto rest = S::greater_equal(p, S::select(S::greater(v, S::set(-kInfinity)), v, S::set(kInfinity)));
        sum = S::add_where(over, sum, weight(v));
        larger += S::compress(spare + larger, over, v);
        others += S::compress(values + others, rest, v);
      }
      mass += S::sum(sum);
    }
    if (above + mass >= target) {
      if (adjacent) return high;
      for (int64_t i = 0; i < larger; ++i) values[i] = spare[i];
      n = larger;
      low = pivot;
    } else {
      above += mass;
      n = others;
      high = pivot;
    }
  }
  if (low >= high) return high;
  for (int64_t i = 1; i < n; ++i) {  // insertion sort, largest first
    const float v = values[i];
    int64_t k = i;
    for (; k > 0 && values[k - 1] < v; --k) values[k] = values[k - 1];
    values[k] = v;
  }
  float threshold = values[0];
  for (int64_t i = 0; i < n && above < target; ++i) {
    threshold = values[i];
    above += scalar_weight(values[i]);
  }
  return threshold;
}

// The lowest logit that stays in a row; -inf where the filters cut nothing.
template <class S, class T>
float filter_threshold(const T* z, int64_t columns, const BlockSums* blocks, const RowStats& stats, float scale,
                       const RowFilter& filter) {
  if (stats.max == -kInfinity) return -kInfinity;
  const float max = stats.max;
  float threshold = -kInfinity;
  auto* values = static_cast<float*>(scratch(1, 2 * (columns + 2 * S::kLanes) * sizeof(float)));
  float* spare = values + columns + 2 * S::kLanes;
  int64_t n = 0;
  double total = stats.mass;
  const auto one = [](auto) { return S::set(1); };
  if (filter.top_k > 0) {
    const auto k = static_cast<double>(filter.top_k);
    int64_t groups = group_maxima<S>(z, columns, values);
    const float bound = groups < filter.top_k
                            ? -kInfinity
                            : select_threshold<S>(values, groups, k, spare, one, [](float) { return 1.0; });
    n = collect<S>(z, columns, blocks, bound, values, nullptr);
    if (n >= filter.top_k) threshold = select_threshold<S>(values, n, k, spare, one, [](float) { return 1.0; });
  }
  if (filter.top_p < 1) {
    const auto lowest = S::set(simd::kLowest / exp_scale(scale)), m = S::set(max);
    const typename S::Exp exp(exp_scale(scale));
    const auto mass = [&](auto v) { return exp(S::max(S::sub(v, m), lowest)); };
    const auto scalar_mass = [&](float v) { return std::exp((static_cast<double>(v) - max) * scale); };
    if (filter.top_k > 0) {
      n = collect<S>(z, columns, blocks, threshold, values, nullptr);
      total = 0;
      for (int64_t i = 0; i < n; ++i) total += scalar_mass(values[i]);
    } else {
      // Columns under this could all go without cutting 1 - p of the mass; a digit is left for rounding.
      const double share = 0.99 * (1.0 - static_cast<double>(filter.top_p)) / static_cast<double>(columns);
      const double bound = max + std::log(share * total) / scale;
      n = collect<S>(z, columns, blocks, bound < max ? static_cast<float>(bound) : max, values, nullptr);
    }
    const float nucleus =
        select_threshold<S>(values, n, static_cast<double>(filter.top_p) * total, spare, mass, scalar_mass);
    if (nucleus > threshold) threshold = nucleus;
  }
  if (filter.min_p > 0) {
    const float bound = round_up(max + std::log(static_cast<double>(filter.min_p)) / scale);
    if (bound > threshold) threshold = bound;
  }
  return threshold;
}

}  // namespace detail
}  // namespace ugsd
