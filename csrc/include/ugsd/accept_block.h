// accept_block: the accepted prefix of a drafted block and the token after it, under six rules (MATH).
//
// Acceptance is sequential: target rows are read up to the first rejection and no further. Beside them the sampling
// rules read a draft row where its logsumexp is not given, and one row of each model for the residual. Positions
// count from 0.
#pragma once

#include <type_traits>

#include "ugsd/inverse_cdf.h"
#include "ugsd/philox.h"
#include "ugsd/token_stats.h"

namespace ugsd {

namespace detail {

// A softmax row: p(v) = exp(z_v - logsumexp).
struct Softmax {
  double logsumexp;
  bool read;

  UGSD_INLINE bool empty() const { return !(logsumexp > -kInfinity); }
  template <class T>
  UGSD_INLINE double operator()(const T* z, int64_t column) const {
    return empty() ? 0 : std::exp(logit(z, column) - logsumexp);
  }
};

constexpr Softmax kUnread{0, false};

struct Verdict {
  int64_t accepted, next;
};

// The work on one sequence; P is the element type of the verifier's logits. The drafter's may differ.
template <class S, class P>
class Acceptor {
 public:
  Acceptor(const AcceptBlockArgs& args, int64_t b, int threads)
      : args_(args), b_(b), threads_(threads), columns_(args.target.columns), blocks_(blocks_of(columns_)) {
    length_ = args.lengths ? args.lengths[b] : args.block;
    length_ = length_ < 0 ? 0 : length_ > args.block ? args.block : length_;
    sums_ = static_cast<BlockSums*>(scratch(2, static_cast<size_t>(blocks_) * (sizeof(BlockSums) + sizeof(double))));
    masses_ = reinterpret_cast<double*>(sums_ + blocks_);
    const auto rows = static_cast<size_t>(args.block + 1);
    p_ = static_cast<Softmax*>(scratch(3, rows * (2 * sizeof(Softmax) + sizeof(double))));
    q_ = p_ + rows;
    weights_ = reinterpret_cast<double*>(q_ + rows);
    for (size_t i = 0; i < rows; ++i) p_[i] = q_[i] = kUnread;
    for (int64_t i = 0; i < args.block; ++i) args.accept_prob[b * args.block + i] = 0;
  }

  Verdict run() {
    Verdict verdict = args_.rule == Rule::kExact ? exact() : args_.rule == Rule::kBlock ? block() : prefix();
    if (!args_.bonus && verdict.accepted == length_) verdict.next = -1;
    return verdict;
  }

 private:
  const P* target(int64_t i) const { return args_.target.template row<P>(b_ * (args_.block + 1) + i); }

  // f(row i of the drafter's logits), in their own type.
  template <class F>
  auto with_draft(int64_t i, const F& f) const {
    return with_dtype(args_.draft.dtype,
                      [&](auto zero) { return f(args_.draft.template row<decltype(zero)>(b_ * args_.block + i)); });
  }

  int64_t token(int64_t i) const { return args_.tokens[b_ * args_.block + i]; }
  bool inside(int64_t i) const { return token(i) >= 0 && token(i) < columns_; }
  float& accept_prob(int64_t i) const { return args_.accept_prob[b_ * args_.block + i]; }
  bool wants_next(int64_t accepted) const { return args_.bonus || accepted < length_; }

  double draw(int64_t i) const {
    if (args_.uniforms) return args_.uniforms[b_ * (args_.block + 1) + i];
    const Stream stream = i < args_.block ? Stream::kAccept : Stream::kResidual;
    return uniform(args_.seed[b_], args_.offset[b_], b_, stream, i < args_.block ? i : 0);
  }

  // Calls f(j, first column, columns of it) for every block of a row.
  template <class F>
  void each_block(const F& f) const {
    for_each_block(blocks_, threads_, [&](int64_t j) { f(j, j * kBlock, block_size(columns_, j)); });
  }

  // Block sums of a row into sums_, and its softmax. Blocks share a reference, the row's first columns, where that is
  // near enough to them all.
  template <Moment kMoment, class T>
  Softmax softmax(const T* z) {
    float guess;
    const bool shared = kMoment == Moment::kSkip && guess_max<S>(z, columns_, guess);
    each_block([&](int64_t j, int64_t begin, int64_t n) {
      if (!shared || !sums_near<S, kMoment>(z + begin, n, guess, 1.0f, sums_[j]))
        sums_[j] = block_sums<S, kMoment>(z + begin, n, 1.0f);
    });
    const double reference = row_reference(sums_, blocks_);
    double mass = 0;
    for (int64_t j = 0; j < blocks_; ++j) mass += weight_of(sums_[j], reference, 1.0f) * sums_[j].mass;
    return {reference + std::log(mass), true};
  }

  // The drafter's softmax at position i, whose row is read once at most.
  const Softmax& draft_softmax(int64_t i) {
    if (q_[i].read) return q_[i];
    q_[i] = args_.draft_logsumexp ? Softmax{args_.draft_logsumexp[b_ * args_.block + i], true}
                                  : with_draft(i, [&](const auto* z) { return softmax<Moment::kSkip>(z); });
    return q_[i];
  }

  int64_t argmax(int64_t i) {
    const P* z = target(i);
    each_block([&](int64_t j, int64_t begin, int64_t n) { masses_[j] = block_max<S>(z + begin, n); });
    int64_t top = 0;
    for (int64_t j = 1; j < blocks_; ++j)
      if (masses_[j] > masses_[top]) top = j;
    const auto max = static_cast<float>(masses_[top]);
    if (max == -kInfinity) return -1;
    return top * kBlock + find_first<S>(z + top * kBlock, block_size(columns_, top), max);
  }

  int64_t rank(int64_t i) {
    const P* z = target(i);
    const float own = logit(z, token(i));
    each_block([&](int64_t j, int64_t begin, int64_t n) {
      masses_[j] = static_cast<double>(count_greater<S>(z + begin, n, own));
    });
    int64_t rank = 1;
    for (int64_t j = 0; j < blocks_; ++j) rank += static_cast<int64_t>(masses_[j]);
    return rank;
  }

  // The rules that draw nothing: a prefix passes, the argmax follows.
  Verdict prefix() {
    int64_t accepted = 0, best = -1;
    for (; accepted < length_; ++accepted) {
      const int64_t i = accepted;
      if (args_.rule == Rule::kGreedy) {
        best = argmax(i);
        if (best < 0 || best != token(i)) return {accepted, best};
      } else if (!inside(i) || logit(target(i), token(i)) == -kInfinity || !passes(i)) {
        break;
      }
      accept_prob(i) = 1;
    }
    return {accepted, wants_next(accepted) ? argmax(accepted) : -1};
  }

  bool passes(int64_t i) {
    const double limit = args_.limit[b_], slack = args_.slack[b_];
    if (args_.rule != Rule::kTypical && !(static_cast<double>(rank(i)) <= limit)) return false;
    if (args_.rule == Rule::kRank) return true;
    const P* z = target(i);
    if (args_.rule == Rule::kTypical) {
      softmax<Moment::kSum>(z);
      const RowStats stats = merge_blocks<S>(z, columns_, sums_, 1.0f);
      const double p = std::exp(static_cast<double>(logit(z, token(i))) - stats.max) / stats.mass;
      return p > std::fmin(limit, slack * std::exp(-stats.entropy));
    }
    const Softmax p = softmax<Moment::kSkip>(z);
    return p(z, token(i)) >= p(z, argmax(i)) - slack;
  }

  const Softmax& target_softmax(int64_t i) {
    if (!p_[i].read) p_[i] = softmax<Moment::kSkip>(target(i));
    return p_[i];
  }

  // q of the drafted token, 0 for an impossible one.
  double draft_probability(int64_t i) {
    if (!inside(i)) return 0;
    if (!args_.draft.data) return 1;
    const Softmax& softmax = draft_softmax(i);
    return with_draft(i, [&](const auto* z) { return softmax(z, token(i)); });
  }

  // p(x) / q(x), 0 for an impossible token.
  double ratio(int64_t i) {
    const double p = inside(i) ? target_softmax(i)(target(i), token(i)) : 0;
    if (!(p > 0)) return 0;
    const double q = draft_probability(i);
    return q > 0 ? p / q : 0;
  }

  Verdict exact() {
    for (int64_t i = 0; i < length_; ++i) {
      const double accept = std::fmin(1, ratio(i));
      accept_prob(i) = static_cast<float>(accept);
      if (draw(i) < accept) continue;
      residual(i, 1);
      return {i, draw_residual(i, 1)};
    }
    return {length_, wants_next(length_) ? bonus() : -1};
  }

  Verdict block() {
    // Rows are read for the weights while a longer prefix can still be kept.
    int64_t accepted = 0;
    weights_[0] = 1;
    for (; accepted < length_ && longer_prefix_possible(accepted); ++accepted)
      weights_[accepted + 1] = std::fmin(1, weights_[accepted] * ratio(accepted));
    // Scanned from the right: the last prefix whose uniform is under h is kept. h is w at most, so that a uniform of w
    // or more needs no residual.
    for (; accepted > 0; --accepted) {
      const double w = weights_[accepted], u = draw(accepted - 1);
      if (!(u < w)) continue;
      const double s = accepted < length_ ? residual(accepted, w) : 0;
      const double h = accepted == length_ ? w : s + 1 - w > 0 ? s / (s + 1 - w) : 1;
      accept_prob(accepted - 1) = static_cast<float>(h);
      if (u < h) break;
    }
    for (int64_t i = 0; i + 1 < accepted; ++i) accept_prob(i) = 1;
    if (accepted == length_) return {accepted, wants_next(accepted) ? bonus() : -1};
    if (accepted == 0) residual(0, 1);
    return {accepted, draw_residual(accepted, weights_[accepted])};
  }

  // Whether a prefix of more than i tokens can pass: p is 1 at most, which bounds the weights by the drafter's
  // probabilities alone.
  bool longer_prefix_possible(int64_t i) {
    double bound = weights_[i];
    for (; i < length_ && bound > 0; ++i) {
      const double q = draft_probability(i);
      bound = q > 0 ? std::fmin(1, bound / q) : 0;
      if (draw(i) < bound) return true;
    }
    return false;
  }

  int64_t bonus() {
    softmax<Moment::kSkip>(target(length_));
    return draw_token<S>(target(length_), columns_, sums_, 1.0f, draw(args_.block));
  }

  // The float32 next to a row's logsumexp, under which all its probabilities are; over all logits for an empty row.
  static float near(const Softmax& softmax) {
    return softmax.empty() ? kLargest : static_cast<float>(softmax.logsumexp);
  }

  // Vectors of a row's probabilities times a weight, exactly 0 for masked columns.
  template <class T>
  class Probabilities {
   public:
    Probabilities(const T* z, const Softmax& softmax, double weight) : z(z), exp2_(octaves_of(1), near(softmax)) {
      factor_ =
          S::set(softmax.empty() ? 0 : static_cast<float>(weight * std::exp(exp2_.reference() - softmax.logsumexp)));
    }
    static bool fits(const Softmax& softmax) {
      return near(softmax) < kFar && typename S::Exp2(octaves_of(1), near(softmax)).exact();
    }

    UGSD_INLINE typename S::Float operator()(typename S::Float z) const { return S::mul(exp2_.masked(z), factor_); }

    const T* z;

   private:
    typename S::Exp2 exp2_;
    typename S::Float factor_;
  };

  // The same where the logits are huge or there are none.
  template <class T>
  class FarProbabilities {
   public:
    FarProbabilities(const T* z, const Softmax& softmax, double weight)
        : z(z),
          mass_(near(softmax), 1),
          factor_(
              S::set(softmax.empty() ? 0 : static_cast<float>(weight * std::exp(near(softmax) - softmax.logsumexp)))) {}

    typename S::Float operator()(typename S::Float z) const { return S::mul(mass_(z), factor_); }

    const T* z;

   private:
    Mass<S> mass_;
    typename S::Float factor_;
  };

  // max(0, w p - q)
  template <class Left, class Right>
  struct Residual {
    Left p;
    Right q;

    typename S::Float operator()(int64_t column, int64_t end) const {
      const int n = static_cast<int>(end - column);
      return positive(p(S::load_partial(p.z + column, n, -kInfinity)), q(S::load_partial(q.z + column, n, -kInfinity)));
    }
    // The sum over columns from `begin` to `end`.
    double sum(int64_t begin, int64_t end) const {
      const Left left = p;
      const Right right = q;
      auto even = S::set(0), odd = even, a = even, b = even, c = even, d = even;
      int64_t v = begin;
      for (; v + 2 * S::kLanes <= end; v += 2 * S::kLanes) {
        if (std::is_same_v<decltype(p.z), decltype(q.z)>) {
          S::load_pair(left.z + v, a, b);
          S::load_pair(right.z + v, c, d);
        } else {  // whose pairs come in orders of their own
          a = S::load(left.z + v), b = S::load(left.z + v + S::kLanes);
          c = S::load(right.z + v), d = S::load(right.z + v + S::kLanes);
        }
        even = S::add(even, positive(left(a), right(c)));
        odd = S::add(odd, positive(left(b), right(d)));
      }
      for (; v < end; v += S::kLanes) even = S::add(even, (*this)(v, end));
      return S::sum(S::add(even, odd));
    }

   private:
    static typename S::Float positive(typename S::Float p, typename S::Float q) {
      return S::max(S::sub(p, q), S::set(0));
    }
  };

  // A certain drafter's q is 1 at its token: nothing of p is left there.
  template <class Left>
  struct ResidualOfToken {
    Left p;
    int64_t token;

    typename S::Float operator()(int64_t column, int64_t end) const {
      const auto x = p(S::load_partial(p.z + column, static_cast<int>(end - column), -kInfinity));
      if (token < column || token >= column + S::kLanes) return x;
      alignas(64) float lanes[S::kLanes];
      S::store(lanes, x);
      lanes[token - column] = 0;
      return S::load(static_cast<const float*>(lanes));
    }
    double sum(int64_t begin, int64_t end) const {
      auto even = S::set(0), odd = even;
      int64_t v = begin;
      for (; v + S::kLanes < end; v += 2 * S::kLanes) {
        even = S::add(even, (*this)(v, end));
        odd = S::add(odd, (*this)(v + S::kLanes, end));
      }
      if (v < end) even = S::add(even, (*this)(v, end));
      return S::sum(S::add(even, odd));
    }
  };

  // f(the residual of row i)
  template <class F>
  auto with_residual(int64_t i, double w, const F& f) {
    const Softmax& p = target_softmax(i);
    const bool fits = Probabilities<P>::fits(p);
    if (!args_.draft.data) {
      if (fits) return f(ResidualOfToken<Probabilities<P>>{{target(i), p, w}, token(i)});
      return f(ResidualOfToken<FarProbabilities<P>>{{target(i), p, w}, token(i)});
    }
    const Softmax& q = draft_softmax(i);
    return with_draft(i, [&](const auto* z) {
      using Q = std::decay_t<decltype(*z)>;
      if (fits && Probabilities<Q>::fits(q))
        return f(Residual<Probabilities<P>, Probabilities<Q>>{{target(i), p, w}, {z, q, 1}});
      return f(Residual<FarProbabilities<P>, FarProbabilities<Q>>{{target(i), p, w}, {z, q, 1}});
    });
  }

  // Residual mass of row i by block into masses_, and its sum.
  double residual(int64_t i, double w) {
    with_residual(i, w, [&](const auto& r) {
      each_block([&](int64_t j, int64_t begin, int64_t n) { masses_[j] = r.sum(begin, begin + n); });
    });
    double total = 0;
    for (int64_t j = 0; j < blocks_; ++j) total += masses_[j];
    return total;
  }

  // Draws from the residual whose block masses are in masses_.
  int64_t draw_residual(int64_t i, double w) {
    const double u = draw(args_.block);
    const BlockDraw drawn = draw_block(blocks_, u, [&](int64_t j) { return masses_[j]; });
    if (drawn.block < 0) {
      // p = q leaves no residual; only rounding can have rejected, and p is then the law to draw from.
      softmax<Moment::kSkip>(target(i));
      return draw_token<S>(target(i), columns_, sums_, 1.0f, u);
    }
    const int64_t begin = drawn.block * kBlock, n = block_size(columns_, drawn.block);
    return begin + with_residual(i, w, [&](const auto& r) {
             return draw_column<S>(n, drawn.left, [&](int64_t k) { return r(begin + k, begin + n); });
           });
  }

  const AcceptBlockArgs& args_;
  int64_t b_;
  int threads_;
  int64_t columns_, blocks_, length_;
  BlockSums* sums_;  // of the row read last, and its residual masses
  double* masses_;
  Softmax *p_, *q_;  // by position
  double* weights_;  // w of the block rule, by prefix length
};

template <class S, class P>
void accept_block(const AcceptBlockArgs& args) {
  const auto accept = [&](int64_t b, int threads) {
    const Verdict verdict = Acceptor<S, P>(args, b, threads).run();
    args.num_accepted[b] = verdict.accepted;
    args.next_token[b] = verdict.next;
  };
  // Sequences go to threads when there are enough of them, else the blocks of each row do.
  const int threads = useful_threads(args.batch * (args.block + 1) * args.target.columns, args.threads);
  if (args.batch < threads || threads == 1) {
    const int inner = useful_threads(args.target.columns, threads);
    for (int64_t b = 0; b < args.batch; ++b) accept(b, inner);
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t b = 0; b < args.batch; ++b) accept(b, 1);
  }
}

}  // namespace detail

template <class S>
void accept_block(const AcceptBlockArgs& args) {
  with_dtype(args.target.dtype, [&](auto zero) { detail::accept_block<S, decltype(zero)>(args); });
}

}  // namespace ugsd
