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
  using Sum = __m512;
  using Columns = __m512i;
  static constexpr int kStep = 32;
  static constexpr int kMaxRows = 6;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Columns load(const bfloat16* p) { return _mm512_loadu_si512(p); }
  static Columns load_partial(const bfloat16* p, int64_t n) {
    return n >= kStep ? load(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  static Columns load_hidden(const bfloat16* p) { return _mm512_load_si512(p); }
  static void store_hidden(bfloat16* p, Columns x) { _mm512_store_si512(p, x); }
  static Sum add(Sum sum, Columns x, Columns h) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)h); }
  // Halves are added to halves, four sums at a time: the order of _mm512_reduce_add_ps in a third of the instructions.
  UGSD_INLINE static void total(const Sum* sums, int count, float* totals) {
    int i = 0;
#pragma GCC unroll 4
    for (; i + 4 <= count; i += 4) {
      const __m512 ab = halves(sums[i], sums[i + 1]), cd = halves(sums[i + 2], sums[i + 3]);
      __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
      x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
      x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
      const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
      _mm_storeu_ps(totals + i, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, x)));
    }
#pragma GCC unroll 4
    for (; i < count; ++i) totals[i] = _mm512_reduce_add_ps(sums[i]);
  }

 private:
  static __m512 halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
};

}  // namespace ugsd::detail
