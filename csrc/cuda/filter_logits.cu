// filter_logits in two launches: the thresholds, then the write. The first is the filtered draw of `sample` too.
#include "ugsd/cuda/draw.h"
#include "ugsd/cuda/filter_logits.h"
#include "ugsd/cuda/filters.h"
#include "ugsd/cuda/kernels.h"

namespace ugsd::cuda {
namespace {

// Pieces as in token_stats; the last block of a row finds its threshold and, with `draws`, draws.
template <class T>
__global__ void __launch_bounds__(kFilterThreads, 1)
    select_kernel(SampleArgs args, bool draws, Bound* bounds, PieceStats* all, unsigned* counters) {
  __shared__ FilterScratch scratch;
  const int64_t columns = args.logits.columns;
  const int count = pieces_of(columns), groups = (count + kFilterWarps - 1) / kFilterWarps;
  const int64_t r = blockIdx.x / groups;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int j = static_cast<int>(blockIdx.x % groups) * kFilterWarps + warp;
  const float scale = inverse_temperature(args.temperature[r]), octaves = octaves_of(scale);
  const T* row = args.logits.row<T>(r);
  PieceStats* pieces = all + r * count;
  if (j < count) {
    const PieceStats stats = piece_stats<Sums::kMoment, false>(Piece<T>(row, columns, j), octaves, 0);
    if (lane() == 0) pieces[j] = stats;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    scratch.last = atomicAdd(counters + r, 1u) + 1 == static_cast<unsigned>(groups);
    if (scratch.last) counters[r] = 0;
  }
  __syncthreads();
  if (!scratch.last) return;
  __threadfence();

  const RowSums sums = merge_pieces<Sums::kMoment, false>(pieces, count, octaves);
  if (draws && threadIdx.x == 0) store_stats(sums, scale, args.out, r);
  const RowFilter filter(args.filters, r, columns);
  const bool filtered = args.temperature[r] > 0 && !sums.empty() && filter.any();
  RowSelection<T> selection(row, columns, pieces, sums, scale, scratch);
  const float threshold = filtered ? selection.threshold(filter) : -kInfinity;
  if (!draws) {
    if (threadIdx.x == 0) bounds[r] = {threshold, sums.argmax};
    return;
  }
  if (!filtered) {
    if (warp == 0) draw_row(args, r, row, pieces, sums, scale);
    return;
  }
  selection.each_mass(threshold, [&](int j, float mass) {
    mass = sum_lanes(mass);
    if (lane() == 0) pieces[j].mass = mass;  // over the threshold, relative to the row's maximum, from here on
  });
  __threadfence();
  __syncthreads();
  if (warp != 0) return;
  const double u = uniform(args.seed[r], args.offset[r], r, Stream::kDraft);
  const PieceDraw drawn = draw_piece(count, u, [&](int j) { return static_cast<double>(pieces[j].mass); });
  const int token = draw_column(Split<T>(columns, drawn.piece), drawn.left, [&](int column, auto& e) {
    load(row, static_cast<int>(columns), column, e);
    for (float& x : e) x = selection.mass_over(x, threshold);
  });
  if (lane() != 0) return;
  args.tokens[r] = token;
  const double s = (static_cast<double>(logit(row, token)) - sums.max) * scale;
  args.logprob[r] = static_cast<float>(s - log(drawn.total));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    write_kernel(FilterLogitsArgs args, const Bound* bounds) {
  const int64_t columns = args.logits.columns;
  const int count = pieces_of(columns);
  const int64_t warp = warp_number(), r = warp / count;
  if (r >= args.logits.count()) return;
  const T* row = args.logits.row<T>(r);
  float* out = args.out + r * columns;
  const float t = args.temperature[r];
  const bool greedy = !(t > 0);
  const Bound bound = bounds ? bounds[r] : Bound{-kInfinity, -1};
  const auto filtered = [&](float x, int column) {
    x = cleaned(x);
    if (greedy) return column == bound.argmax ? x : -kInfinity;
    return x >= bound.threshold ? x / t : -kInfinity;
  };
  const Split<T> split(columns, warp % count);
#pragma unroll 2
  for (int i = 0; i < Split<T>::kSteps; ++i) {
    if (!split.has(i)) continue;
    float x[kWidth<T>];
    load(row, split.columns, split.column(i), x);
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) x[k] = filtered(x[k], split.column(i) + k);
    store(out, split.columns, split.column(i), x);
  }
}

}  // namespace

void select_rows(const SampleArgs& args, bool draws, Bound* bounds, const Workspace& space, const Launch& on) {
  const int count = pieces_of(args.logits.columns), groups = (count + kFilterWarps - 1) / kFilterWarps;
  with_dtype(args.logits.dtype, [&](auto zero) {
    launch(select_kernel<decltype(zero)>, on, args.logits.count() * groups * kFilterThreads, kFilterThreads, args,
           draws, bounds, reinterpret_cast<PieceStats*>(space.bytes), space.counters);
  });
}

void filter_logits(const FilterLogitsArgs& args, const Launch& on) {
  const int64_t rows = args.logits.count(), warps = rows * pieces_of(args.logits.columns);
  Bound* bounds = nullptr;
  if (may_cut(args.filters, args.logits.columns) || args.temperature.rows || !(args.temperature.value > 0)) {
    const int64_t bytes = warps * sizeof(PieceStats);
    const Workspace space = on.workspace(rows, bytes + rows * sizeof(Bound));
    bounds = reinterpret_cast<Bound*>(space.bytes + bytes);
    select_rows({args.logits, args.temperature, args.filters, {}, {}, nullptr, nullptr, {}, 0}, false, bounds, space,
                on);
  }
  with_dtype(args.logits.dtype,
             [&](auto zero) { launch_warps(write_kernel<decltype(zero)>, on, warps, args, bounds); });
}

}  // namespace ugsd::cuda
