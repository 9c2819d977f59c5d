// sample in one launch: one read of the row, then the draw reads one piece again. Filtered rows: filter_logits.cu.
#include "ugsd/cuda/draw.h"
#include "ugsd/cuda/filter_logits.h"
#include "ugsd/cuda/kernels.h"

namespace ugsd::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sample_kernel(SampleArgs args, PieceStats* pieces, unsigned* counters) {
  const int64_t columns = args.logits.columns;
  const int count = pieces_of(columns);
  const int64_t warp = warp_number(), r = warp / count;
  if (r >= args.logits.count()) return;
  const float scale = inverse_temperature(args.temperature[r]), octaves = octaves_of(scale);
  const T* row = args.logits.row<T>(r);
  const PieceStats stats = piece_stats<Sums::kMoment, false>(Piece<T>(row, columns, warp % count), octaves, 0);
  if (lane() == 0) pieces[warp] = stats;
  if (!last_to_arrive(counters + r, count)) return;
  const RowSums sums = merge_pieces<Sums::kMoment, false>(pieces + r * count, count, octaves);
  if (lane() == 0) store_stats(sums, scale, args.out, r);
  draw_row(args, r, row, pieces + r * count, sums, scale);
}

}  // namespace

void sample(const SampleArgs& args, const Launch& on) {
  const int64_t rows = args.logits.count(), warps = rows * pieces_of(args.logits.columns);
  const Workspace space = on.workspace(rows, warps * sizeof(PieceStats));
  if (may_cut(args.filters, args.logits.columns)) return select_rows(args, true, nullptr, space, on);
  with_dtype(args.logits.dtype, [&](auto zero) {
    launch_warps(sample_kernel<decltype(zero)>, on, warps, args, reinterpret_cast<PieceStats*>(space.bytes),
                 space.counters);
  });
}

}  // namespace ugsd::cuda
