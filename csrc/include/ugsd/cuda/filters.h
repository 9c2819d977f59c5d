// Top-k, top-p and min-p as one threshold on the logit, found by a thread block: columns at or over it stay.
//
// A radix selection: the columns are counted, or weighed, by the leading bits of their order, the bin that holds the
// threshold is found, and the next bits tell its columns apart. Sums are of integers, so that the order in which
// threads add changes nothing. Only columns over a bound that the pieces' two largest give (top-k), or over a share of
// the mass that cannot matter (top-p), are looked at, and only in pieces that reach it.
#pragma once

#include "ugsd/cuda/row_stats.h"

namespace ugsd::cuda {

constexpr int kFilterWarps = 16;
constexpr int kFilterThreads = kFilterWarps * kLanes;
constexpr int kBinBits = 11, kBins = 1 << kBinBits, kBinsPerLane = kBins / kLanes;

struct FilterScratch {
  unsigned long long bins[kBins];
  unsigned long long above;
  unsigned prefix;
  float bound;
  bool last;
};

// Unsigned integers in the order of the floats; both zeros are one.
__device__ inline unsigned order_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float float_of_order(unsigned order) {
  return float_of_bits(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// Where a bin lies: the bins that one lane adds up are a column, so that lanes do not meet in a bank.
__device__ inline int place_of(int bin) { return bin % kBinsPerLane * kLanes + bin / kBinsPerLane; }

// A filter at work on one row, by all threads of a block.
template <class T>
class RowSelection {
 public:
  __device__ RowSelection(const T* row, int64_t columns, const PieceStats* pieces, const RowSums& sums, float scale,
                          FilterScratch& scratch)
      : row_(row),
        columns_(columns),
        count_(pieces_of(columns)),
        pieces_(pieces),
        sums_(sums),
        scale_(scale),
        exponential_(sums.max, octaves_of(scale)),
        scratch_(scratch) {}

  // The lowest logit that stays; -inf where nothing is cut. Every thread gets it.
  __device__ float threshold(const RowFilter& filter) {
    if (sums_.empty()) return -kInfinity;
    float threshold = -kInfinity;
    // One loop for both, so that the selection is compiled once.
#pragma unroll 1
    for (int by_mass = 0; by_mass < 2; ++by_mass) {
      if (by_mass ? !(filter.top_p < 1) : filter.top_k <= 0) continue;
      float bound = threshold;
      double target = static_cast<double>(filter.top_k);
      if (!by_mass) {
        bound = bound_of_top(filter.top_k);
      } else if (filter.top_k > 0) {
        target = static_cast<double>(filter.top_p) * static_cast<double>(total_of(threshold));
      } else {
        // Columns under this could all go without cutting 1 - p of the mass; a digit is left for rounding.
        const double share = 0.99 * (1.0 - static_cast<double>(filter.top_p)) / static_cast<double>(columns_);
        bound = fminf(static_cast<float>(sums_.max + log(share * (1 + sums_.mass)) / scale_), sums_.max);
        target = static_cast<double>(filter.top_p) * (1 + sums_.mass) * kUnit;
      }
      threshold = fmaxf(threshold, select(bound, target, by_mass));
    }
    if (filter.min_p > 0) {
      const double exact = sums_.max + log(static_cast<double>(filter.min_p)) / scale_;
      float bound = static_cast<float>(exact);
      if (bound < exact) bound = nextafterf(bound, kInfinity);
      threshold = fmaxf(threshold, bound);
    }
    return threshold;
  }

  // Calls f(j, e) for all pieces of this warp, e being this lane's mass of the columns at or over the threshold.
  template <class F>
  __device__ void each_mass(float threshold, const F& f) const {
    for (int j = static_cast<int>(threadIdx.x) / kLanes; j < count_; j += kFilterWarps) {
      float mass = 0;
      if (pieces_[j].max >= threshold) each_in_piece(j, [&](float x) { mass += mass_over(x, threshold); });
      f(j, mass);
    }
  }

  __device__ float mass_over(float x, float threshold) const {
    x = cleaned(x);
    return x >= threshold ? exponential_(x) : 0;
  }

 private:
  static constexpr float kUnit = 0x1p40f;  // of fixed-point masses, 1 at most: 2^24 columns fit

  template <class F>
  __device__ void each_in_piece(int j, const F& f) const {
    const Split<T> split(columns_, j);
#pragma unroll 2
    for (int i = 0; i < Split<T>::kSteps; ++i) {
      if (!split.has(i)) continue;
      float x[kWidth<T>];
      load(row_, split.columns, split.column(i), x);
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) f(x[k]);
    }
  }

  // Calls f(x) for the columns of this thread that are at or over the bound and not masked.
  template <class F>
  __device__ void each_over(float bound, const F& f) const {
    bound = fmaxf(bound, -kLargest);
    for (int j = static_cast<int>(threadIdx.x) / kLanes; j < count_; j += kFilterWarps) {
      if (!(pieces_[j].max >= bound)) continue;
      each_in_piece(j, [&](float x) {
        x = cleaned(x);
        if (x >= bound) f(x);
      });
    }
  }

  // A number that the k-th largest logit is not under: the k-th of the two largest of all pieces.
  __device__ float bound_of_top(int64_t k) {
    if (threadIdx.x == 0) scratch_.bound = -kInfinity;
    __syncthreads();
    const auto value = [&](int i) { return i % 2 ? pieces_[i / 2].second : pieces_[i / 2].max; };
    if (k <= 2 * count_) {
      for (int i = static_cast<int>(threadIdx.x); i < 2 * count_; i += kFilterThreads) {
        const float own = value(i);
        int before = 0;
        for (int other = 0; other < 2 * count_; ++other) {
          const float x = value(other);
          before += x > own || (x == own && other < i);
        }
        if (before + 1 == k) scratch_.bound = own;
      }
    }
    __syncthreads();
    return scratch_.bound;
  }

  // In fixed point.
  __device__ unsigned long long mass_of(float x) const {
    return static_cast<unsigned long long>(exponential_(x) * kUnit + 0.5f);
  }

  __device__ unsigned long long total_of(float bound) {
    if (threadIdx.x == 0) scratch_.above = 0;
    __syncthreads();
    unsigned long long sum = 0;
    each_over(bound, [&](float x) { sum += mass_of(x); });
    sum = sum_lanes(sum);
    if (lane() == 0 && sum > 0) atomicAdd(&scratch_.above, sum);
    __syncthreads();
    return scratch_.above;
  }

  // The lowest of the largest logits over the bound whose number, or mass, is `target`; the lowest of all if it is
  // less.
  __device__ float select(float bound, double target, bool by_mass) {
    __syncthreads();
    if (threadIdx.x == 0) {
      scratch_.above = 0;
      scratch_.prefix = 0;
    }
    for (int shift = 32 - kBinBits, known = 0;;) {
      for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kFilterThreads) scratch_.bins[i] = 0;
      __syncthreads();
      const unsigned prefix = scratch_.prefix;
      each_over(bound, [&](float x) {
        const unsigned order = order_of(x);
        if (known > 0 && order >> (32 - known) != prefix) return;
        const int bin = static_cast<int>(order >> shift) & (kBins - 1);
        const unsigned long long weight = by_mass ? mass_of(x) : 1;
        if (weight > 0) atomicAdd(&scratch_.bins[place_of(bin)], weight);
      });
      __syncthreads();
      const int bits = 32 - shift - known;
      if (threadIdx.x < kLanes) find_bin(target, prefix, bits);
      __syncthreads();
      known += bits;
      if (shift == 0) break;
      shift = shift > kBinBits ? shift - kBinBits : 0;
    }
    return float_of_order(scratch_.prefix);
  }

  // Appends the bits of the bin where the weights, from the largest logits on, reach the target. One warp's work.
  __device__ void find_bin(double target, unsigned prefix, int bits) {
    const unsigned used = (1u << bits) - 1;
    const int column = kLanes - 1 - lane();  // the first lane has the largest logits
    unsigned long long sum = 0;
    for (int i = 0; i < kBinsPerLane; ++i) sum += scratch_.bins[i * kLanes + column];
    const unsigned long long before = scratch_.above + running_sum(sum) - sum;
    const unsigned positive = __ballot_sync(kAllLanes, sum > 0);
    const unsigned over = __ballot_sync(kAllLanes, sum > 0 && static_cast<double>(before + sum) >= target);
    if (positive == 0) return;
    if (lane() != (over ? __ffs(over) - 1 : 31 - __clz(positive))) return;
    unsigned long long above = before;
    for (int i = kBinsPerLane; i-- > 0;) {
      const unsigned long long weight = scratch_.bins[i * kLanes + column];
      if (weight == 0) continue;
      scratch_.above = above;
      scratch_.prefix = prefix << bits | (static_cast<unsigned>(column * kBinsPerLane + i) & used);
      above += weight;
      if (static_cast<double>(above) >= target) break;
    }
  }

  const T* row_;
  int64_t columns_;
  int count_;
  const PieceStats* pieces_;
  RowSums sums_;
  float scale_;
  Exponential exponential_;
  FilterScratch& scratch_;
};

}  // namespace ugsd::cuda
