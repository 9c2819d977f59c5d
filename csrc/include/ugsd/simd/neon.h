// Four lanes: AArch64 NEON.
#pragma once

#include <arm_neon.h>

#include "ugsd/simd/scalar.h"

namespace ugsd::simd {

struct Neon {
  static constexpr int kLanes = 4;
  using Bytes = Bytes16;
  using Float = float32x4_t;
  using Mask = uint32x4_t;

  static Float set(float x) { return vdupq_n_f32(x); }

  static Float load(const float* p) { return vld1q_f32(p); }
  static Float load(const bfloat16* p) { return widen(vld1_u16(&p->bits)); }
  static Float load(const float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }

  template <class T>
  static Float load_partial(const T* p, int n, float fill) {
    if (n >= kLanes) return load(p);
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
    return vld1q_f32(lanes);
  }

  static void load_pair(const float* p, Float& a, Float& b) {
    a = load(p);
    b = load(p + kLanes);
  }
  static void load_pair(const bfloat16* p, Float& a, Float& b) {
    const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
    a = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
    b = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000u)));
  }
  static void load_pair(const float16* p, Float& a, Float& b) {
    a = load(p);
    b = load(p + kLanes);
  }

  static void store(float* p, Float x) { vst1q_f32(p, x); }
  static void store_partial(float* p, Float x, int n) {
    if (n >= kLanes) return store(p, x);
    float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }

  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float sub(Float a, Float b) { return vsubq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float div(Float a, Float b) { return vdivq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }

  // The second operand where either is NaN: the hardware's own maximum would return NaN.
  static Float max(Float a, Float b) { return select(greater(a, b), a, b); }
  static Float min(Float a, Float b) { return select(greater(b, a), a, b); }

  static Mask greater(Float a, Float b) { return vcgtq_f32(a, b); }
  static Mask greater_equal(Float a, Float b) { return vcgeq_f32(a, b); }
  static Mask equal(Float a, Float b) { return vceqq_f32(a, b); }
  static Float select(Mask m, Float yes, Float no) { return vbslq_f32(m, yes, no); }
  static Float add_where(Mask m, Float a, Float b) {
    return vaddq_f32(a, vreinterpretq_f32_u32(vandq_u32(m, vreinterpretq_u32_f32(b))));
  }
  static uint32_t bits(Mask m) {
    const uint32_t weights[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, vld1q_u32(weights)));
  }

  static int compress(float* out, Mask m, Float x) {
    float lanes[kLanes];
    store(lanes, x);
    int count = 0;
    for (uint32_t left = bits(m); left; left &= left - 1) out[count++] = lanes[__builtin_ctz(left)];
    return count;
  }
  static int compress_columns(int32_t* out, Mask m, int32_t first) {
    int count = 0;
    for (uint32_t left = bits(m); left; left &= left - 1) out[count++] = first + __builtin_ctz(left);
    return count;
  }

  static double sum(Float x) { return vaddvq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x))); }
  static float maximum(Float x) { return vmaxvq_f32(x); }

  // 2^(r + n): adding n to the exponent field multiplies by 2^n, as p is near 1 and n at least -126.
  static Float power(Float r, Float n) {
    Float p = set(kExp2[4]);
    for (int i = 3; i >= 0; --i) p = fma(p, r, set(kExp2[i]));
    p = fma(p, r, set(1.0f));
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtq_s32_f32(n), 23)));
  }

  // The nearest integer.
  static Float round(Float y) { return vrndnq_f32(y); }

  struct Exp {
    explicit Exp(float scale) : scale_(vdupq_n_f32(scale * kLog2E)) {}
    Float operator()(Float d) const {
      const Float y = mul(d, scale_), n = round(y);
      const Float r = fma(d, scale_, vnegq_f32(n));  // y's own rounding does not reach r
      return power(r, n);
    }

   private:
    Float scale_;
  };

  using Exp2 = FusedExp2<Neon>;

  // Eight signed lanes: bfloat16 and float16 as they are stored.
  struct Short {
    static constexpr int kLanes = 8;
    using Vector = int16x8_t;
    using Mask = uint16x8_t;

    static Vector set(int x) { return vdupq_n_s16(static_cast<int16_t>(x)); }

    template <class T>
    static Vector load(const T* p) {
      return vreinterpretq_s16_u16(vld1q_u16(&p->bits));
    }
    template <class T>
    static Vector load_partial(const T* p, int n, int fill) {
      if (n >= kLanes) return load(p);
      T lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : T{static_cast<uint16_t>(fill)};
      return load(lanes);
    }

    static Vector add(Vector a, Vector b) { return vaddq_s16(a, b); }
    static Vector both(Vector a, Vector b) { return vandq_s16(a, b); }
    static Vector max(Vector a, Vector b) { return vmaxq_s16(a, b); }
    static Vector min(Vector a, Vector b) { return vminq_s16(a, b); }

    static Mask below(Vector a, Vector b) { return vcltq_u16(vreinterpretq_u16_s16(a), vreinterpretq_u16_s16(b)); }
    static Mask equal(Vector a, Vector b) { return vceqq_s16(a, b); }
    static Vector count(Mask m, Vector counts) { return vsubq_s16(counts, vreinterpretq_s16_u16(m)); }
    static int first(Mask m) {
      const uint64_t bytes = vget_lane_u64(vreinterpret_u64_u8(vmovn_u16(m)), 0);
      return bytes ? __builtin_ctzll(bytes) / 8 : -1;
    }

    static int64_t sum(Vector x) { return vaddlvq_s16(x); }
    static int maximum(Vector x) { return vmaxvq_s16(x); }
    static int minimum(Vector x) { return vminvq_s16(x); }
  };

 private:
  static Float widen(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
};

}  // namespace ugsd::simd
