// logprob_rank: log p(x) and 1 + #{v : z_v > z_x} of one token a row.
//
// One read of the row: counting alone when the logsumexp is given, counting and block sums from L1 when not.
#pragma once

#include "ugsd/token_stats.h"

namespace ugsd {

namespace detail {

// A token of this log-probability is the row's maximum, whatever the rounding.
constexpr double kLikely = -0.6;

struct CountAndSums {
  int64_t greater;
  BlockSums sums;
};

// Calls finish(row, scale, logit of its token, partials) for every row whose token is a column that is not masked;
// fills in the others, and all ranks.
template <class S, class T, class Partial, class Block, class Finish>
void count_rows(const LogprobRankArgs& args, int64_t stretch, const Block& block, const Finish& finish) {
  const Rows& rows = args.logits;
  const int64_t count = (rows.columns + stretch - 1) / stretch;
  const auto inside = [&](int64_t r) { return args.tokens[r] >= 0 && args.tokens[r] < rows.columns; };
  for_blocks_of<Partial>(
      rows.count(), count, args.threads,
      [&](int64_t r, int64_t j, Partial& partial) {
        if (!inside(r)) return;
        const T* z = rows.row<T>(r);
        const int64_t begin = j * stretch, n = rows.columns - begin < stretch ? rows.columns - begin : stretch;
        partial.greater = count_greater<S>(z + begin, n, logit(z, args.tokens[r]));
        block(r, z + begin, n, partial);
      },
      [&](int64_t r, const Partial* partials) {
        args.logprob[r] = -kInfinity;
        args.rank[r] = rows.columns + 1;
        if (!inside(r)) return;
        args.rank[r] = 1;
        for (int64_t j = 0; j < count; ++j) args.rank[r] += partials[j].greater;
        const float z = logit(rows.row<T>(r), args.tokens[r]);
        if (z > -kInfinity)
          args.logprob[r] = static_cast<float>(finish(r, inverse_temperature(args.temperature[r]), z, partials));
      },
      stretch);
}

// With the logsumexp at hand.
template <class S, class T>
void rank_rows(const LogprobRankArgs& args) {
  struct Count {
    int64_t greater;
  };
  constexpr int64_t kStretch = 8 * kBlock;  // there is little to a block but its ends
  count_rows<S, T, Count>(
      args, kStretch, [](int64_t, const T*, int64_t, Count&) {},
      [&](int64_t r, float scale, float z, const Count*) {
        return static_cast<double>(z) * scale - args.logsumexp[r];
      });
}

template <class S, class T>
void logprob_rank(const LogprobRankArgs& args) {
  if (args.logsumexp) return rank_rows<S, T>(args);
  const Rows& rows = args.logits;
  const int64_t count = blocks_of(rows.columns);
  const auto block = [&](int64_t r, const T* z, int64_t n, CountAndSums& partial) {
    partial.sums = block_sums<S, Moment::kSkip>(z, n, inverse_temperature(args.temperature[r]));
  };
  const auto finish = [&](int64_t r, float scale, float z, const CountAndSums* partials) {
    double reference = -kInfinity, mass = 0;
    for (int64_t j = 0; j < count; ++j) reference = std::fmax(reference, partials[j].sums.reference);
    for (int64_t j = 0; j < count; ++j) mass += weight_of(partials[j].sums, reference, scale) * partials[j].sums.mass;
    const double logprob = (z - reference) * scale - std::log(mass);
    if (logprob < kLikely) return logprob;
    // 1 - p in full: the mass beside the token, relative to the token.
    const int64_t own = args.tokens[r] / kBlock, column = args.tokens[r] % kBlock;
    const T* row = rows.row<T>(r) + own * kBlock;
    double beside = 0, moment = 0;
    for (int64_t j = 0; j < count; ++j)
      if (j != own) beside += weight_of(partials[j].sums, z, scale) * partials[j].sums.mass;
    add_sums<S, Moment::kSkip>(row, column, z, scale, beside, moment);
    add_sums<S, Moment::kSkip>(row + column + 1, block_size(rows.columns, own) - column - 1, z, scale, beside, moment);
    return -std::log1p(beside);
  };
  count_rows<S, T, CountAndSums>(args, kBlock, block, finish);
}

}  // namespace detail

template <class S>
void logprob_rank(const LogprobRankArgs& args) {
  with_dtype(args.logits.dtype, [&](auto zero) { detail::logprob_rank<S, decltype(zero)>(args); });
}

}  // namespace ugsd
