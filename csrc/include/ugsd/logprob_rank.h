// logprob_rank: log p(x) and 1 + #{v : z_v > z_x} of one token a row.
//
// One read of the row: counting alone when the logsumexp is given, counting and block sums from L1 when not.
#pragma once

#include "ugsd/token_stats.h"

namespace ugsd {

struct LogprobRankArgs {
  Rows logits;
  const int64_t* tokens;
  PerRow<float> temperature;
  const float* logsumexp;  // null: computed here
  float* logprob;
  int64_t* rank;
  int threads;
};

namespace detail {

// A token of this log-probability is the row's maximum, whatever the rounding.
constexpr double kLikely = -0.6;

struct CountAndSums {
  int64_t greater;
  BlockSums sums;
};

template <class S, class T>
void logprob_rank(const LogprobRankArgs& args) {
  const Rows& rows = args.logits;
  const auto inside = [&](int64_t r) { return args.tokens[r] >= 0 && args.tokens[r] < rows.columns; };
  const auto block = [&](int64_t r, int64_t j, CountAndSums& partial) {
    if (!inside(r)) return;
    const T* z = rows.row<T>(r);
    const int64_t n = block_size(rows.columns, j);
    if (!args.logsumexp)
      partial.sums = block_sums<S, Moment::kSkip>(z + j * kBlock, n, inverse_temperature(args.temperature[r]));
    partial.greater = count_greater<S>(z + j * kBlock, n, logit(z, args.tokens[r]));
  };
  const auto finish = [&](int64_t r, const CountAndSums* partials) {
    args.logprob[r] = -kInfinity;
    args.rank[r] = rows.columns + 1;
    if (!inside(r)) return;
    const int64_t count = blocks_of(rows.columns);
    args.rank[r] = 1;
    for (int64_t j = 0; j < count; ++j) args.rank[r] += partials[j].greater;
    const float scale = inverse_temperature(args.temperature[r]), z = logit(rows.row<T>(r), args.tokens[r]);
    if (z == -kInfinity) return;
    const double s = static_cast<double>(z) * scale;
    if (args.logsumexp) {
      args.logprob[r] = static_cast<float>(s - args.logsumexp[r]);
      return;
    }
    double reference = -kInfinity, mass = 0;
    for (int64_t j = 0; j < count; ++j) reference = std::fmax(reference, partials[j].sums.reference);
    for (int64_t j = 0; j < count; ++j) mass += weight_of(partials[j].sums, reference, scale) * partials[j].sums.mass;
    double logprob = (z - reference) * scale - std::log(mass);
    if (logprob > kLikely) {
      // 1 - p in full: the mass beside the token, relative to the token.
      const int64_t own = args.tokens[r] / kBlock, column = args.tokens[r] % kBlock;
      const T* row = rows.row<T>(r) + own * kBlock;
      double beside = 0, moment = 0;
      for (int64_t j = 0; j < count; ++j)
        if (j != own) beside += weight_of(partials[j].sums, z, scale) * partials[j].sums.mass;
      add_sums<S, Moment::kSkip>(row, column, z, scale, beside, moment);
      add_sums<S, Moment::kSkip>(row + column + 1, block_size(rows.columns, own) - column - 1, z, scale, beside,
                                 moment);
      logprob = -std::log1p(beside);
    }
    args.logprob[r] = static_cast<float>(logprob);
  };
  for_blocks_of<CountAndSums>(rows.count(), blocks_of(rows.columns), args.threads, block, finish);
}

}  // namespace detail

template <class S>
void logprob_rank(const LogprobRankArgs& args) {
  with_dtype(args.logits.dtype, [&](auto zero) { detail::logprob_rank<S, decltype(zero)>(args); });
}

}  // namespace ugsd
