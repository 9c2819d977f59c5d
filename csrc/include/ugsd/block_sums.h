// Maxima and exponential sums of a stretch of columns: what every softmax op is built of.
#pragma once

#include <cmath>

#include "ugsd/order.h"

namespace ugsd::detail {

// Sums of one block of columns; d = z - max, e = exp(d / T).
struct BlockSums {
  double mass;    // sum of e
  double moment;  // sum of d e
  float max;      // -inf where every column is masked
};

enum class Moment { kSkip, kSum };

// 1 / T, where T = 0, the greedy limit, reads as 1.
static inline float inverse_temperature(float t) {
  if (!(t > 0)) return 1.0f;
  const float scale = 1.0f / t;
  return scale < kLargest ? scale : kLargest;
}

// The scale as exponentials take it: beyond these all columns but the maximum vanish, or all count the same, and the
// constants made of it would overflow.
static inline float exp_scale(float scale) { return scale < 1e-18f ? 1e-18f : scale > 1e18f ? 1e18f : scale; }

static inline int64_t blocks_of(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

static inline int64_t block_size(int64_t columns, int64_t block) {
  const int64_t left = columns - block * kBlock;
  return left < kBlock ? left : kBlock;
}

enum class Pass { kKnownMax, kFindMax };

// Adds e and d e of the columns to the sums, d = z - reference. A known maximum is the reference, or is over it by
// nothing; kFindMax takes any reference near the maximum and returns what that turned out to be.
template <class S, Moment kMoment, Pass kPass = Pass::kKnownMax, class T>
float add_sums(const T* z, int64_t n, float reference, float scale, double& mass, double& moment) {
  using F = typename S::Float;
  scale = exp_scale(scale);
  const typename S::Exp exp(scale);
  const F from = S::set(reference), lowest = S::set(simd::kLowest / scale), largest = S::set(kLargest);
  F mass0 = S::set(0), mass1 = mass0, moment0 = mass0, moment1 = mass0;
  F max0 = S::set(-kInfinity), max1 = max0, a, b;
  const auto add = [&](F x, F& total, F& weighted, F& max) {
    if (kPass == Pass::kFindMax)
      max = S::max(x, max);
    else
      x = S::min(largest, x);
    const F d = S::max(S::sub(x, from), lowest);  // NaN and -inf end here, with nothing left to add
    const F e = exp(d);
    total = S::add(total, e);
    if (kMoment == Moment::kSum) weighted = S::fma(d, e, weighted);
  };
  constexpr int kStep = 2 * S::kLanes;
  // Short sums of short sums: where a lane holds a large term, many equal small ones would all round the same way.
  constexpr int64_t kStretch = 64 * S::kLanes;
  F masses = S::set(0), moments = masses;
  const auto flush = [&] {
    masses = S::add(masses, S::add(mass0, mass1));
    if (kMoment == Moment::kSum) moments = S::add(moments, S::add(moment0, moment1));
    mass0 = mass1 = moment0 = moment1 = S::set(0);
    if (S::kLanes >= 8) return;  // narrow vectors have many stretches in a block
    mass += S::sum(masses);
    if (kMoment == Moment::kSum) moment += S::sum(moments);
    masses = moments = S::set(0);
  };
  int64_t i = 0;
  while (i + 2 * kStep <= n) {
    const int64_t end = n - i < kStretch ? n : i + kStretch;
    for (; i + 2 * kStep <= end; i += 2 * kStep) {
      S::load_pair(z + i, a, b);
      add(a, mass0, moment0, max0);
      add(b, mass1, moment1, max1);
      S::load_pair(z + i + kStep, a, b);
      add(a, mass0, moment0, max0);
      add(b, mass1, moment1, max1);
    }
    flush();
  }
  for (; i < n; i += S::kLanes) add(S::load_partial(z + i, static_cast<int>(n - i), -kInfinity), mass0, moment0, max0);
  flush();
  mass += S::sum(masses);
  if (kMoment == Moment::kSum) moment += S::sum(moments);
  return S::maximum(S::max(max0, max1));
}

// The sums of a block in one pass, relative to a guess of its maximum, and moved to the maximum after. Only a block
// whose first columns tell too little is read again.
template <class S, Moment kMoment, class T>
BlockSums block_sums(const T* z, int64_t n, float scale) {
  constexpr int64_t kGuessed = 128;
  constexpr double kNear = 8;  // nats: far from overflow, and the moment loses under a digit by the move
  if (n > kGuessed) {
    const float guess = block_max<S>(z, kGuessed);
    BlockSums sums{0, 0, 0};
    sums.max = add_sums<S, kMoment, Pass::kFindMax>(z, n, guess, scale, sums.mass, sums.moment);
    const double shift = static_cast<double>(guess) - sums.max;
    if (-shift * scale < kNear && sums.max < kLargest) {
      const double weight = std::exp(shift * scale);
      sums.moment = weight * (sums.moment + shift * sums.mass);
      sums.mass *= weight;
      return sums;
    }
  }
  BlockSums sums{0, 0, block_max<S>(z, n)};
  if (sums.max > -kInfinity) add_sums<S, kMoment>(z, n, sums.max, scale, sums.mass, sums.moment);
  return sums;
}

// The block that holds the row's maximum: the first of equals.
static inline int64_t top_block(const BlockSums* blocks, int64_t count) {
  int64_t top = 0;
  for (int64_t j = 1; j < count; ++j)
    if (blocks[j].max > blocks[top].max) top = j;
  return top;
}

// Mass of a block relative to the row's maximum.
static inline double weight_of(const BlockSums& block, float max, float scale) {
  if (block.max == -kInfinity) return 0;
  return std::exp((static_cast<double>(block.max) - max) * scale);
}

}  // namespace ugsd::detail
