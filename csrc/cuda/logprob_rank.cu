// logprob_rank in one launch and one read: a warp a piece counts the columns over the token's, and sums where the
// logsumexp is not given; the last warp of a row adds up.
#include "ugsd/cuda/kernels.h"
#include "ugsd/cuda/row_stats.h"

namespace ugsd::cuda {
namespace {

template <class T, Sums kSums>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    logprob_rank_kernel(LogprobRankArgs args, PieceStats* pieces, unsigned* counters) {
  const int64_t columns = args.logits.columns;
  const int count = pieces_of(columns);
  const int64_t warp = warp_number(), r = warp / count;
  if (r >= args.logits.count()) return;
  const int64_t token = args.tokens[r];
  if (token < 0 || token >= columns) {
    if (warp % count == 0 && lane() == 0) {
      args.logprob[r] = -kInfinity;
      args.rank[r] = columns + 1;
    }
    return;
  }
  const float scale = inverse_temperature(args.temperature[r]), octaves = octaves_of(scale);
  const T* row = args.logits.row<T>(r);
  const float own = logit(row, token);
  const PieceStats stats = piece_stats<kSums, true>(Piece<T>(row, columns, warp % count), octaves, own);
  if (lane() == 0) pieces[warp] = stats;
  if (!last_to_arrive(counters + r, count)) return;
  const RowSums sums = merge_pieces<kSums, true>(pieces + r * count, count, octaves);
  if (lane() != 0) return;
  args.rank[r] = 1 + sums.greater;
  double logprob = -kInfinity;
  if (own > -kInfinity) {
    if (kSums == Sums::kNone)
      logprob = static_cast<double>(own) * scale - args.logsumexp[r];
    else  // the maximum's own is 1 - p in full
      logprob = (static_cast<double>(own) - sums.max) * scale - log1p(sums.mass);
  }
  args.logprob[r] = static_cast<float>(logprob);
}

}  // namespace

void logprob_rank(const LogprobRankArgs& args, const Launch& on) {
  const int64_t rows = args.logits.count(), warps = rows * pieces_of(args.logits.columns);
  const Workspace space = on.workspace(rows, warps * sizeof(PieceStats));
  with_dtype(args.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = args.logsumexp ? logprob_rank_kernel<T, Sums::kNone> : logprob_rank_kernel<T, Sums::kMass>;
    launch_warps(kernel, on, warps, args, reinterpret_cast<PieceStats*>(space.bytes), space.counters);
  });
}

}  // namespace ugsd::cuda
