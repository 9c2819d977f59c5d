// What every CUDA kernel stands on: lanes of a warp, 16-byte loads, one exponential, launches, workspaces.
//
// A warp takes one piece of a row, 1024 columns, and no two warps share memory while they read: a row is spread over as
// many multiprocessors as it has pieces, and whoever arrives last merges them. Nothing needs more than compute
// capability 7.5.
#pragma once

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ugsd/cuda/launch.h"
#include "ugsd/types.h"

namespace ugsd::cuda {

constexpr int kLanes = 32;
constexpr int kPiece = 1024;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int kNoColumn = std::numeric_limits<int>::max();

__device__ inline int lane() { return static_cast<int>(threadIdx.x % kLanes); }

UGSD_INLINE int pieces_of(int64_t columns) { return static_cast<int>((columns + kPiece - 1) / kPiece); }

// Runs kernel(args...) on enough blocks of `threads` for one thread an item.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const Launch& on, int64_t items, int threads, const Args&... args) {
  if (items == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((items + threads - 1) / threads));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = on.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// The same with one warp an item. Few warps go one a block, to be on as many multiprocessors as there are. Kernels are
// compiled for kBlocksPerMultiprocessor blocks of kThreads at least: 128 registers a thread.
constexpr int kThreads = 4 * kLanes, kBlocksPerMultiprocessor = 4;

template <class... Parameters, class... Args>
void launch_warps(void (*kernel)(Parameters...), const Launch& on, int64_t warps, const Args&... args) {
  constexpr int64_t kFew = 1024;
  launch(kernel, on, warps * kLanes, warps <= kFew ? kLanes : kThreads, args...);
}

// The number of this warp among those of the grid.
__device__ inline int64_t warp_number() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
}

template <class T>
__device__ T sum_lanes(T x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ inline float max_lanes(float x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ inline int min_lanes(int x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x = min(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// The sum of this lane and those before it.
template <class T>
__device__ T running_sum(T x) {
  for (int step = 1; step < kLanes; step *= 2) {
    const T other = __shfl_up_sync(kAllLanes, x, step);
    if (lane() >= step) x += other;
  }
  return x;
}

// Whether this warp is the last of `total` to arrive, which then sees what the others wrote. The counter ends at zero.
__device__ inline bool last_to_arrive(unsigned* counter, unsigned total) {
  __threadfence();
  __syncwarp();
  unsigned before = 0;
  if (lane() == 0) {
    before = atomicAdd(counter, 1u);
    if (before + 1 == total) *counter = 0;
  }
  before = __shfl_sync(kAllLanes, before, 0);
  __threadfence();
  return before + 1 == total;
}

// 2^x; 0 under 2^-126.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0 : std::exp2(x);
#endif
}

__device__ inline float float_of_bits(unsigned bits) { return __uint_as_float(bits); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return float_of_bits(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float to_float(float16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const unsigned sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000u | magnitude << 13);
  return float_of_bits(sign | magnitude << 13) * 0x1p112f;
#endif
}

// The columns of 16 bytes.
template <class T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

__device__ inline void unpack(const uint4& v, float (&x)[4], float) {
  x[0] = float_of_bits(v.x);
  x[1] = float_of_bits(v.y);
  x[2] = float_of_bits(v.z);
  x[3] = float_of_bits(v.w);
}
template <class T>
__device__ void unpack(const uint4& v, float (&x)[8], T) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = to_float(T{static_cast<uint16_t>(words[i] & 0xffff)});
    x[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
  }
}

// x[i] = value without an index into registers.
template <int kCount, class T>
__device__ void place(T (&x)[kCount], int i, T value) {
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    if (k == i) x[k] = value;
}

// One logit as all ops read it: NaN is masked, +inf is the largest number.
__device__ inline float cleaned(float x) { return fminf(fmaxf(x, -kInfinity), kLargest); }

template <class T>
__device__ float logit(const T* row, int64_t column) {
  return cleaned(to_float(row[column]));
}

// 1 / T, where T = 0, the greedy limit, reads as 1.
__device__ inline float inverse_temperature(float t) {
  if (!(t > 0)) return 1.0f;
  return fminf(1.0f / t, kLargest);
}

// Octaves a logit: e^(z / T) = 2^(octaves z). Beyond these scales all columns but the maximum vanish, or all count the
// same.
__device__ inline float octaves_of(float scale) {
  return static_cast<float>(fminf(fmaxf(scale, 1e-18f), 1e18f) * 1.4426950408889634);
}

// e^((x - reference) / T) of x that is `reference` at most, 0 for masked columns; d is the difference, clamped there.
struct Exponential {
  float reference, octaves, lowest;

  __device__ Exponential(float reference, float octaves)
      : reference(reference), octaves(octaves), lowest(-150.0f / octaves) {}

  __device__ float operator()(float x, float& d) const {
    d = fmaxf(x - reference, lowest);  // NaN, too
    return exp2_fast(d * octaves);
  }
  __device__ float operator()(float x) const {
    float d;
    return (*this)(x, d);
  }
};

}  // namespace ugsd::cuda
