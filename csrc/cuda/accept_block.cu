// accept_block: one launch for the rules that draw nothing, two for exact, three for block at most.
//
// The first launch reads all rows at once, a warp a piece; the last warp of a row merges it, the last row of a sequence
// decides. What needs a residual is left to the second launch, a warp a piece of the one row in question. Where that
// fails a block, the third goes on to the left, a thread block a sequence, until the first success. Positions count
// from 0.
#include "ugsd/cuda/kernels.h"
#include "ugsd/cuda/row_stats.h"
#include "ugsd/philox.h"

namespace ugsd::cuda {
namespace {

constexpr int kResidualWarps = 8;
constexpr int kResidualThreads = kResidualWarps * kLanes, kResidualBlocks = 2;  // 128 registers a thread

// The residual that a sequence waits for: of max(0, weight p - q) at a position; -1 where it waits for none.
struct Pending {
  int64_t position;
  double weight;
};

// Where the kernels of one call meet.
struct Space {
  PieceStats *target_pieces, *draft_pieces;  // by row and piece
  RowSums *target_rows, *draft_rows;
  double* weights;  // [batch, block + 1], w of the block rule by prefix length
  double* masses;   // [batch, pieces] of the residual in question
  Pending* pending;
  unsigned *rows_done, *sequences_done;
};

// One of a sequence's softmax rows: p(v) = exp(z_v - logsumexp), 0 in a row with no column left.
struct Softmax {
  double logsumexp;

  __device__ bool empty() const { return !(logsumexp > -kInfinity); }
  __device__ double operator()(float z) const { return empty() ? 0 : exp(z - logsumexp); }
  // The float next to the logsumexp, over all logits for an empty row.
  __device__ float near() const { return empty() ? kLargest : static_cast<float>(logsumexp); }
};

// Float32 probabilities of a row times a weight.
struct Probability {
  float near, factor;

  __device__ Probability(const Softmax& softmax, double weight)
      : near(softmax.near()),
        factor(softmax.empty() ? 0 : static_cast<float>(weight * exp(near - softmax.logsumexp))) {}

  __device__ float operator()(float x) const {
    constexpr float kLog2E = 0x1.715476p+0f, kRest = 0x1.4ae0cp-26f;
    const float d = fminf(cleaned(x) - near, 87.0f);  // over 0 where a wrong logsumexp was given
    if (!(d > -87.0f)) return 0;
    const float n = rintf(d * kLog2E);
    const float e = exp2_fast(fmaf(d, kRest, fmaf(d, kLog2E, -n)));
    return factor * __int_as_float(__float_as_int(e) + (static_cast<int>(n) << 23));
  }
};

// Columns of a row, as many as another type has in a vector; masked past the end.
template <int kColumns, class T>
__device__ void load_columns(const T* row, int columns, int column, float (&x)[kColumns]) {
  if constexpr (kColumns == kWidth<T>) {
    load(row, columns, column, x);
  } else {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[k] = column + k < columns ? to_float(row[column + k]) : -kInfinity;
  }
}

// max(0, w p - q) of the columns of a row. A certain drafter's q is 1 at its token: nothing of p is left there.
template <class P, class Q>
struct Residual {
  int columns;
  const P* row;
  Probability p;
  const Q* draft_row;  // null: a certain drafter
  Probability q;
  int64_t token;

  template <int kColumns>
  __device__ void operator()(int column, float (&e)[kColumns]) const {
    load(row, columns, column, e);
    float z[kColumns];
    if (draft_row) load_columns(draft_row, columns, column, z);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      e[k] = p(e[k]);
      if (draft_row)
        e[k] = fmaxf(e[k] - q(z[k]), 0.0f);
      else if (column + k == token)
        e[k] = 0;
    }
  }
};

// One sequence of the verifier's rows of P and the drafter's of Q, looked at by a whole warp; all its lanes do and get
// the same.
template <class P, class Q>
class Sequence {
 public:
  __device__ Sequence(const AcceptBlockArgs& args, const Space& space, int64_t b)
      : args_(args), space_(space), b_(b), columns_(args.target.columns), pieces_(pieces_of(columns_)) {
    length = args.lengths ? args.lengths[b] : args.block;
    length = length < 0 ? 0 : length > args.block ? args.block : length;
  }

  int64_t length;

  __device__ bool wants_next(int64_t accepted) const { return args_.bonus || accepted < length; }

  // How many of its rows have to be read.
  __device__ int64_t target_rows() const { return length + args_.bonus; }
  __device__ int64_t draft_rows() const { return space_.draft_pieces ? length : 0; }

  __device__ int64_t token(int64_t i) const { return args_.tokens[b_ * args_.block + i]; }
  __device__ bool inside(int64_t i) const { return token(i) >= 0 && token(i) < columns_; }
  __device__ float target_logit(int64_t i) const { return logit(target(i), token(i)); }

  // The rules that draw nothing: a prefix passes, the argmax follows.
  __device__ void judge_prefix() {
    int64_t accepted = 0;
    while (accepted < length && passes(accepted)) ++accepted;
    for (int64_t i = lane(); i < args_.block; i += kLanes) accept_prob(i) = i < accepted ? 1 : 0;
    finish(accepted, wants_next(accepted) ? target_row(accepted).argmax : -1);
  }

  // exact and block, as far as the rows' sums tell.
  __device__ void judge_sampling() {
    for (int64_t i = lane(); i < args_.block; i += kLanes) accept_prob(i) = 0;
    __syncwarp();
    if (args_.rule == Rule::kExact)
      judge_exact();
    else
      judge_block();
  }

  // The residual mass of a piece at the position that the sequence waits for.
  __device__ void sum_residual(int piece) const {
    const auto mass = residual();
    const Split<P> split(columns_, piece);
    float sum = 0;
#pragma unroll 2
    for (int i = 0; i < Split<P>::kSteps; ++i) {
      if (!split.has(i)) continue;
      float e[kWidth<P>];
      mass(split.column(i), e);
      for (const float x : e) sum += x;
    }
    sum = sum_lanes(sum);
    if (lane() == 0) masses()[piece] = sum;
  }

  // What follows from the residual's masses: the next token, or another position to look at.
  __device__ void judge_residual() {
    const int64_t position = pending().position;
    if (args_.rule == Rule::kBlock && position > 0) {
      const double w = pending().weight, u = draw(position - 1), s = residual_mass();
      const double h = s + 1 - w > 0 ? s / (s + 1 - w) : 1;
      if (lane() == 0) accept_prob(position - 1) = static_cast<float>(h);
      if (!(u < h)) return wait_for(candidate(position - 1));
      accept_before(position);
    }
    finish(position, draw_residual());
    wait_for_nothing();
  }

  __device__ Pending& pending() const { return space_.pending[b_]; }

 private:
  __device__ const P* target(int64_t i) const { return args_.target.template row<P>(b_ * (args_.block + 1) + i); }
  __device__ const Q* draft(int64_t i) const { return args_.draft.template row<Q>(b_ * args_.block + i); }
  __device__ const RowSums& target_row(int64_t i) const { return space_.target_rows[b_ * (args_.block + 1) + i]; }
  __device__ float& accept_prob(int64_t i) const { return args_.accept_prob[b_ * args_.block + i]; }
  __device__ double* masses() const { return space_.masses + b_ * pieces_; }
  __device__ double& weight(int64_t i) const { return space_.weights[b_ * (args_.block + 1) + i]; }

  __device__ double draw(int64_t i) const {
    if (args_.uniforms) return args_.uniforms[b_ * (args_.block + 1) + i];
    const Stream stream = i < args_.block ? Stream::kAccept : Stream::kResidual;
    return uniform(args_.seed[b_], args_.offset[b_], b_, stream, i < args_.block ? i : 0);
  }

  __device__ void finish(int64_t accepted, int64_t next) const {
    if (lane() != 0) return;
    args_.num_accepted[b_] = accepted;
    args_.next_token[b_] = next;
  }

  __device__ void wait_for(int64_t position) const {
    __syncwarp();  // others may still read what it waited for
    if (lane() == 0) pending() = {position, args_.rule == Rule::kBlock ? weight(position) : 1.0};
  }

  __device__ void wait_for_nothing() const {
    __syncwarp();
    if (lane() == 0) pending().position = -1;
  }

  __device__ bool passes(int64_t i) const {
    const RowSums& row = target_row(i);
    if (args_.rule == Rule::kGreedy) return !row.empty() && row.argmax == token(i);
    if (!inside(i)) return false;
    const float z = target_logit(i);
    if (z == -kInfinity) return false;
    const double limit = args_.limit[b_], slack = args_.slack[b_];
    if (args_.rule != Rule::kTypical && !(1.0 + row.greater <= limit)) return false;
    if (args_.rule == Rule::kRank) return true;
    const double p = exp(static_cast<double>(z) - row.max) / (1 + row.mass);
    if (args_.rule == Rule::kRelaxed) return p >= 1 / (1 + row.mass) - slack;
    const double entropy = log1p(row.mass) - row.moment / (1 + row.mass);
    return p > fmin(limit, slack * exp(-entropy));
  }

  __device__ static Softmax softmax_of(const RowSums& row) {
    return {row.empty() ? -static_cast<double>(kInfinity) : row.max + log1p(row.mass)};
  }
  __device__ Softmax target_softmax(int64_t i) const { return softmax_of(target_row(i)); }
  __device__ Softmax draft_softmax(int64_t i) const {
    const int64_t r = b_ * args_.block + i;
    return args_.draft_logsumexp ? Softmax{args_.draft_logsumexp[r]} : softmax_of(space_.draft_rows[r]);
  }

  // p(x) / q(x), 0 for an impossible token.
  __device__ double ratio(int64_t i) const {
    if (!inside(i)) return 0;
    const double p = target_softmax(i)(target_logit(i));
    if (!(p > 0)) return 0;
    if (!args_.draft.data) return p;
    const double q = draft_softmax(i)(logit(draft(i), token(i)));
    return q > 0 ? p / q : 0;
  }

  __device__ void judge_exact() {
    for (int64_t i = 0; i < length; ++i) {
      const double accept = fmin(1.0, ratio(i));
      if (lane() == 0) accept_prob(i) = static_cast<float>(accept);
      if (!(draw(i) < accept)) return wait_for(i);
    }
    accept_all();
  }

  // From the right: the last prefix whose uniform is under h is kept. h is w at most, so that a uniform of w or more
  // needs no residual.
  __device__ void judge_block() {
    double w = 1;
    if (lane() == 0) weight(0) = 1;
    for (int64_t i = 0; i < length; ++i) {
      w = fmin(1.0, w * ratio(i));
      if (lane() == 0) weight(i + 1) = w;
    }
    __syncwarp();
    const int64_t position = candidate(length);
    if (position < length) return wait_for(position);
    if (length > 0) {
      if (lane() == 0) accept_prob(length - 1) = static_cast<float>(w);
      accept_before(length);
    }
    accept_all();
  }

  // The longest prefix of at most this many tokens that may be kept.
  __device__ int64_t candidate(int64_t position) const {
    while (position > 0 && !(draw(position - 1) < weight(position))) --position;
    return position;
  }

  __device__ void accept_before(int64_t position) const {
    for (int64_t i = lane(); i + 1 < position; i += kLanes) accept_prob(i) = 1;
  }

  __device__ void accept_all() const {
    const int64_t next = wants_next(length) ? draw_target(length, draw(args_.block)) : -1;
    finish(length, next);
    wait_for_nothing();
  }

  // Draws from the verifier's law at a position.
  __device__ int64_t draw_target(int64_t i, double u) const {
    const int64_t r = b_ * (args_.block + 1) + i;
    return draw_token(target(i), columns_, space_.target_pieces + r * pieces_, target_row(i), octaves_of(1), u);
  }

  __device__ double residual_mass() const {
    double sum = 0;
    for (int j = lane(); j < pieces_; j += kLanes) sum += masses()[j];
    return sum_lanes(sum);
  }

  // The residual in question.
  __device__ Residual<P, Q> residual() const {
    const int64_t i = pending().position;
    const bool certain = !args_.draft.data;
    const Probability p(target_softmax(i), pending().weight), q(certain ? Softmax{0} : draft_softmax(i), 1);
    return {static_cast<int>(columns_), target(i), p, certain ? nullptr : draft(i), q, token(i)};
  }

  __device__ int64_t draw_residual() const {
    const double u = draw(args_.block);
    const PieceDraw drawn = draw_piece(pieces_, u, [&](int j) { return masses()[j]; });
    // p = q leaves no residual; only rounding can have rejected, and p is then the law to draw from.
    if (drawn.piece < 0) return draw_target(pending().position, u);
    return draw_column(Split<P>(columns_, drawn.piece), drawn.left, residual());
  }

  const AcceptBlockArgs& args_;
  const Space& space_;
  int64_t b_, columns_;
  int pieces_;
};

// Rows of a sequence: the verifier's, then the drafter's where they have to be summed.
template <class P, class Q, Sums kSums, bool kCount>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) scan_kernel(AcceptBlockArgs args, Space space) {
  const int count = pieces_of(args.target.columns);
  const int64_t rows = args.block + 1 + (space.draft_pieces ? args.block : 0);
  const int64_t warp = warp_number(), j = warp % count, b = warp / count / rows;
  if (b >= args.batch) return;
  int64_t i = warp / count % rows;
  Sequence<P, Q> sequence(args, space, b);
  const int64_t needed = sequence.target_rows() + sequence.draft_rows();
  if (needed > 0) {
    const bool of_draft = i > args.block;
    if (of_draft) i -= args.block + 1;
    if (i >= (of_draft ? sequence.draft_rows() : sequence.target_rows())) return;
    const Rows& logits = of_draft ? args.draft : args.target;
    const int64_t r = b * (of_draft ? args.block : args.block + 1) + i;
    PieceStats* pieces = (of_draft ? space.draft_pieces : space.target_pieces) + r * count;
    float own = kInfinity;
    if (kCount && i < sequence.length && sequence.inside(i)) own = sequence.target_logit(i);
    PieceStats stats;
    if (std::is_same_v<P, Q> || !of_draft)
      stats = piece_stats<kSums, kCount>(Piece<P>(logits.template row<P>(r), logits.columns, j), octaves_of(1), own);
    else
      stats = piece_stats<kSums, kCount>(Piece<Q>(logits.template row<Q>(r), logits.columns, j), octaves_of(1), own);
    if (lane() == 0) pieces[j] = stats;
    if (!last_to_arrive(space.rows_done + (of_draft ? args.batch * (args.block + 1) : 0) + r, count)) return;
    const RowSums sums = merge_pieces<kSums, kCount>(pieces, count, octaves_of(1));
    if (lane() == 0) (of_draft ? space.draft_rows : space.target_rows)[r] = sums;
    if (!last_to_arrive(space.sequences_done + b, static_cast<unsigned>(needed))) return;
  } else if (i > 0 || j > 0) {
    return;
  }
  if constexpr (kSums == Sums::kMass)
    sequence.judge_sampling();
  else
    sequence.judge_prefix();
}

// A warp a piece of the position that each sequence waits for. `leftward`: a block a sequence, which goes on with the
// positions to the left of a failure for as long as there are failures.
template <class P, class Q>
__global__ void __launch_bounds__(kResidualThreads, kResidualBlocks)
    residual_kernel(AcceptBlockArgs args, Space space, bool leftward) {
  const int count = pieces_of(args.target.columns), warp = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t b = leftward ? blockIdx.x : warp_number() / count;
  if (b >= args.batch) return;
  const int first = leftward ? warp : static_cast<int>(warp_number() % count), step = leftward ? kResidualWarps : count;
  Sequence<P, Q> sequence(args, space, b);
  while (sequence.pending().position >= 0) {
    for (int j = first; j < count; j += step) sequence.sum_residual(j);
    if (leftward) __syncthreads();
    if (leftward ? warp == 0 : last_to_arrive(space.sequences_done + b, count)) sequence.judge_residual();
    if (!leftward) return;
    __syncthreads();
  }
}

// Cuts a workspace into arrays, or measures it where there is none.
class Cutter {
 public:
  explicit Cutter(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    T* start = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return start;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

Space cut(const AcceptBlockArgs& args, bool sums_draft, const Workspace& memory, int64_t* bytes) {
  const int64_t targets = args.batch * (args.block + 1), drafts = args.batch * args.block;
  const int64_t pieces = pieces_of(args.target.columns);
  Cutter cutter(memory.bytes);
  Space space{};
  space.target_pieces = cutter.take<PieceStats>(targets * pieces);
  space.target_rows = cutter.take<RowSums>(targets);
  if (sums_draft) {
    space.draft_pieces = cutter.take<PieceStats>(drafts * pieces);
    space.draft_rows = cutter.take<RowSums>(drafts);
  }
  space.weights = cutter.take<double>(targets);
  space.masses = cutter.take<double>(args.batch * pieces);
  space.pending = cutter.take<Pending>(args.batch);
  space.rows_done = memory.counters;
  space.sequences_done = memory.counters + targets + drafts;
  *bytes = cutter.bytes();
  return space;
}

}  // namespace

void accept_block(const AcceptBlockArgs& args, const Launch& on) {
  const bool draws = args.rule == Rule::kExact || args.rule == Rule::kBlock;
  const bool sums_draft = draws && args.draft.data && !args.draft_logsumexp && args.block > 0;
  int64_t bytes = 0;
  cut(args, sums_draft, {}, &bytes);
  const Space space = cut(args, sums_draft, on.workspace(args.batch * (2 * args.block + 2), bytes), &bytes);
  const int64_t pieces = pieces_of(args.target.columns);
  const int64_t rows = args.block + 1 + (sums_draft ? args.block : 0);
  const int64_t warps = args.batch * rows * pieces;
  with_dtype(args.target.dtype, [&](auto target) {
    using P = decltype(target);
    if (!draws) {
      const bool weighs = args.rule == Rule::kTypical || args.rule == Rule::kRelaxed;
      const auto scan = weighs ? scan_kernel<P, P, Sums::kMoment, true> : scan_kernel<P, P, Sums::kNone, true>;
      return launch_warps(scan, on, warps, args, space);
    }
    with_dtype(args.draft.data ? args.draft.dtype : args.target.dtype, [&](auto draft) {
      using Q = decltype(draft);
      launch_warps(scan_kernel<P, Q, Sums::kMass, false>, on, warps, args, space);
      if (args.block == 0) return;
      launch_warps(residual_kernel<P, Q>, on, args.batch * pieces, args, space, false);
      if (args.rule == Rule::kBlock)
        launch(residual_kernel<P, Q>, on, args.batch * kResidualThreads, kResidualThreads, args, space, true);
    });
  });
}

}  // namespace ugsd::cuda
