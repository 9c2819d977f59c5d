// lm_head_stats: token_stats of hidden @ weight^T + bias, the logits never leaving the cache.
//
// The weight is read once, two rows at a time for all hidden rows; each block of 4096 logits is reduced to its
// statistics in L1/L2 and forgotten.
#pragma once

#include "ugsd/token_stats.h"

namespace ugsd {

namespace detail {

// Products of a weight row and hidden states, kStep columns a time: hidden states are widened once, in the order in
// which weights are loaded in pairs.
template <class S, class T>
struct Dot {
  using Hidden = float;
  using Sum = typename S::Float;
  struct Columns {
    typename S::Float a, b;
  };
  static constexpr int kStep = 2 * S::kLanes;
  static constexpr int kMaxRows = S::kLanes == 16 ? 6 : 4;  // hidden rows of a tile

  static Sum zero() { return S::set(0); }
  static Columns load(const T* p) {
    Columns x;
    S::load_pair(p, x.a, x.b);
    return x;
  }
  static Columns load_partial(const T* p, int64_t n) {
    if (n >= kStep) return load(p);
    return {S::load_partial(p, static_cast<int>(n), 0),
            S::load_partial(p + S::kLanes, static_cast<int>(n - S::kLanes), 0)};
  }
  static Columns load_hidden(const float* p) { return {S::load(p), S::load(p + S::kLanes)}; }
  static void store_hidden(float* p, const Columns& x) {
    S::store(p, x.a);
    S::store(p + S::kLanes, x.b);
  }
  static Sum add(Sum sum, const Columns& x, const Columns& h) { return S::fma(x.b, h.b, S::fma(x.a, h.a, sum)); }
  static void total(const Sum* sums, int count, float* totals) {
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) totals[i] = static_cast<float>(S::sum(sums[i]));
  }
};

// How far ahead of its use a line of weights is asked for. The two rows of a pair lie half a block apart, so that each
// is one long run of lines for the hardware's own prefetch as well; with one hidden row a core runs far enough ahead
// without being asked, and asking for lines only gets in the way.
constexpr int64_t kLine = 64, kAhead = 52 * kLine;  // bytes

// out[n * out_stride + w * spacing] = weight row w * spacing . hidden row n, every sum in column order. `hidden` holds
// the N rows in turns, D::kStep columns each: one run of lines, however many rows there are.
template <class D, int W, int N, class T>
void dot_tile(const T* weight, int64_t weight_stride, int64_t spacing, const typename D::Hidden* hidden, int64_t width,
              float* out, int64_t out_stride) {
  typename D::Sum sums[W][N];
#pragma GCC unroll 8
  for (auto& row : sums)
#pragma GCC unroll 8
    for (auto& sum : row) sum = D::zero();
  const auto step = [&](int64_t i, auto load) {
    typename D::Columns x[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) x[w] = load(weight + w * spacing * weight_stride + i);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const auto h = D::load_hidden(hidden + i * N + n * D::kStep);
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) sums[w][n] = D::add(sums[w][n], x[w], h);
    }
  };
  constexpr int kLineColumns = kLine / sizeof(T), kFetched = D::kStep < kLineColumns ? kLineColumns : D::kStep;
  int64_t i = 0;
  for (; i + kFetched <= width; i += kFetched) {
    if constexpr (N > 1)
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w)
#pragma GCC unroll 8
        for (int line = 0; line < kFetched; line += kLineColumns)
          __builtin_prefetch(reinterpret_cast<const char*>(weight + w * spacing * weight_stride + i + line) + kAhead);
    for (int part = 0; part < kFetched; part += D::kStep) step(i + part, [](const T* p) { return D::load(p); });
  }
  for (; i < width; i += D::kStep) step(i, [&](const T* p) { return D::load_partial(p, width - i); });
  float totals[W][N];
  D::total(&sums[0][0], W * N, &totals[0][0]);
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) out[n * out_stride + w * spacing] = totals[w][n];
}

// dot_tile for W weight rows and `rows` hidden rows, at most D::kMaxRows.
template <class D, int W, int N = 1, class T>
void dot_rows(int64_t rows, const T* weight, int64_t weight_stride, int64_t spacing, const typename D::Hidden* hidden,
              int64_t width, float* out, int64_t out_stride) {
  if constexpr (N < D::kMaxRows)
    if (rows > N) return dot_rows<D, W, N + 1>(rows, weight, weight_stride, spacing, hidden, width, out, out_stride);
  dot_tile<D, W, N>(weight, weight_stride, spacing, hidden, width, out, out_stride);
}

// One block's statistics, its maximum left out of the sums.
struct HeadSums {
  double mass, moment;
  int64_t argmax;
  float max, second;
};

template <class S>
HeadSums head_sums(const float* z, int64_t n, float scale) {
  HeadSums sums{0, 0, -1, block_max<S>(z, n), -kInfinity};
  if (sums.max == -kInfinity) return sums;
  sums.argmax = find_first<S>(z, n, sums.max);
  const float* after = z + sums.argmax + 1;
  const float left = block_max<S>(z, sums.argmax), right = block_max<S>(after, n - sums.argmax - 1);
  sums.second = left > right ? left : right;
  add_sums<S, Moment::kSum>(z, sums.argmax, sums.max, scale, sums.mass, sums.moment);
  add_sums<S, Moment::kSum>(after, n - sums.argmax - 1, sums.max, scale, sums.mass, sums.moment);
  return sums;
}

static inline RowStats merge_heads(const HeadSums* blocks, int64_t count, float scale) {
  int64_t top = 0;
  for (int64_t j = 1; j < count; ++j)
    if (blocks[j].max > blocks[top].max) top = j;
  const float max = blocks[top].max;
  if (max == -kInfinity) return kEmptyRow;
  float second = blocks[top].second;
  double mass = blocks[top].mass, moment = blocks[top].moment;
  for (int64_t j = 0; j < count; ++j) {
    if (j == top || blocks[j].max == -kInfinity) continue;
    if (blocks[j].max > second) second = blocks[j].max;
    const double shift = static_cast<double>(blocks[j].max) - max, weight = std::exp(shift * scale);
    mass += weight * (1 + blocks[j].mass);
    moment += weight * (blocks[j].moment + shift * (1 + blocks[j].mass));
  }
  return row_stats(max, top * kBlock + blocks[top].argmax, second, mass, moment, scale);
}

template <class S, class T>
void lm_head_stats(const LmHeadStatsArgs& args) {
  using D = Dot<S, T>;
  using Hidden = typename D::Hidden;
  const int64_t rows = args.hidden.count(), width = args.hidden.columns, vocabulary = args.weight.count();
  const int64_t count = blocks_of(vocabulary), padded = (width + D::kStep - 1) / D::kStep * D::kStep;
  auto* hidden = static_cast<Hidden*>(scratch(0, static_cast<size_t>(rows * padded) * sizeof(Hidden)));
  const auto tile = [&](int64_t r) { return rows - r < D::kMaxRows ? rows - r : D::kMaxRows; };  // rows from r on
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = r % D::kMaxRows, first = r - n;
    for (int64_t i = 0; i < width; i += D::kStep)
      D::store_hidden(hidden + first * padded + i * tile(first) + n * D::kStep,
                      D::load_partial(args.hidden.row<T>(r) + i, width - i));
  }
  auto* partials = static_cast<HeadSums*>(scratch(1, static_cast<size_t>(rows * count) * sizeof(HeadSums)));
  const auto* bias = static_cast<const T*>(args.bias);
  const int64_t stride = args.weight.inner_stride;
  constexpr int64_t kLogits = kBlock + 16;  // of a row: a power of two would put all rows into one set of L1

  for_each_block(count, useful_threads(vocabulary * width, args.threads), [&](int64_t j) {
    const int64_t begin = j * kBlock, n = block_size(vocabulary, j);
    auto* logits = static_cast<float*>(scratch(2, static_cast<size_t>(rows * kLogits) * sizeof(float)));
    const int64_t half = n / 2;
    for (int64_t v = 0; v < half; ++v)  // weights come from memory once: the hidden rows past a tile find them in L1
      for (int64_t r = 0; r < rows; r += D::kMaxRows)
        dot_rows<D, 2>(tile(r), args.weight.row<T>(begin + v), stride, half, hidden + r * padded, width,
                       logits + r * kLogits + v, kLogits);
    if (n % 2)
      for (int64_t r = 0; r < rows; r += D::kMaxRows)
        dot_rows<D, 1>(tile(r), args.weight.row<T>(begin + n - 1), stride, 0, hidden + r * padded, width,
                       logits + r * kLogits + n - 1, kLogits);
    for (int64_t r = 0; r < rows; ++r) {
      float* z = logits + r * kLogits;
      if (bias)
        for (int64_t i = 0; i < n; ++i) z[i] += simd::to_float(bias[begin + i]);
      partials[r * count + j] = head_sums<S>(z, n, inverse_temperature(args.temperature[r]));
    }
  });
  for (int64_t r = 0; r < rows; ++r)
    store_stats(merge_heads(partials + r * count, count, inverse_temperature(args.temperature[r])), args.out, r);
}

}  // namespace detail

template <class S>
void lm_head_stats(const LmHeadStatsArgs& args) {
  with_dtype(args.weight.dtype, [&](auto zero) { detail::lm_head_stats<S, decltype(zero)>(args); });
}

}  // namespace ugsd
