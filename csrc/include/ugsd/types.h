// Types that every op shares: element types, row layout, vocabulary blocks.
#pragma once

#include <cstddef>
#include <cstdint>

// Functions that do not name an instruction set are inlined into each one's code: the linker keeps a single copy of
// an out-of-line function, and it might be the one compiled for another machine. CUDA kernels call them too.
#define UGSD_ALWAYS_INLINE __attribute__((always_inline))
#ifdef __CUDACC__
#define UGSD_INLINE __host__ __device__ inline UGSD_ALWAYS_INLINE
#else
#define UGSD_INLINE inline UGSD_ALWAYS_INLINE
#endif

namespace ugsd {

// Columns are processed in fixed blocks: a block's sums stay in float32 without losing digits, its data stays
// in L1 between two passes, and results do not depend on how blocks are spread over threads.
constexpr int64_t kBlock = 4096;

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// Calls f with a value of the element type, to take the type from.
template <class F>
auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
    default:
      return f(float{});
  }
}

// Rows of logits: two leading dimensions of any strides (in elements), a contiguous last one.
struct Rows {
  const void* data;
  DType dtype;
  int64_t outer, inner;
  int64_t outer_stride, inner_stride;
  int64_t columns;

  UGSD_INLINE int64_t count() const { return outer * inner; }

  template <class T>
  UGSD_INLINE const T* row(int64_t r) const {
    return static_cast<const T*>(data) + (r / inner) * outer_stride + (r % inner) * inner_stride;
  }
};

// A setting that is one number for all rows, or an array with one a row.
template <class T>
struct PerRow {
  T value;
  const T* rows;

  UGSD_INLINE T operator[](int64_t r) const { return rows ? rows[r] : value; }
};

// Where the statistics of each row go.
struct StatsOut {
  float* logsumexp;
  float* entropy;
  float* max_logit;
  int64_t* argmax;
  float* margin;
};

// Memory of at least `bytes`, aligned to 64, that belongs to the calling thread until it asks again with the
// same `slot`: kernels never allocate on a hot call.
void* scratch(int slot, size_t bytes);

}  // namespace ugsd
