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
  static float total(Sum sum) { return static_cast<float>(simd::Avx512::sum(sum)); }
};

}  // namespace ugsd::detail
