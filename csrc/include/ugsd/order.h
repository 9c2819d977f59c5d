// Maxima, positions and counts of a stretch of columns: what needs the order of the logits and no exponential.
//
// Nothing is computed but comparisons, so these loops have to keep up with the read. bfloat16 and float16 are compared
// as they are stored, twice as many an instruction as floats and not widened. Read as an unsigned integer x, such a
// number is, from 0 up: the positive ones in their order, infinity, the positive NaNs; from 0x8000 up: the negative
// ones away from 0, minus infinity, the negative NaNs.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

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

// Whether elements are compared as they are stored.
template <class S, class T>
constexpr bool kAsStored = sizeof(T) == 2 && !std::is_void_v<typename S::Short>;

template <class T>
constexpr int kStoredInfinity = std::is_same_v<T, bfloat16> ? 0x7f80 : 0x7c00;
constexpr int kStoredNaN = 0x7fff, kNegative = 0x8000;

// The largest number of a 16-bit type that is not over `x`, for x from 0 to infinity.
UGSD_INLINE int round_down(float x, bfloat16) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<int>(bits >> 16);
}
UGSD_INLINE int round_down(float x, float16) {
  if (x < 0x1p-14f) return static_cast<int>(x * 0x1p24f);  // 0 and subnormals
  if (x >= 0x1p16f) return x > kLargest ? 0x7c00 : 0x7bff;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<int>((bits - 0x38000000) >> 13);
}

template <class T>
UGSD_INLINE float stored_to_float(int bits) {
  return simd::to_float(T{static_cast<uint16_t>(bits)});
}

struct StoredRange {
  int first, last;
};

// The numbers over `value`, itself below the largest. Those over a negative value have the positive NaNs among them.
template <class T>
UGSD_INLINE StoredRange stored_over(float value) {
  const int magnitude = round_down(std::fabs(value), T{});
  if (value >= 0) return {magnitude + 1, kStoredInfinity<T>};
  const bool exact = stored_to_float<T>(magnitude) == -value;
  return {0, kNegative + magnitude - exact};
}

struct StoredCount {
  int64_t inside;
  int top;  // the largest of all as signed integers; 0 where not asked for
};

enum class Top { kSkip, kFind };

template <class S, Top kTop, class T>
StoredCount count_stored(const T* z, int64_t n, StoredRange range) {
  using V = typename S::Short;
  // A range that starts at 0 takes one unsigned comparison, as does any other once it is moved there.
  const auto shift = V::set(-range.first), end = V::set(range.last + 1 - range.first);
  auto count0 = V::set(0), count1 = count0, top0 = count0, top1 = count0;
  const auto add = [&](typename V::Vector x, typename V::Vector& count, typename V::Vector& top) {
    count = V::count(V::below(kTop == Top::kFind ? x : V::add(x, shift), end), count);
    if (kTop == Top::kFind) top = V::max(top, x);
  };
  constexpr int64_t kStep = 4 * V::kLanes;
  constexpr int64_t kStretch = 4096 * kStep;  // lanes count to 32767
  StoredCount found{0, 0};
  int64_t i = 0;
  do {
    const int64_t stop = n - i < kStretch ? n : i + kStretch;
    for (; i + kStep <= stop; i += kStep) {
      add(V::load(z + i), count0, top0);
      add(V::load(z + i + V::kLanes), count1, top1);
      add(V::load(z + i + 2 * V::kLanes), count0, top0);
      add(V::load(z + i + 3 * V::kLanes), count1, top1);
    }
    if (stop == n)
      for (; i < n; i += V::kLanes) {
        // The padding is in no range.
        add(V::load_partial(z + i, static_cast<int>(n - i), kNegative + kStoredNaN), count0, top0);
      }
    found.inside += V::sum(V::add(count0, count1));
    count0 = count1 = V::set(0);
  } while (i < n);
  if (kTop == Top::kFind) found.top = V::maximum(V::max(top0, top1));
  return found;
}

template <class S, class T>
float block_max_stored(const T* z, int64_t n) {
  using V = typename S::Short;
  // Lifted until infinity is the largest signed integer, positive numbers are over all others and in their order, and
  // positive NaNs have wrapped to the bottom. As stored, the smallest signed integer is the negative number next to 0.
  constexpr int kLift = 0x7fff - kStoredInfinity<T>;
  const auto lift = V::set(kLift);
  auto high0 = V::set(-0x8000), high1 = high0, low0 = V::set(0x7fff), low1 = low0;
  const auto add = [&](typename V::Vector x, typename V::Vector& high, typename V::Vector& low) {
    high = V::max(high, V::add(x, lift));
    low = V::min(low, x);
  };
  int64_t i = 0;
  for (; i + 4 * V::kLanes <= n; i += 4 * V::kLanes) {
    add(V::load(z + i), high0, low0);
    add(V::load(z + i + V::kLanes), high1, low1);
    add(V::load(z + i + 2 * V::kLanes), high0, low0);
    add(V::load(z + i + 3 * V::kLanes), high1, low1);
  }
  for (; i < n; i += V::kLanes) add(V::load_partial(z + i, static_cast<int>(n - i), kStoredNaN), high0, low0);
  const int high = V::maximum(V::max(high0, high1)) - kLift;
  if (high == kStoredInfinity<T>) return kLargest;
  if (high >= 0) return stored_to_float<T>(high);
  const int low = V::minimum(V::min(low0, low1)) + 0x10000;
  return low <= kNegative + kStoredInfinity<T> ? stored_to_float<T>(low) : -kInfinity;
}

template <class S, class T>
int64_t find_first_stored(const T* z, int64_t n, float value) {
  using V = typename S::Short;
  const float x = value < kLargest ? value : kInfinity, size = std::fabs(x);
  const int magnitude = round_down(size, T{});
  if (value != value || stored_to_float<T>(magnitude) != size) return n;
  const auto wanted = V::set(x < 0 ? kNegative + magnitude : magnitude);
  const auto compared = V::set(x == 0 ? 0x7fff : 0xffff);  // 0 has two signs
  const auto find = [&](typename V::Vector stored) { return V::first(V::equal(V::both(stored, compared), wanted)); };
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes)
    if (const int lane = find(V::load(z + i)); lane >= 0) return i + lane;
  const int lane = i < n ? find(V::load_partial(z + i, static_cast<int>(n - i), kStoredNaN)) : -1;
  return lane >= 0 ? i + lane : n;
}

template <class S, class T>
float block_max(const T* z, int64_t n) {
  if constexpr (kAsStored<S, T>) {
    return block_max_stored<S>(z, n);
  } else {
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
}

// First column that equals `value`; n if there is none.
template <class S, class T>
int64_t find_first(const T* z, int64_t n, float value) {
  if constexpr (kAsStored<S, T>) {
    return find_first_stored<S>(z, n, value);
  } else {
    constexpr float kPadding = std::numeric_limits<float>::quiet_NaN();  // equals nothing
    const auto wanted = S::set(value), largest = S::set(kLargest);
    for (int64_t i = 0; i < n; i += S::kLanes) {
      const auto x = S::min(largest, S::load_partial(z + i, static_cast<int>(n - i), kPadding));
      if (const uint32_t hit = S::bits(S::equal(x, wanted))) return i + __builtin_ctz(hit);
    }
    return n;
  }
}

// Columns larger than `value`.
template <class S, class T>
int64_t count_greater(const T* z, int64_t n, float value) {
  // A logit of +inf reads as the largest number, so nothing is over that.
  if (!(value < kLargest)) return 0;
  if constexpr (kAsStored<S, T>) {
    const StoredRange over = stored_over<T>(value);
    if (value >= 0) return count_stored<S, Top::kSkip>(z, n, over).inside;
    const StoredCount found = count_stored<S, Top::kFind>(z, n, over);
    if (found.top <= kStoredInfinity<T>) return found.inside;
    const StoredRange nans{kStoredInfinity<T> + 1, kStoredNaN};
    return found.inside - count_stored<S, Top::kSkip>(z, n, nans).inside;
  } else {
    using F = typename S::Float;
    const F v = S::set(value), one = S::set(1);
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
}

}  // namespace ugsd::detail
