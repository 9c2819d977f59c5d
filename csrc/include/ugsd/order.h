// Maxima, positions and counts of a stretch of columns: what needs the order of the logits and no exponential.
#pragma once

#include <limits>

#include "ugsd/simd/scalar.h"
#include "ugsd/types.h"

namespace ugsd::detail {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// One logit as all ops read it: NaN is masked, +inf is the largest number.
template <class T>
UGSD_INLINE float logit(const T* z, int64_t column) {
  const float x = simd::to_float(z[column]);
  return x > kLargest ? kLargest : x == x ? x : -kInfinity;
}

template <class S, class T>
float block_max(const T* z, int64_t n) {
  using F = typename S::Float;
  constexpr int kStep = 2 * S::kLanes;
  F m0 = S::set(-kInfinity), m1 = m0, m2 = m0, m3 = m0, a, b;
  int64_t i = 0;
  for (; i + 2 * kStep <= n; i += 2 * kStep) {
    S::load_pair(z + i, a, b);
    m0 = S::max(a, m0);
    m1 = S::max(b, m1);
    S::load_pair(z + i + kStep, a, b);
    m2 = S::max(a, m2);
    m3 = S::max(b, m3);
  }
  for (; i < n; i += S::kLanes) m0 = S::max(S::load_partial(z + i, static_cast<int>(n - i), -kInfinity), m0);
  const float m = S::maximum(S::max(S::max(m0, m1), S::max(m2, m3)));
  return m < kLargest ? m : kLargest;
}

// First column that equals `value`; n if there is none.
template <class S, class T>
int64_t find_first(const T* z, int64_t n, float value) {
  const auto wanted = S::set(value), largest = S::set(kLargest);
  for (int64_t i = 0; i < n; i += S::kLanes) {
    const auto x = S::min(largest, S::load_partial(z + i, static_cast<int>(n - i), -kInfinity));
    if (const uint32_t hit = S::bits(S::equal(x, wanted))) return i + __builtin_ctz(hit);
  }
  return n;
}

// Columns larger than `value`.
template <class S, class T>
int64_t count_greater(const T* z, int64_t n, float value) {
  using F = typename S::Float;
  // A logit of +inf reads as the largest number, so nothing is over that.
  const F v = S::set(value < kLargest ? value : kInfinity), one = S::set(1);
  F c0 = S::set(0), c1 = c0, c2 = c0, c3 = c0, a, b;
  constexpr int kStep = 2 * S::kLanes;
  int64_t i = 0;
  for (; i + 2 * kStep <= n; i += 2 * kStep) {
    S::load_pair(z + i, a, b);
    c0 = S::add_where(S::greater(a, v), c0, one);
    c1 = S::add_where(S::greater(b, v), c1, one);
    S::load_pair(z + i + kStep, a, b);
    c2 = S::add_where(S::greater(a, v), c2, one);
    c3 = S::add_where(S::greater(b, v), c3, one);
  }
  for (; i < n; i += S::kLanes)
    c0 = S::add_where(S::greater(S::load_partial(z + i, static_cast<int>(n - i), -kInfinity), v), c0, one);
  return static_cast<int64_t>(S::sum(S::add(S::add(c0, c1), S::add(c2, c3))));
}

}  // namespace ugsd::detail
