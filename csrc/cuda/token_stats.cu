// token_stats in one launch and one read: a warp a piece, and the last warp of a row merges its pieces.
#include "ugsd/cuda/kernels.h"
#include "ugsd/cuda/row_stats.h"

namespace ugsd::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    token_stats_kernel(TokenStatsArgs args, PieceStats* pieces, unsigned* counters) {
  const int64_t columns = args.logits.columns;
  const int count = pieces_of(columns);
  const int64_t warp = warp_number(), r = warp / count;
  if (r >= args.logits.count()) return;
  const float scale = inverse_temperature(args.temperature[r]), octaves = octaves_of(scale);
  const Piece<T> piece(args.logits.row<T>(r), columns, warp % count);
  const PieceStats stats = piece_stats<Sums::kMoment, false>(piece, octaves, 0);
  if (lane() == 0) pieces[warp] = stats;
  if (!last_to_arrive(counters + r, count)) return;
  const RowSums row = merge_pieces<Sums::kMoment, false>(pieces + r * count, count, octaves);
  if (lane() == 0) store_stats(row, scale, args.out, r);
}

}  // namespace

void token_stats(const TokenStatsArgs& args, const Launch& on) {
  const int64_t rows = args.logits.count(), warps = rows * pieces_of(args.logits.columns);
  const Workspace space = on.workspace(rows, warps * sizeof(PieceStats));
  with_dtype(args.logits.dtype, [&](auto zero) {
    launch_warps(token_stats_kernel<decltype(zero)>, on, warps, args, reinterpret_cast<PieceStats*>(space.bytes),
                 space.counters);
  });
}

}  // namespace ugsd::cuda
