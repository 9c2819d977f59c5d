// One lane, plain C++: the portable instruction set and the plainest statement of what the others must compute.
#pragma once

#include <cstring>

#include "ugsd/types.h"

namespace ugsd::simd {

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float to_float(float x) { return x; }

static inline float to_float(bfloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

static inline float to_float(float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | magnitude << 13);
  // The exponent is rebiased by a multiplication, which also normalises subnormals.
  return bits_to_float(sign | magnitude << 13) * 0x1p112f;
}

// 2^r on [-1/2, 1/2], relative error 9.2e-8, exactly 1 at 0.
constexpr float kExp2[5] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
constexpr float kLog2E = 0x1.715476p+0f;

// Exponents are clamped here: e^-87 is the smallest normal float32, and nothing beside a maximum of 1.
constexpr float kLowest = -87.0f;

// Memory as it is copied.
struct Bytes16 {
  typedef char Vector __attribute__((vector_size(16)));
  static constexpr bool kStreams = false;
};

struct Scalar {
  static constexpr int kLanes = 1;
  using Bytes = Bytes16;
  using Float = float;
  using Mask = bool;

  static Float set(float x) { return x; }

  template <class T>
  static Float load(const T* p) {
    return to_float(*p);
  }

  // Lanes from `n` on hold `fill`.
  template <class T>
  static Float load_partial(const T* p, int n, float fill) {
    return n > 0 ? to_float(*p) : fill;
  }

  // 2 * kLanes elements in any order, for sums and maxima.
  template <class T>
  static void load_pair(const T* p, Float& a, Float& b) {
    a = to_float(p[0]);
    b = to_float(p[1]);
  }

  static void store(float* p, Float x) { *p = x; }
  static void store_partial(float* p, Float x, int n) {
    if (n > 0) *p = x;
  }

  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float div(Float a, Float b) { return a / b; }
  static Float fma(Float a, Float b, Float c) { return a * b + c; }

  // The second operand where either is NaN.
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float min(Float a, Float b) { return a < b ? a : b; }

  static Mask greater(Float a, Float b) { return a > b; }
  static Mask greater_equal(Float a, Float b) { return a >= b; }
  static Mask equal(Float a, Float b) { return a == b; }
  static Float select(Mask m, Float yes, Float no) { return m ? yes : no; }
  static Float add_where(Mask m, Float a, Float b) { return m ? a + b : a; }
  static uint32_t bits(Mask m) { return m; }

  // Writes the lanes of `m` next to each other; up to kLanes places of `out` may be overwritten.
  static int compress(float* out, Mask m, Float x) {
    *out = x;
    return m;
  }
  // The same for the lanes' column numbers `first`, `first + 1`, ...
  static int compress_columns(int32_t* out, Mask m, int32_t first) {
    *out = first;
    return m;
  }

  static double sum(Float x) { return x; }
  static float maximum(Float x) { return x; }

  // 2^(r + n)
  static Float power(Float r, Float n) {
    float p = kExp2[4];
    for (int i = 3; i >= 0; --i) p = p * r + kExp2[i];
    return (p * r + 1.0f) * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  }

  // The nearest integer.
  static Float round(Float y) { return (y + 0x1.8p23f) - 0x1.8p23f; }

  // e^(d * scale) for d * scale in [kLowest, 0].
  struct Exp {
    explicit Exp(float scale) : scale_(scale * kLog2E) {}
    Float operator()(Float d) const {
      const float y = d * scale_, n = round(y);
      return power(y - n, n);
    }

   private:
    float scale_;
  };

  // e = 2^y for y = octaves (z - reference) near 0 at most; masked columns come out as 2^-126, +inf as 2^126.
  struct Exp2 {
    Exp2(float octaves, float reference) : octaves_(octaves), reference_(reference) {}

    // Whether the reference is one that it can work with.
    bool exact() const { return true; }
    double reference() const { return reference_; }
    // y comes out with this added.
    static double offset() { return 0; }

    Float operator()(Float z, Float& y) const {
      y = min(126, max((z - reference_) * octaves_, -126));
      const float n = round(y);
      return power(y - n, n);
    }
    // e, exactly 0 for masked columns and what is far too small.
    Float masked(Float z) const {
      float y;
      const float e = (*this)(z, y);
      return y > -126 ? e : 0;
    }
    // total + e
    Float add(Float total, Float z) const {
      float y;
      return total + (*this)(z, y);
    }

   private:
    float octaves_, reference_;
  };

  // Other instruction sets compare 16-bit numbers as they are stored, in signed lanes; this one makes floats of them.
  // `both` is the bitwise and, `below` compares as unsigned, `count` adds 1 where the mask is set, `first` is a mask's
  // first lane or -1.
  using Short = void;
};

// Exp2 of the instruction sets that fuse a multiplication and an addition.
template <class S>
class FusedExp2 {
 public:
  using Float = typename S::Float;

  FusedExp2(float octaves, float reference)
      : octaves_(octaves), shift_(reference * octaves), slope_(S::set(octaves)), shifts_(S::set(-shift_)) {}
  bool exact() const { return true; }
  double reference() const { return shift_ / octaves_; }
  static double offset() { return 0; }

  Float operator()(Float z, Float& y) const {
    y = S::min(S::set(kHighest), S::max(S::fma(z, slope_, shifts_), S::set(-kHighest)));
    const Float n = S::round(y);
    return S::power(S::sub(y, n), n);
  }
  Float masked(Float z) const {
    Float y;
    const Float e = (*this)(z, y);
    return S::select(S::greater(y, S::set(-kHighest)), e, S::set(0));
  }
  Float add(Float total, Float z) const {
    Float y;
    return S::add(total, (*this)(z, y));
  }

 private:
  static constexpr float kHighest = 126;

  double octaves_;
  float shift_;
  Float slope_, shifts_;
};

}  // namespace ugsd::simd
