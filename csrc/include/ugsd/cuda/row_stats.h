// The statistics of a row (MATH: L = m + log a, H = log a - b/a) out of those of its pieces.
//
// A piece is in registers while its maximum is found, so that its sums are taken relative to that at once. The maximum
// itself stays out of them (its term is exactly 1): a nearly certain row keeps all its digits.
#pragma once

#include "ugsd/args.h"
#include "ugsd/cuda/piece.h"

namespace ugsd::cuda {

// d = z - max, e = exp(d / T), all but one column that holds the maximum.
struct PieceStats {
  float max, second;
  float mass, moment;  // sum of e, sum of d e
  int argmax, greater;
};

enum class Sums { kNone, kMass, kMoment };

// `greater` counts the columns over `own`, if asked for; `second` comes with the moment.
template <Sums kSums, bool kCount, class T>
__device__ PieceStats piece_stats(const Piece<T>& piece, float octaves, float own) {
  float max = -kInfinity, second = -kInfinity;
  if (own >= kLargest) own = kInfinity;  // which reads as the largest number: nothing is over that
  int greater = 0;
  piece.backwards([&](float x, int) {
    if (kSums == Sums::kMoment) second = fmaxf(second, fminf(max, fmaxf(x, -kInfinity)));
    max = fmaxf(max, x);
    if (kCount) greater += x > own;
  });
  max = fminf(max, kLargest);
  if (kSums == Sums::kMoment) second = fminf(second, kLargest);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, max, step);
    if (kSums == Sums::kMoment)
      second = fmaxf(fmaxf(second, __shfl_xor_sync(kAllLanes, second, step)), fminf(max, other));
    max = fmaxf(max, other);
  }

  int argmax = kNoColumn;
  float mass = 0, moment = 0, ties = 0;
  const Exponential exponential(max, octaves);
  if (max > -kInfinity)
    piece.backwards([&](float x, int column) {
      if (x >= max) {
        ties += 1;
        argmax = column;
      } else if (kSums != Sums::kNone) {
        float d;
        const float e = exponential(x, d);
        mass += e;
        if (kSums == Sums::kMoment) moment = fmaf(d, e, moment);
      }
    });
  argmax = min_lanes(argmax);
  if (kSums != Sums::kNone) {
    mass = sum_lanes(mass);
    mass += sum_lanes(ties) - (max > -kInfinity ? 1 : 0);
  }
  if (kSums == Sums::kMoment) moment = sum_lanes(moment);
  if (kCount) greater = sum_lanes(greater);
  return {max, second, mass, moment, argmax, greater};
}

// Statistics of a whole row in the same terms.
struct RowSums {
  float max, second;
  int argmax;  // -1 where no column is left
  int greater;
  double mass, moment;

  __device__ bool empty() const { return argmax < 0; }
};

// e^((reference - max) / T), what a piece counts beside the row's maximum; 0 where all of it is masked.
__device__ inline float weight_of(float reference, float max, float octaves) {
  return reference > -kInfinity ? exp2_fast((reference - max) * octaves) : 0;
}

// Every lane of the warp gets the result.
template <Sums kSums, bool kCount>
__device__ RowSums merge_pieces(const PieceStats* pieces, int count, float octaves) {
  RowSums row{-kInfinity, -kInfinity, kNoColumn, 0, 0, 0};
  for (int j = lane(); j < count; j += kLanes) {
    const PieceStats& piece = pieces[j];
    row.second = fmaxf(fmaxf(row.second, piece.second), fminf(row.max, piece.max));
    if (piece.max > row.max) {
      row.max = piece.max;
      row.argmax = piece.argmax;
    }
    if (kCount) row.greater += piece.greater;
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const float max = __shfl_xor_sync(kAllLanes, row.max, step), second = __shfl_xor_sync(kAllLanes, row.second, step);
    const int argmax = __shfl_xor_sync(kAllLanes, row.argmax, step);
    row.second = fmaxf(fmaxf(row.second, second), fminf(row.max, max));
    if (max > row.max || (max == row.max && argmax < row.argmax)) {
      row.max = max;
      row.argmax = argmax;
    }
  }
  if (kCount) row.greater = sum_lanes(row.greater);
  if (!(row.max > -kInfinity)) {
    row.argmax = -1;
    return row;
  }
  for (int j = lane(); kSums != Sums::kNone && j < count; j += kLanes) {
    const PieceStats& piece = pieces[j];
    if (!(piece.max > -kInfinity)) continue;
    const double weight = weight_of(piece.max, row.max, octaves);
    const double whole = row.argmax / kPiece == j ? piece.mass : 1.0 + piece.mass;
    row.mass += weight * whole;
    if (kSums == Sums::kMoment && weight > 0) {
      const double shift = static_cast<double>(piece.max) - row.max;
      row.moment += weight * (piece.moment + shift * (1.0 + piece.mass));
    }
  }
  row.mass = sum_lanes(row.mass);
  if (kSums == Sums::kMoment) row.moment = sum_lanes(row.moment);
  return row;
}

// One lane's work.
__device__ inline void store_stats(const RowSums& row, float scale, const StatsOut& out, int64_t r) {
  const double log_mass = log1p(row.mass), s = static_cast<double>(row.max) * scale;
  out.logsumexp[r] = row.empty() ? -kInfinity : static_cast<float>(s + log_mass);
  out.entropy[r] = row.empty() ? 0 : static_cast<float>(log_mass - row.moment * scale / (1 + row.mass));
  out.max_logit[r] = row.empty() ? -kInfinity : static_cast<float>(s);
  out.argmax[r] = row.argmax;
  out.margin[r] = row.empty() ? 0 : static_cast<float>((static_cast<double>(row.max) - row.second) * scale);
}

// The piece that holds the draw u * total, and the mass that is left to go inside it, in units of mass(j), a piece's
// mass. Every lane gets the result.
struct PieceDraw {
  int piece;  // -1 where no piece has mass
  double left, total;
};

template <class Mass>
__device__ PieceDraw draw_piece(int count, double u, const Mass& mass) {
  double total = 0;
  for (int base = 0; base < count; base += kLanes) {
    const int j = base + lane();
    total += __shfl_sync(kAllLanes, running_sum(j < count ? mass(j) : 0.0), kLanes - 1);
  }
  const double target = u * total;
  PieceDraw drawn{-1, 0, total};
  double before = 0;
  for (int base = 0; base < count; base += kLanes) {
    const int j = base + lane();
    const double own = j < count ? mass(j) : 0;
    const double running = running_sum(own);
    const unsigned positive = __ballot_sync(kAllLanes, own > 0);
    const unsigned over = __ballot_sync(kAllLanes, own > 0 && before + running > target);
    if (positive) {
      const int owner = over ? __ffs(over) - 1 : 31 - __clz(positive);
      drawn.piece = base + owner;
      drawn.left = target - (before + __shfl_sync(kAllLanes, running - own, owner));
      if (over) break;
    }
    before += __shfl_sync(kAllLanes, running, kLanes - 1);
  }
  return drawn;
}

// Draws from softmax(z / T) of a row whose pieces' statistics are known; -1 where no column is left.
template <class T>
__device__ int draw_token(const T* row, int64_t columns, const PieceStats* pieces, const RowSums& sums, float octaves,
                          double u) {
  if (sums.empty()) return -1;
  const PieceDraw drawn = draw_piece(pieces_of(columns), u, [&](int j) {
    return static_cast<double>(weight_of(pieces[j].max, sums.max, octaves)) * (1.0 + pieces[j].mass);
  });
  const float max = pieces[drawn.piece].max;
  const Exponential exponential(max, octaves);
  const double left = drawn.left / weight_of(max, sums.max, octaves);
  return draw_column(Split<T>(columns, drawn.piece), left, [&](int column, auto& e) {
    load(row, static_cast<int>(columns), column, e);
    for (float& x : e) x = exponential(cleaned(x));
  });
}

}  // namespace ugsd::cuda
