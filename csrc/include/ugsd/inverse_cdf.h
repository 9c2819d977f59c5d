// The hierarchical inverse CDF: which block holds the draw, then which column of it.
#pragma once

#include "ugsd/block_sums.h"

namespace ugsd::detail {

// First column whose running mass exceeds `target`, in column order. mass(i) is the vector of columns i, i + 1,
// ..., zero past `n`. Rounding that pushes the target past the end lands on the last column with mass.
template <class S, class Mass>
int64_t draw_column(int64_t n, double target, const Mass& mass) {
  constexpr int64_t kChunk = 8 * S::kLanes;
  const auto scan = [&](int64_t begin, double running) {
    alignas(64) float lanes[S::kLanes];
    int64_t last = -1;
    for (int64_t i = begin; i < n && i < begin + kChunk; i += S::kLanes) {
      S::store(lanes, mass(i));
      for (int k = 0; k < S::kLanes; ++k) {
        if (!(lanes[k] > 0)) continue;
        last = i + k;
        running += lanes[k];
        if (running > target) return last;
      }
    }
    return last;
  };
  double before = 0;
  int64_t last_chunk = -1;
  for (int64_t i = 0; i < n; i += kChunk) {
    auto sum = S::set(0);
    for (int64_t k = i; k < n && k < i + kChunk; k += S::kLanes) sum = S::add(sum, mass(k));
    const double chunk = S::sum(sum);
    if (chunk > 0) {
      if (before + chunk > target) return scan(i, before);
      last_chunk = i;
    }
    before += chunk;
  }
  return last_chunk < 0 ? -1 : scan(last_chunk, -kInfinity);
}

// The block that holds the draw u * total, and the mass that is left to go inside it. mass(j) is a block's mass.
struct BlockDraw {
  int64_t block;  // -1 where no block has mass
  double left;
};

template <class Mass>
BlockDraw draw_block(int64_t count, double u, const Mass& mass) {
  double total = 0;
  for (int64_t j = 0; j < count; ++j) total += mass(j);
  const double target = u * total;
  BlockDraw drawn{-1, 0};
  double before = 0;
  for (int64_t j = 0; j < count; ++j) {
    const double m = mass(j);
    if (!(m > 0)) continue;
    drawn = {j, target - before};
    before += m;
    if (before > target) break;
  }
  return drawn;
}

// e = exp((z - max) scale) of any logits, exactly 0 for masked ones.
template <class S>
class Mass {
 public:
  Mass(float max, float scale)
      : max_(S::set(max)), lowest_(S::set(simd::kLowest / exp_scale(scale))), exp_(exp_scale(scale)) {}

  typename S::Float operator()(typename S::Float z) const {
    const auto d = S::sub(S::min(S::set(kLargest), z), max_);
    return S::select(S::greater(d, lowest_), exp_(S::max(d, lowest_)), S::set(0));
  }

 private:
  typename S::Float max_, lowest_;
  typename S::Exp exp_;
};

// e of columns i, i + 1, ..., 0 past `n`.
template <class S, class T>
class ColumnMass {
 public:
  ColumnMass(const T* z, int64_t n, float max, float scale) : z_(z), n_(n), mass_(max, scale) {}

  typename S::Float operator()(int64_t i) const {
    return mass_(S::load_partial(z_ + i, static_cast<int>(n_ - i), -kInfinity));
  }

 private:
  const T* z_;
  int64_t n_;
  Mass<S> mass_;
};

// Draws from softmax(z * scale), of whose blocks the sums are known.
template <class S, class T>
int64_t draw_token(const T* z, int64_t columns, const BlockSums* blocks, float scale, double u) {
  const int64_t count = blocks_of(columns);
  const double reference = row_reference(blocks, count);
  const BlockDraw drawn =
      draw_block(count, u, [&](int64_t j) { return weight_of(blocks[j], reference, scale) * blocks[j].mass; });
  if (drawn.block < 0) return -1;
  const int64_t begin = drawn.block * kBlock, n = block_size(columns, drawn.block);
  const auto near = static_cast<float>(blocks[drawn.block].reference);
  const double left = drawn.left * weight_of_shift(reference - near, scale);
  return begin + draw_column<S>(n, left, ColumnMass<S, T>(z + begin, n, near, scale));
}

}  // namespace ugsd::detail
