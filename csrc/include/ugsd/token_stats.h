// token_stats: logsumexp, entropy, maximum, argmax and margin of every row (MATH: L = m + log a, H = log a - b/a).
//
// One pass over memory: each block of 4096 columns is read for its maximum, then from L1 for its sums relative to
// that maximum. Blocks are independent and merge in column order in float64, so threads change nothing. The
// maximum itself stays out of the sums (its term is exactly 1): a nearly certain row keeps all its digits.
#pragma once

#include "ugsd/block_sums.h"
#include "ugsd/parallel.h"

namespace ugsd {

struct TokenStatsArgs {
  Rows logits;
  PerRow<float> temperature;
  StatsOut out;
  int threads;
};

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

// Merges a row's blocks; reads the block of the maximum once more for argmax and second, and for its sums where the
// maximum's own 1 has drowned the others' digits.
template <class S, class T>
RowStats merge_blocks(const T* z, int64_t columns, const BlockSums* blocks, float scale) {
  const int64_t count = blocks_of(columns), top = top_block(blocks, count);
  const float max = blocks[top].max;
  if (max == -kInfinity) return kEmptyRow;
  float second = -kInfinity;
  double mass = 0, moment = 0;
  for (int64_t j = 0; j < count; ++j) {
    if (j == top || blocks[j].max == -kInfinity) continue;
    if (blocks[j].max > second) second = blocks[j].max;
    const double weight = weight_of(blocks[j], max, scale);
    mass += weight * blocks[j].mass;
    moment += weight * (blocks[j].moment + (static_cast<double>(blocks[j].max) - max) * blocks[j].mass);
  }
  const T* block = z + top * kBlock;
  const int64_t n = block_size(columns, top), argmax = find_first<S>(block, n, max);
  const T* after = block + argmax + 1;
  const float left = block_max<S>(block, argmax), right = block_max<S>(after, n - argmax - 1);
  if (left > second) second = left;
  if (right > second) second = right;
  if (mass + blocks[top].mass > 2) {
    mass += blocks[top].mass - 1;
    moment += blocks[top].moment;
  } else {
    add_sums<S, Moment::kSum>(block, argmax, max, scale, mass, moment);
    add_sums<S, Moment::kSum>(after, n - argmax - 1, max, scale, mass, moment);
  }
  return row_stats(max, top * kBlock + argmax, second, mass, moment, scale);
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
