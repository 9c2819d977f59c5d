// token_stats: logsumexp, entropy, maximum, argmax and margin of every row (MATH: L = m + log a, H = log a - b/a).
//
// One pass over memory: each block of 4096 columns is summed relative to a guess of its maximum. Its largest lane sum
// bounds that maximum, so that only the blocks whose bound reaches the runner-up, most often one or two, are searched
// for the two largest. Blocks are independent and merge in column order in float64, so threads change nothing. The
// maximum itself stays out of the sums (its term is exactly 1): a nearly certain row keeps all its digits.
#pragma once

#include "ugsd/args.h"
#include "ugsd/block_sums.h"
#include "ugsd/parallel.h"

namespace ugsd {

namespace detail {

// Statistics of one row, and the sum of e over all its columns.
struct RowStats {
  double logsumexp, entropy, max_logit, margin;
  int64_t argmax;
  double mass;  // relative to `max`, the maximum's own 1 included
  float max;
};

constexpr RowStats kEmptyRow{-kInfinity, 0, -kInfinity, 0, -1, 0, -kInfinity};

// `mass` and `moment` leave the maximum out.
static inline RowStats row_stats(float max, int64_t argmax, float second, double mass, double moment, float scale) {
  // Masked columns are clamped to e^-87 each: far below this, and nothing is left.
  if (mass < 1e-31) mass = moment = 0;
  const double log_mass = std::log1p(mass), s = static_cast<double>(max) * scale;
  const double margin = (static_cast<double>(max) - second) * scale;
  return {s + log_mass, log_mass - moment * scale / (1 + mass), s, margin, argmax, 1 + mass, max};
}

static inline void store_stats(const RowStats& stats, const StatsOut& out, int64_t r) {
  out.logsumexp[r] = static_cast<float>(stats.logsumexp);
  out.entropy[r] = static_cast<float>(stats.entropy);
  out.max_logit[r] = static_cast<float>(stats.max_logit);
  out.argmax[r] = stats.argmax;
  out.margin[r] = static_cast<float>(stats.margin);
}

// The two largest logits of a row and the first column of the largest.
struct TopTwo {
  float max, second;
  int64_t argmax;
};

template <class S, class T>
void merge_top(const T* z, int64_t begin, int64_t n, TopTwo& top) {
  using F = typename S::Float;
  const F largest = S::set(kLargest);
  F first = S::set(-kInfinity), second = first;
  for (int64_t i = 0; i < n; i += S::kLanes) {
    const F x = S::min(largest, S::load_partial(z + begin + i, static_cast<int>(n - i), -kInfinity));
    second = S::max(S::min(first, x), second);  // NaN passes through both
    first = S::max(x, first);
  }
  alignas(64) float lanes[2][S::kLanes];
  S::store(lanes[0], first);
  S::store(lanes[1], second);
  float max = -kInfinity, runner_up = -kInfinity;
  for (const auto& row : lanes)
    for (const float x : row) {
      const float lower = x < max ? x : max;
      if (lower > runner_up) runner_up = lower;
      if (x > max) max = x;
    }
  if (max > top.max || (max == top.max && begin < top.argmax)) {
    top.second = top.max > runner_up ? top.max : runner_up;
    top.argmax = begin + find_first<S>(z + begin, n, max);
    top.max = max;
  } else if (max > top.second) {
    top.second = max;
  }
}

// Finds the two largest in the blocks that their bounds leave in question, the likeliest first.
template <class S, class T>
TopTwo top_two(const T* z, int64_t columns, const BlockSums* blocks) {
  const int64_t count = blocks_of(columns);
  TopTwo top{-kInfinity, -kInfinity, columns};
  int64_t likeliest = 0;
  for (int64_t j = 1; j < count; ++j)
    if (blocks[j].bound > blocks[likeliest].bound) likeliest = j;
  if (blocks[likeliest].bound == -kInfinity) return top;
  merge_top<S>(z, likeliest * kBlock, block_size(columns, likeliest), top);
  for (int64_t j = 0; j < count; ++j)
    if (j != likeliest && blocks[j].bound >= top.second && blocks[j].bound > -kInfinity)
      merge_top<S>(z, j * kBlock, block_size(columns, j), top);
  return top;
}

// Merges a row's blocks; reads the block of the maximum once more for its sums where the maximum's own 1 has drowned
// the others' digits.
template <class S, class T>
RowStats merge_blocks(const T* z, int64_t columns, const BlockSums* blocks, float scale) {
  const TopTwo top = top_two<S>(z, columns, blocks);
  if (top.max == -kInfinity) return kEmptyRow;
  const int64_t own = top.argmax / kBlock;
  double mass = 0, moment = 0;
  const auto add = [&](const BlockSums& block) {
    const double weight = weight_of(block, top.max, scale);
    mass += weight * block.mass;
    moment += weight * (block.moment + (block.reference - top.max) * block.mass);
  };
  for (int64_t j = 0; j < blocks_of(columns); ++j)
    if (j != own && blocks[j].mass > 0) add(blocks[j]);
  if (mass + weight_of(blocks[own], top.max, scale) * blocks[own].mass > 2) {
    add(blocks[own]);
    mass -= 1;
  } else {
    const T* block = z + own * kBlock;
    const int64_t n = block_size(columns, own), argmax = top.argmax - own * kBlock;
    add_sums<S, Moment::kSum>(block, argmax, top.max, scale, mass, moment);
    add_sums<S, Moment::kSum>(block + argmax + 1, n - argmax - 1, top.max, scale, mass, moment);
  }
  return row_stats(top.max, top.argmax, top.second, mass, moment, scale);
}

// Calls finish(row, scale, blocks, stats) for every row.
template <class S, class T, class Finish>
void for_row_stats(const Rows& rows, const PerRow<float>& temperature, int threads, const Finish& finish) {
  const auto block = [&](int64_t r, int64_t j, BlockSums& sums) {
    const float scale = inverse_temperature(temperature[r]);
    sums = block_sums<S, Moment::kSum>(rows.row<T>(r) + j * kBlock, block_size(rows.columns, j), scale);
  };
  for_blocks_of<BlockSums>(rows.count(), blocks_of(rows.columns), threads, block,
                           [&](int64_t r, const BlockSums* blocks) {
                             const float scale = inverse_temperature(temperature[r]);
                             finish(r, scale, blocks, merge_blocks<S>(rows.row<T>(r), rows.columns, blocks, scale));
                           });
}

}  // namespace detail

template <class S>
void token_stats(const TokenStatsArgs& args) {
  with_dtype(args.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    detail::for_row_stats<S, T>(args.logits, args.temperature, args.threads,
                                [&](int64_t r, float, const detail::BlockSums*, const detail::RowStats& stats) {
                                  detail::store_stats(stats, args.out, r);
                                });
  });
}

}  // namespace ugsd
