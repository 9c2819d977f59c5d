// A piece of a row: 1024 columns at most, all read at once by one warp.
#pragma once

#include <type_traits>

#include "ugsd/cuda/device.h"

namespace ugsd::cuda {

// How a piece is shared out: some first columns up to a boundary of 16 bytes, one a lane; vectors of 16 bytes in turn;
// what is left, one a lane.
template <class T>
struct Split {
  static constexpr int kVectors = kPiece / kWidth<T> / kLanes;  // a lane

  int first, body, vectors, tail, end;  // columns of the row, but for the number of vectors

  __device__ Split(const T* row, int64_t columns, int64_t piece) {
    first = static_cast<int>(piece * kPiece);
    end = static_cast<int>(columns - first < kPiece ? columns : first + kPiece);
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row + first) % 16 / sizeof(T));
    body = min(end, first + (past ? kWidth<T> - past : 0));
    vectors = (end - body) / kWidth<T>;
    tail = body + vectors * kWidth<T>;
  }
  __device__ bool has_head() const { return lane() < body - first; }
  __device__ bool has_vector(int i) const { return i * kLanes + lane() < vectors; }
  __device__ bool has_tail() const { return lane() < end - tail; }
  __device__ int vector_column(int i) const { return body + (i * kLanes + lane()) * kWidth<T>; }
};

// The logits of a piece in registers, -inf where a lane has none.
template <class T>
class Piece {
 public:
  using Parts = Split<T>;

  __device__ Piece(const T* row, int64_t columns, int64_t piece) : split_(row, columns, piece) {
#pragma unroll
    for (int i = 0; i < Parts::kVectors; ++i) {
      vectors_[i] = masked();
      if (split_.has_vector(i)) vectors_[i] = *reinterpret_cast<const uint4*>(row + split_.vector_column(i));
    }
    head_ = split_.has_head() ? to_float(row[split_.first + lane()]) : -kInfinity;
    tail_ = split_.has_tail() ? to_float(row[split_.tail + lane()]) : -kInfinity;
  }

  // Calls f(logit, its column) for all columns of this lane, from the last to the first.
  template <class F>
  __device__ void backwards(const F& f) const {
    f(tail_, split_.tail + lane());
#pragma unroll
    for (int i = Parts::kVectors - 1; i >= 0; --i) {
      const int column = split_.vector_column(i);
      float x[kWidth<T>];
      unpack(vectors_[i], x, T{});
#pragma unroll
      for (int k = kWidth<T> - 1; k >= 0; --k) f(x[k], column + k);
    }
    f(head_, split_.first + lane());
  }

 private:
  __device__ static uint4 masked() {
    const unsigned word = sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, bfloat16> ? 0xff80ff80u : 0xfc00fc00u;
    return make_uint4(word, word, word, word);
  }

  Parts split_;
  uint4 vectors_[Parts::kVectors];
  float head_, tail_;
};

// kColumns columns from an address of any alignment.
template <int kColumns, class T>
__device__ void load(const T* from, float (&x)[kColumns]) {
  constexpr int kBytes = kColumns * static_cast<int>(sizeof(T));
  if (kBytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      float part[kWidth<T>];
      unpack(reinterpret_cast<const uint4*>(from)[i], part, T{});
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) x[(i * kWidth<T> + k) % kColumns] = part[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[k] = to_float(from[k]);
  }
}

template <int kColumns>
__device__ void store(float* to, const float (&x)[kColumns]) {
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
    for (int k = 0; k < kColumns; k += 4)
      *reinterpret_cast<float4*>(to + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
  } else {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) to[k] = x[k];
  }
}

// Draws from a piece whose columns have a mass each: mass(column, e) fills in those of some columns.
//
// Returns the first column of the piece whose running mass exceeds `target`, in column order. Rounding that pushes the
// target past the end lands on the last column with mass; -1 where there is none.
template <class T, class Mass>
__device__ int draw_column(const Split<T>& split, double target, const Mass& mass) {
  constexpr int kCount = Split<T>::kVectors;
  // The lane's part of the head, of each vector, and of the tail.
  float sums[kCount + 2];
  float one[1];
  const auto single = [&](bool present, int column) {
    if (!present) return 0.0f;
    mass(column, one);
    return one[0];
  };
  sums[0] = single(split.has_head(), split.first + lane());
  sums[kCount + 1] = single(split.has_tail(), split.tail + lane());
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[i + 1] = 0;
    if (split.has_vector(i)) {
      float e[kWidth<T>];
      mass(split.vector_column(i), e);
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) sums[i + 1] += e[k];
    }
  }
  float before = 0;
  int part = -1, owner = 0;  // where the draw falls, or else the last with mass
  float left = kInfinity;    // what is left to go in the owner's part
  bool found = false;
#pragma unroll
  for (int i = 0; i < kCount + 2; ++i) {
    const float running = running_sum(sums[i]);
    const unsigned positive = __ballot_sync(kAllLanes, sums[i] > 0);
    const unsigned over = __ballot_sync(kAllLanes, sums[i] > 0 && before + running > target);
    if (!found && positive) {
      found = over != 0;
      part = i;
      owner = found ? __ffs(over) - 1 : 31 - __clz(positive);
      if (found) left = static_cast<float>(target - (before + (running - sums[i])));
    }
    before += __shfl_sync(kAllLanes, running, kLanes - 1);
  }
  if (part < 0) return -1;
  int column = part == 0 ? split.first + lane() : split.tail + lane();
  if (lane() == owner && part > 0 && part <= kCount) {
    const int first = split.vector_column(part - 1);
    float e[kWidth<T>];
    mass(first, e);
    bool past = false;
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) {
      if (past || !(e[k] > 0)) continue;
      column = first + k;
      left -= e[k];
      past = left < 0;
    }
  }
  return __shfl_sync(kAllLanes, column, owner);
}

}  // namespace ugsd::cuda
