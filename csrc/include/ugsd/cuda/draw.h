// The draw of a row without filters, by one warp.
#pragma once

#include "ugsd/cuda/row_stats.h"
#include "ugsd/philox.h"

namespace ugsd::cuda {

// Stores the row's token and its log-probability.
template <class T>
__device__ void draw_row(const SampleArgs& args, int64_t r, const T* row, const PieceStats* pieces, const RowSums& sums,
                         float scale) {
  int token = sums.argmax;
  double s = 0;
  if (args.temperature[r] > 0 && !sums.empty()) {
    const double u = uniform(args.seed[r], args.offset[r], r, Stream::kDraft);
    token = draw_token(row, args.logits.columns, pieces, sums, octaves_of(scale), u);
    s = (static_cast<double>(logit(row, token)) - sums.max) * scale;
  }
  if (lane() != 0) return;
  args.tokens[r] = token;
  args.logprob[r] = sums.empty() ? -kInfinity : static_cast<float>(s - log1p(sums.mass));
}

}  // namespace ugsd::cuda
