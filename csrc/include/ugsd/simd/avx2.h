// Eight lanes: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "ugsd/simd/scalar.h"

namespace ugsd::simd {

struct Avx2 {
  static constexpr int kLanes = 8;
  struct Bytes {
    using Vector = __m256i;
    static constexpr bool kStreams = true;  // stores that leave the caches alone, on aligned addresses
    static void stream(char* p, Vector v) { _mm256_stream_si256(reinterpret_cast<Vector*>(p), v); }
    static void fence() { _mm_sfence(); }
  };
  using Float = __m256;
  using Mask = __m256;

  static Float set(float x) { return _mm256_set1_ps(x); }

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const bfloat16* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static Float load(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  template <class T>
  static Float load_partial(const T* p, int n, float fill) {
    if (n >= kLanes) return load(p);
    alignas(32) float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
    return _mm256_load_ps(lanes);
  }

  static void load_pair(const float* p, Float& a, Float& b) {
    a = load(p);
    b = load(p + kLanes);
  }
  static void load_pair(const bfloat16* p, Float& a, Float& b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static void load_pair(const float16* p, Float& a, Float& b) {
    a = load(p);
    b = load(p + kLanes);
  }

  static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static void store_partial(float* p, Float x, int n) {
    if (n >= kLanes) return store(p, x);
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, x);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }

  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }

  static Mask greater(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static Mask greater_equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static Mask equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static Float select(Mask m, Float yes, Float no) { return _mm256_blendv_ps(no, yes, m); }
  static Float add_where(Mask m, Float a, Float b) { return _mm256_add_ps(a, _mm256_and_ps(m, b)); }
  static uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }

  static int compress(float* out, Mask m, Float x) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, x);
    int count = 0;
    for (uint32_t left = bits(m); left; left &= left - 1) out[count++] = lanes[__builtin_ctz(left)];
    return count;
  }
  static int compress_columns(int32_t* out, Mask m, int32_t first) {
    int count = 0;
    for (uint32_t left = bits(m); left; left &= left - 1) out[count++] = first + __builtin_ctz(left);
    return count;
  }

  static double sum(Float x) {
    const __m256d four =
        _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
  static float maximum(Float x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }

  // 2^(r + n): adding n to the exponent field multiplies by 2^n, as p is near 1 and n at least -126.
  static Float power(Float r, Float n) {
    Float p = set(kExp2[4]);
    for (int i = 3; i >= 0; --i) p = fma(p, r, set(kExp2[i]));
    p = fma(p, r, set(1.0f));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
  }

  // The nearest integer.
  static Float round(Float y) { return _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  struct Exp {
    explicit Exp(float scale) : scale_(_mm256_set1_ps(scale * kLog2E)) {}
    Float operator()(Float d) const {
      const Float y = mul(d, scale_);
      const Float n = round(y);
      const Float r = _mm256_fmsub_ps(d, scale_, n);  // y's own rounding does not reach r
      return power(r, n);
    }

   private:
    Float scale_;
  };

  using Exp2 = FusedExp2<Avx2>;

  // Sixteen signed lanes: bfloat16 and float16 as they are stored.
  struct Short {
    static constexpr int kLanes = 16;
    using Vector = __m256i;
    using Mask = __m256i;

    static Vector set(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }

    template <class T>
    static Vector load(const T* p) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    template <class T>
    static Vector load_partial(const T* p, int n, int fill) {
      if (n >= kLanes) return load(p);
      T lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : T{static_cast<uint16_t>(fill)};
      return load(lanes);
    }

    static Vector add(Vector a, Vector b) { return _mm256_add_epi16(a, b); }
    static Vector both(Vector a, Vector b) { return _mm256_and_si256(a, b); }
    static Vector max(Vector a, Vector b) { return _mm256_max_epi16(a, b); }
    static Vector min(Vector a, Vector b) { return _mm256_min_epi16(a, b); }

    static Mask below(Vector a, Vector b) {
      return _mm256_cmpgt_epi16(add(b, set(-0x8000)), add(a, set(-0x8000)));  // the signed comparison is all there is
    }
    static Mask equal(Vector a, Vector b) { return _mm256_cmpeq_epi16(a, b); }
    static Vector count(Mask m, Vector counts) { return _mm256_sub_epi16(counts, m); }
    static int first(Mask m) {
      const auto bytes = static_cast<uint32_t>(_mm256_movemask_epi8(m));
      return bytes ? __builtin_ctz(bytes) / 2 : -1;
    }

    static int64_t sum(Vector x) {
      const __m256i eight = _mm256_madd_epi16(x, set(1));
      __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
      four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
      return _mm_cvtsi128_si32(four) + _mm_extract_epi32(four, 1);
    }
    static int maximum(Vector x) { return ~minimum(_mm256_xor_si256(x, set(-1))); }
    static int minimum(Vector x) {
      const __m128i eight = _mm_min_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
      // The processor finds the smallest of eight unsigned numbers.
      const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-0x8000)));
      return _mm_extract_epi16(smallest, 0) - 0x8000;
    }
  };
};

}  // namespace ugsd::simd
