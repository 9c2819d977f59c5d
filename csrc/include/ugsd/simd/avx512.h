// Sixteen lanes: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "ugsd/simd/scalar.h"

namespace ugsd::simd {

struct Avx512 {
  static constexpr int kLanes = 16;
  struct Bytes {
    using Vector = __m512i;
    static constexpr bool kStreams = true;  // stores that leave the caches alone, on aligned addresses
    static void stream(char* p, Vector v) { _mm512_stream_si512(reinterpret_cast<Vector*>(p), v); }
    static void fence() { _mm_sfence(); }
  };
  using Float = __m512;
  using Mask = __mmask16;

  static Float set(float x) { return _mm512_set1_ps(x); }

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Float load(const float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static Float load_partial(const float* p, int n, float fill) {
    if (n >= kLanes) return load(p);
    return _mm512_mask_loadu_ps(set(fill), leading(n), p);
  }
  static Float load_partial(const bfloat16* p, int n, float fill) {
    if (n >= kLanes) return load(p);
    return select(leading(n), widen(_mm256_maskz_loadu_epi16(leading(n), p)), set(fill));
  }
  static Float load_partial(const float16* p, int n, float fill) {
    if (n >= kLanes) return load(p);
    return select(leading(n), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(leading(n), p)), set(fill));
  }

  static void load_pair(const float* p, Float& a, Float& b) {
    a = load(p);
    b = load(p + kLanes);
  }
  static void load_pair(const bfloat16* p, Float& a, Float& b) {
    const __m512i both = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static void load_pair(const float16* p, Float& a, Float& b) {
    a = load(p);
    b = load(p + kLanes);
  }

  static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static void store_partial(float* p, Float x, int n) {
    if (n >= kLanes) return store(p, x);
    _mm512_mask_storeu_ps(p, leading(n), x);
  }

  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }

  static Mask greater(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Mask greater_equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Float select(Mask m, Float yes, Float no) { return _mm512_mask_blend_ps(m, no, yes); }
  static Float add_where(Mask m, Float a, Float b) { return _mm512_mask_add_ps(a, m, a, b); }
  static uint32_t bits(Mask m) { return m; }

  // Compressed in a register and stored whole: compressing stores are microcoded on Zen 4.
  static int compress(float* out, Mask m, Float x) {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(m, x));
    return __builtin_popcount(m);
  }
  static int compress_columns(int32_t* out, Mask m, int32_t first) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, _mm512_add_epi32(lane, _mm512_set1_epi32(first))));
    return __builtin_popcount(m);
  }

  static double sum(Float x) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(high)));
  }
  static float maximum(Float x) { return _mm512_reduce_max_ps(x); }

  // e^x = 2^(N/16) (1 + r + r^2/2) with N = round(16 x log2 e): a table of powers in one register keeps the
  // polynomial short, since the two multiplier ports bound this loop and the look-up runs on others. Its linear
  // coefficient is raised to spread the error of leaving r^3/6 out: 4.3e-7 at most, of either sign.
  struct Exp {
    explicit Exp(float scale)
        : to_steps_(set(scale * (16.0f * kLog2E))),
          step_(set(-0x1.62e43p-5f / scale)),
          linear_(set(scale * 1.0000587f)),
          quadratic_(set(0.5f * scale * scale)),
          powers_(_mm512_load_si512(kPowers)) {}
    Float operator()(Float d) const {
      const Float magic = set(0x1.8p23f);  // makes the sum's low bits the integer N
      const Float t = fma(d, to_steps_, magic);
      const Float r = fma(sub(t, magic), step_, d);
      const Float p = fma(fma(r, quadratic_, linear_), r, set(1.0f));
      const __m512i n = _mm512_castps_si512(t);
      // The table holds 2^(k/16) less k << 19, so that adding N << 19 = (n << 23) + (k << 19) scales it by 2^n.
      const __m512i power = _mm512_permutexvar_epi32(n, powers_);
      return mul(p, _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(n, 19))));
    }

   private:
    alignas(64) static constexpr uint32_t kPowers[16] = {
        0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
        0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
    Float to_steps_, step_, linear_, quadratic_;
    __m512i powers_;
  };

  // e = p(r) 2^(N/16) with N = round(16 y) and the square completed: p = c2 ((r + h)^2 + g). y carries h from the
  // start, so that r + h = (y + h) - N/16 and p is one multiply-add. `scalef` takes what underflows to 0; masked
  // columns come out as NaN.
  struct Exp2 {
    Exp2(float octaves, float reference)
        : octaves_(octaves), rounded_(std::nearbyint(reference * octaves * 16) * 0.0625f), shifted_(kH - rounded_) {}
    bool exact() const { return std::fabs(rounded_) < 0x1p17f; }
    double reference() const { return (kExactH - shifted_) / octaves_; }
    static double offset() { return kExactH; }
    Float operator()(Float z, Float& y) const {
      Float power;
      const Float p = split(z, y, power);
      return mul(p, power);
    }
    Float masked(Float z) const {
      Float y;
      return max((*this)(z, y), set(0));
    }
    Float add(Float total, Float z) const {
      Float y, power;
      const Float p = split(z, y, power);
      return fma(p, power, total);
    }

   private:
    // Fitted to 2^r on [-1/32, 1/32]: 4.2e-7 at most, of either sign.
    static constexpr double kExactH = 1.4427797270878637, kC2 = 0.2402265069591007;
    static constexpr float kH = static_cast<float>(kExactH), kG = static_cast<float>(1 / kC2 - kExactH * kExactH);
    static constexpr float kMagic = 0x1.8p19f;  // its last bit is worth 1/16

    Float split(Float z, Float& y, Float& power) const {
      y = fma(z, set(octaves_), set(shifted_));
      const Float t = fma(z, set(octaves_), set(kMagic - rounded_));
      const Float n = sub(t, set(kMagic)), r = sub(y, n);
      power = _mm512_scalef_ps(_mm512_permutexvar_ps(_mm512_castps_si512(t), _mm512_load_ps(kPowers)), n);
      return fma(r, r, set(kG));
    }

    // c2 2^(k/16)
    alignas(64) static constexpr float kPowers[16] = {0x1.ebfbep-3f,  0x1.00e208p-2f, 0x1.0c419p-2f,  0x1.182202p-2f,
                                                      0x1.24890ep-2f, 0x1.317caep-2f, 0x1.3f0318p-2f, 0x1.4d22cep-2f,
                                                      0x1.5be298p-2f, 0x1.6b498ep-2f, 0x1.7b5f16p-2f, 0x1.8c2aeap-2f,
                                                      0x1.9db51ep-2f, 0x1.b0061ep-2f, 0x1.c326b6p-2f, 0x1.d7201ap-2f};
    float octaves_, rounded_, shifted_;
  };

  // Thirty-two signed lanes: bfloat16 and float16 as they are stored.
  struct Short {
    static constexpr int kLanes = 32;
    using Vector = __m512i;
    using Mask = __mmask32;

    static Vector set(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }

    template <class T>
    static Vector load(const T* p) {
      return _mm512_loadu_si512(p);
    }
    template <class T>
    static Vector load_partial(const T* p, int n, int fill) {
      if (n >= kLanes) return load(p);
      return _mm512_mask_loadu_epi16(set(fill), (1u << n) - 1, p);
    }

    static Vector add(Vector a, Vector b) { return _mm512_add_epi16(a, b); }
    static Vector both(Vector a, Vector b) { return _mm512_and_si512(a, b); }
    static Vector max(Vector a, Vector b) { return _mm512_max_epi16(a, b); }
    static Vector min(Vector a, Vector b) { return _mm512_min_epi16(a, b); }

    static Mask below(Vector a, Vector b) { return _mm512_cmplt_epu16_mask(a, b); }
    static Mask equal(Vector a, Vector b) { return _mm512_cmpeq_epi16_mask(a, b); }
    static Vector count(Mask m, Vector counts) { return _mm512_mask_sub_epi16(counts, m, counts, set(-1)); }
    static int first(Mask m) { return m ? __builtin_ctz(m) : -1; }

    static int64_t sum(Vector x) { return _mm512_reduce_add_epi32(_mm512_madd_epi16(x, set(1))); }
    static int maximum(Vector x) { return ~minimum(_mm512_xor_si512(x, set(-1))); }
    static int minimum(Vector x) {
      const __m256i half = _mm256_min_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
      const __m128i eight = _mm_min_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
      // The processor finds the smallest of eight unsigned numbers.
      const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-0x8000)));
      return _mm_extract_epi16(smallest, 0) - 0x8000;
    }
  };

 private:
  static __mmask16 leading(int n) { return static_cast<__mmask16>(n >= kLanes ? 0xffff : n <= 0 ? 0 : (1u << n) - 1); }
  static Float widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
};

}  // namespace ugsd::simd
