// lm_head_stats: token_stats of hidden @ weight^T + bias, the logits never leaving the cache.
//
// The weight is read once, W rows at a time for all hidden rows; each block of 4096 logits is reduced to its
// statistics in L1/L2 and forgotten.
#pragma once

#include "ugsd/token_stats.h"

namespace ugsd {

struct LmHeadStatsArgs {
  Rows hidden;  // [rows, width]
  Rows weight;  // [vocabulary, width]
  const void* bias;
  PerRow<float> temperature;
  StatsOut out;
  int threads;
};

namespace detail {

// Dot products in float32: hidden states are widened once, in the order in which weights are loaded in pairs.
template <class S, class T>
struct Dot {
  using Hidden = float;

  static int64_t padded(int64_t width) { return (width + 2 * S::kLanes - 1) / (2 * S::kLanes) * (2 * S::kLanes); }

  static void prepare(const T* hidden, int64_t width, float* out) {
    typename S::Float a, b;
    for (int64_t i = 0; i < width; i += 2 * S::kLanes) {
      load(hidden + i, width - i, a, b);
      S::store(out + i, a);
      S::store(out + i + S::kLanes, b);
    }
  }

  // out[n * out_stride + w] = weight row w . hidden row n
  template <int W, int N>
  static void tile(const T* weight, int64_t weight_stride, const float* hidden, int64_t hidden_stride, int64_t width,
                   float* out, int64_t out_stride) {
    typename S::Float sums[W][N];
    for (auto& row : sums)
      for (auto& sum : row) sum = S::set(0);
    const auto step = [&](int64_t i, auto load_weight) {
      for (int w = 0; w < W; ++w) {
        typename S::Float a, b;
        load_weight(weight + w * weight_stride + i, a, b);
        for (int n = 0; n < N; ++n) {
          const float* h = hidden + n * hidden_stride + i;
          sums[w][n] = S::fma(b, S::load(h + S::kLanes), S::fma(a, S::load(h), sums[w][n]));
        }
      }
    };
    int64_t i = 0;
    for (; i + 2 * S::kLanes <= width; i += 2 * S::kLanes)
      step(i, [&](const T* p, auto& a, auto& b) {
        __builtin_prefetch(p + W * weight_stride);
        if (sizeof(T) == 4) __builtin_prefetch(p + W * weight_stride + S::kLanes);
        S::load_pair(p, a, b);
      });
    if (i < width) step(i, [&](const T* p, auto& a, auto& b) { load(p, width - i, a, b); });
    for (int w = 0; w < W; ++w)
      for (int n = 0; n < N; ++n) out[n * out_stride + w] = static_cast<float>(S::sum(sums[w][n]));
  }

 private:
  template <class F>
  static void load(const T* p, int64_t n, F& a, F& b) {
    if (n >= 2 * S::kLanes) return S::load_pair(p, a, b);
    a = S::load_partial(p, static_cast<int>(n), 0);
    b = S::load_partial(p + S::kLanes, static_cast<int>(n - S::kLanes), 0);
  }
};

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
  constexpr int kTileRows = 4;
  const int64_t rows = args.hidden.count(), width = args.hidden.columns, vocabulary = args.weight.count();
  const int64_t count = blocks_of(vocabulary), padded = D::padded(width);
  auto* hidden =
      static_cast<typename D::Hidden*>(scratch(0, static_cast<size_t>(rows * padded) * sizeof(typename D::Hidden)));
  for (int64_t r = 0; r < rows; ++r) D::prepare(args.hidden.row<T>(r), width, hidden + r * padded);
  auto* partials = static_cast<HeadSums*>(scratch(1, static_cast<size_t>(rows * count) * sizeof(HeadSums)));
  const auto* bias = static_cast<const T*>(args.bias);
  const int64_t stride = args.weight.inner_stride;

  // Logits of `W` weight rows from `v` for every hidden row.
  const auto group = [&](auto tile_rows, int64_t v, float* out) {
    constexpr int W = decltype(tile_rows)::value;
    const T* weight = args.weight.row<T>(v);
    int64_t r = 0;
    const auto tile = [&](auto tile_columns) {
      constexpr int N = decltype(tile_columns)::value;
      for (; r + N <= rows; r += N)
        D::template tile<W, N>(weight, stride, hidden + r * padded, padded, width, out + r * kBlock, kBlock);
    };
    tile(std::integral_constant<int, 4>{});
    tile(std::integral_constant<int, 2>{});
    tile(std::integral_constant<int, 1>{});
  };
  for_each_block(count, useful_threads(vocabulary * width, args.threads), [&](int64_t j) {
    const int64_t begin = j * kBlock, n = block_size(vocabulary, j);
    auto* logits = static_cast<float*>(scratch(2, static_cast<size_t>(rows * kBlock) * sizeof(float)));
    int64_t v = 0;
    for (; v + kTileRows <= n; v += kTileRows) group(std::integral_constant<int, kTileRows>{}, begin + v, logits + v);
    for (; v < n; ++v) group(std::integral_constant<int, 1>{}, begin + v, logits + v);
    for (int64_t r = 0; r < rows; ++r) {
      float* z = logits + r * kBlock;
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
