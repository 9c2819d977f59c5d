// AVX-512 with its bfloat16 dot product: two products a lane, summed in float32.
#pragma once

#include "ugsd/lm_head_stats.h"
#include "ugsd/simd/avx512.h"

namespace ugsd::simd {

struct Avx512Bf16 : Avx512 {};

}  // namespace ugsd::simd

namespace ugsd::detail {

template <>
struct Dot<simd::Avx512Bf16, bfloat16> {
  using Hidden = bfloat16;
  static constexpr int kStep = 32;

  static int64_t padded(int64_t width) { return (width + kStep - 1) / kStep * kStep; }

  static void prepare(const bfloat16* hidden, int64_t width, bfloat16* out) {
    for (int64_t i = 0; i < padded(width); ++i) out[i] = i < width ? hidden[i] : bfloat16{0};
  }

  template <int W, int N>
  static void tile(const bfloat16* weight, int64_t weight_stride, const bfloat16* hidden, int64_t hidden_stride,
                   int64_t width, float* out, int64_t out_stride) {
    __m512 sums[W][N];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    const auto step = [&](int64_t i, auto load) {
      for (int w = 0; w < W; ++w) {
        const __m512i x = load(weight + w * weight_stride + i);
        for (int n = 0; n < N; ++n) {
          const __m512i h = _mm512_loadu_si512(hidden + n * hidden_stride + i);
          sums[w][n] = _mm512_dpbf16_ps(sums[w][n], (__m512bh)x, (__m512bh)h);
        }
      }
    };
    int64_t i = 0;
    for (; i + kStep <= width; i += kStep)
      step(i, [&](const bfloat16* p) {
        __builtin_prefetch(p + W * weight_stride);
        return _mm512_loadu_si512(p);
      });
    if (i < width) {
      const __mmask32 left = (1u << (width - i)) - 1;
      step(i, [&](const bfloat16* p) { return _mm512_maskz_loadu_epi16(left, p); });
    }
    for (int w = 0; w < W; ++w)
      for (int n = 0; n < N; ++n) out[n * out_stride + w] = static_cast<float>(simd::Avx512::sum(sums[w][n]));
  }
};

}  // namespace ugsd::detail
