// Maxima and exponential sums of a stretch of columns: what every softmax op is built of.
#pragma once

#include <cmath>

#include "ugsd/order.h"

namespace ugsd::detail {

// Sums of one block of columns; d = z - reference, e = exp(d / T).
struct BlockSums {
  double mass;       // sum of e
  double moment;     // sum of d e
  double reference;  // within some nats of the block's maximum; -inf where every column is masked
  float bound;       // no column is larger
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

// Smallest float32 not under x.
static inline float round_up(double x) {
  const float f = static_cast<float>(x);
  return f < x ? std::nextafter(f, kInfinity) : f;
}

// Over log2 x by 0.087 at most, the chord's distance from the curve and room for the rounding of x.
static inline double log2_bound(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<double>(bits) * 0x1p-23 - 127 + 0.0861;
}

// Octaves a logit: e^(z / T) = 2^(octaves z).
static inline float octaves_of(float scale) { return static_cast<float>(scale * 1.4426950408889634); }

static inline int64_t blocks_of(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

static inline int64_t block_size(int64_t columns, int64_t block) {
  const int64_t left = columns - block * kBlock;
  return left < kBlock ? left : kBlock;
}

// Sums by lane of up to four vectors at a time. They are flushed every 64 vectors, as short sums of short sums: where a
// lane holds a large term, many equal small ones would all round the same way.
template <class S, Moment kMoment>
struct LaneSums {
  using F = typename S::Float;
  F mass[4], moment[4];

  LaneSums() { clear(); }

  void flush() {
    masses_ = S::add(masses_, S::add(S::add(mass[0], mass[1]), S::add(mass[2], mass[3])));
    if (kMoment == Moment::kSum)
      moments_ = S::add(moments_, S::add(S::add(moment[0], moment[1]), S::add(moment[2], moment[3])));
    clear();
    if (S::kLanes < 8) widen();  // narrow vectors have many stretches in a block
  }

  F largest_mass() const { return S::max(S::max(mass[0], mass[1]), S::max(mass[2], mass[3])); }
  double total_mass() {
    widen();
    return total_mass_;
  }
  double total_moment() const { return total_moment_; }

 private:
  void clear() {
    mass[0] = mass[1] = mass[2] = mass[3] = S::set(0);
    moment[0] = moment[1] = moment[2] = moment[3] = S::set(0);
  }
  void widen() {
    total_mass_ += S::sum(masses_);
    if (kMoment == Moment::kSum) total_moment_ += S::sum(moments_);
    masses_ = moments_ = S::set(0);
  }

  F masses_ = S::set(0), moments_ = S::set(0);
  double total_mass_ = 0, total_moment_ = 0;
};

// Calls f(vector, k) with k = 0 to 3 in turn for all columns, -inf past the last, and flush() after every 64 vectors.
template <class S, class T, class F, class Flush>
UGSD_INLINE void for_vectors(const T* z, int64_t n, const F& f, const Flush& flush) {
  constexpr int64_t kPair = 2 * S::kLanes, kStretch = 64 * S::kLanes;
  typename S::Float a, b;
  int64_t i = 0;
  while (i + 2 * kPair <= n) {
    const int64_t end = n - i < kStretch ? n : i + kStretch;
    for (; i + 2 * kPair <= end; i += 2 * kPair) {
      S::load_pair(z + i, a, b);
      f(a, 0);
      f(b, 1);
      S::load_pair(z + i + kPair, a, b);
      f(a, 2);
      f(b, 3);
    }
    flush();
  }
  for (; i < n; i += S::kLanes) f(S::load_partial(z + i, static_cast<int>(n - i), -kInfinity), 0);
  flush();
}

// Adds e and d e of the columns to the sums, d = z - max of columns that are max at most.
template <class S, Moment kMoment, class T>
void add_sums(const T* z, int64_t n, float max, float scale, double& mass, double& moment) {
  using F = typename S::Float;
  scale = exp_scale(scale);
  const typename S::Exp exp(scale);
  const F from = S::set(max), lowest = S::set(simd::kLowest / scale), largest = S::set(kLargest);
  LaneSums<S, kMoment> sums;
  for_vectors<S>(
      z, n,
      [&](F x, int k) {
        // NaN and -inf end at the lowest, with nothing left to add.
        const F d = S::max(S::sub(S::min(largest, x), from), lowest);
        const F e = exp(d);
        sums.mass[k] = S::add(sums.mass[k], e);
        if (kMoment == Moment::kSum) sums.moment[k] = S::fma(d, e, sums.moment[k]);
      },
      [&] { sums.flush(); });
  mass += sums.total_mass();
  if (kMoment == Moment::kSum) moment += sums.total_moment();
}

// The sums of a block in one pass relative to a `reference` near its maximum. False where there is no result: the
// maximum is far off, or a column is masked, which makes the mass NaN.
template <class S, Moment kMoment, class T>
bool sums_near(const T* z, int64_t n, float reference, float scale, BlockSums& sums) {
  using F = typename S::Float;
  // Octaves over the reference, which cost digits: of y, and of the moment when it moves to the maximum.
  constexpr float kNear = kMoment == Moment::kSum ? 0x1p13f : 0x1p32f;
  constexpr double kFaint = 0x1p-32;
  const float octaves = octaves_of(scale);
  const typename S::Exp2 exp2(octaves, reference);
  if (!exp2.exact()) return false;
  LaneSums<S, kMoment> lanes;
  F peak = S::set(0);
  for_vectors<S>(
      z, n,
      [&](F x, int k) {
        if (kMoment == Moment::kSkip) {
          lanes.mass[k] = exp2.add(lanes.mass[k], x);
        } else {
          F y;
          const F e = exp2(x, y);
          lanes.mass[k] = S::add(lanes.mass[k], e);
          lanes.moment[k] = S::fma(y, e, lanes.moment[k]);
        }
      },
      [&] {
        if (kMoment == Moment::kSum) peak = S::max(lanes.largest_mass(), peak);
        lanes.flush();
      });
  const double mass = lanes.total_mass();
  // A sum is no less than its largest term.
  const float most = kMoment == Moment::kSum ? S::maximum(peak) : static_cast<float>(mass);
  sums.mass = mass;
  if (!(mass > kFaint && mass < 0x1p100 && most < kNear)) return false;
  if (kMoment == Moment::kSum) sums.moment = (lanes.total_moment() - exp2.offset() * mass) / octaves;
  sums.reference = exp2.reference();
  sums.bound = round_up(sums.reference + log2_bound(most) / octaves);
  return true;
}

// Larger logits than this are read with care.
constexpr float kFar = 1e30f;

// Guesses the maximum by the first columns; false where there are too few, or one is masked or far off.
template <class S, class T>
bool guess_max(const T* z, int64_t n, float& guess) {
  constexpr int64_t kGuessed = 128;
  if (n <= kGuessed) return false;
  auto most = S::set(-kInfinity), least = S::set(kInfinity);
  for (int64_t i = 0; i < kGuessed; i += S::kLanes) {
    const auto x = S::max(S::load(z + i), S::set(-kInfinity));
    most = S::max(x, most);
    least = S::min(x, least);
  }
  guess = S::maximum(most);
  return S::bits(S::greater(least, S::set(-kFar))) == S::bits(S::equal(least, least)) && guess < kLargest;
}

// The sums of a block, read once where its first columns tell the size of its maximum and none is masked.
template <class S, Moment kMoment, class T>
BlockSums block_sums(const T* z, int64_t n, float scale) {
  float guess;
  BlockSums sums{};
  const bool guessed = scale > 1e-6f && scale < 1e6f && guess_max<S>(z, n, guess);
  if (guessed && sums_near<S, kMoment>(z, n, guess, scale, sums)) return sums;
  const float max = block_max<S>(z, n);
  const bool unmasked = guessed && sums.mass == sums.mass;
  if (unmasked && max < kFar && sums_near<S, kMoment>(z, n, max, scale, sums)) return sums;
  sums = {0, 0, max, max};
  if (max > -kInfinity) add_sums<S, kMoment>(z, n, max, scale, sums.mass, sums.moment);
  return sums;
}

// The largest reference of a row's blocks.
static inline double row_reference(const BlockSums* blocks, int64_t count) {
  double reference = -kInfinity;
  for (int64_t j = 0; j < count; ++j)
    if (blocks[j].reference > reference) reference = blocks[j].reference;
  return reference;
}

// e^(shift / T)
static inline double weight_of_shift(double shift, float scale) {
  return shift == 0 ? 1 : std::exp2(shift * octaves_of(scale));  // the octaves may be infinite
}

// What a block's mass counts relative to another reference.
static inline double weight_of(const BlockSums& block, double reference, float scale) {
  return block.mass == 0 ? 0 : weight_of_shift(block.reference - reference, scale);
}

}  // namespace ugsd::detail
