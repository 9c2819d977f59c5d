// A piece of a row: 1024 columns at most, all read at once by one warp, 16 bytes a lane in turn.
//
// Which lane takes a column depends on the column alone, so that a row's results have the same bits wherever it lies.
// Where rows do not start at a boundary of 16 bytes, a lane's 16 bytes are cut out of two aligned ones. Only the ends
// of a row are read column by column: nothing outside it is ever touched.
#pragma once

#include "ugsd/cuda/device.h"

namespace ugsd::cuda {

// Bytes between a boundary of 16 and the row.
template <class T>
__device__ int misalignment(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16);
}

// Whether the vector that starts at a column, a multiple of its width, can be read by aligned loads inside the row.
template <class T>
__device__ bool is_whole(const T* row, int columns, int column) {
  constexpr int kSize = static_cast<int>(sizeof(T));
  const int past = misalignment(row) / kSize;
  return past == 0 ? column + kWidth<T> <= columns : column > 0 && column + 2 * kWidth<T> - past <= columns;
}

template <class T>
__device__ uint4 load_aligned(const T* row, int column) {
  return *reinterpret_cast<const uint4*>(row + column);
}

template <class T>
__device__ uint4 load_misaligned(const T* row, int column, int past) {
  const uint4* chunks = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(row + column) - past);
  const uint4 a = chunks[0], b = chunks[1];
  unsigned words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int step = 1; step <= 2; step *= 2)
#pragma unroll
    for (int i = 0; i + step < 8; ++i) words[i] = past / 4 & step ? words[i + step] : words[i];
  const int bits = past % 4 * 8;
  return make_uint4(__funnelshift_r(words[0], words[1], bits), __funnelshift_r(words[1], words[2], bits),
                    __funnelshift_r(words[2], words[3], bits), __funnelshift_r(words[3], words[4], bits));
}

// Sixteen bytes of masked columns.
template <class T>
__device__ uint4 masked_vector() {
  const unsigned word = sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, bfloat16> ? 0xff80ff80u : 0xfc00fc00u;
  return make_uint4(word, word, word, word);
}

__device__ inline unsigned bits_of(float x) { return __float_as_uint(x); }
template <class T>
__device__ unsigned bits_of(T x) {
  return x.bits;
}

// The vector at an end of the row, column by column; masked past the end.
template <class T>
__device__ uint4 load_edge(const T* row, int columns, int column) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T)), kBits = 32 / kPerWord;
  const uint4 masked = masked_vector<T>();
  unsigned words[4] = {masked.x, masked.y, masked.z, masked.w};
#pragma unroll
  for (int k = 0; k < kWidth<T>; ++k) {
    if (column + k >= columns) continue;
    const int shift = k % kPerWord * kBits;
    const unsigned mask = (kBits == 32 ? 0xffffffffu : 0xffffu) << shift;
    words[k / kPerWord] = (words[k / kPerWord] & ~mask) | bits_of(row[column + k]) << shift;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The vector of columns that starts at a multiple of its width, masked past the row's end.
template <class T>
__device__ void load(const T* row, int columns, int column, float (&x)[kWidth<T>]) {
  const int past = misalignment(row);
  uint4 vector;
  if (!is_whole(row, columns, column))
    vector = load_edge(row, columns, column);
  else if (past == 0)
    vector = load_aligned(row, column);
  else
    vector = load_misaligned(row, column, past);
  unpack(vector, x, T{});
}

// Writes those of the columns that are in the row.
template <int kColumns>
__device__ void store(float* row, int columns, int column, const float (&x)[kColumns]) {
  float* to = row + column;
  if (misalignment(row) == 0 && column + kColumns <= columns) {
#pragma unroll
    for (int k = 0; k < kColumns; k += 4)
      *reinterpret_cast<float4*>(to + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
  } else {
#pragma unroll
    for (int k = 0; k < kColumns; ++k)
      if (column + k < columns) to[k] = x[k];
  }
}

// How a piece is shared out, for the steps of every lane.
template <class T>
struct Split {
  static constexpr int kSteps = kPiece / kWidth<T> / kLanes;

  int first, columns;  // of the piece, of the row

  __device__ Split(int64_t columns, int64_t piece)
      : first(static_cast<int>(piece * kPiece)), columns(static_cast<int>(columns)) {}
  __device__ int column(int step) const { return first + (step * kLanes + lane()) * kWidth<T>; }
  __device__ bool has(int step) const { return column(step) < columns; }
};

// The logits of a piece in registers, -inf where a lane has none.
template <class T>
class Piece {
 public:
  __device__ Piece(const T* row, int64_t columns, int64_t piece) : split_(columns, piece) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) vectors_[i] = masked_vector<T>();
    const int past = misalignment(row);
    if (past == 0) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
        if (is_whole(row, split_.columns, split_.column(i))) vectors_[i] = load_aligned(row, split_.column(i));
    } else {
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
        if (is_whole(row, split_.columns, split_.column(i))) vectors_[i] = load_misaligned(row, split_.column(i), past);
    }
    // At most the first vector and the last two are not whole.
    const int last = (min(split_.columns - split_.first, kPiece) - 1) / kWidth<T>;
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
      const int vector = k == 0 ? last : k == 1 ? last - 1 : 0, column = split_.first + vector * kWidth<T>;
      if (vector < 0 || is_whole(row, split_.columns, column)) continue;
      if (lane() != vector % kLanes) continue;
      const uint4 edge = load_edge(row, split_.columns, column);
      place(vectors_, vector / kLanes, edge);
    }
  }

  // Calls f(logit, its column) for all columns of this lane, from the last to the first.
  template <class F>
  __device__ void backwards(const F& f) const {
#pragma unroll
    for (int i = kSteps - 1; i >= 0; --i) {
      const int column = split_.column(i);
      float x[kWidth<T>];
      unpack(vectors_[i], x, T{});
#pragma unroll
      for (int k = kWidth<T> - 1; k >= 0; --k) f(x[k], column + k);
    }
  }

 private:
  static constexpr int kSteps = Split<T>::kSteps;

  Split<T> split_;
  uint4 vectors_[kSteps];
};

// Draws from a piece whose columns have a mass each: mass(column, e) fills in those of a vector, 0 past the row's end.
//
// Returns the first column whose running mass exceeds `target`, in column order. Rounding that pushes the target past
// the end lands on the last column with mass; -1 where there is none.
template <class T, class Mass>
__device__ int draw_column(const Split<T>& split, double target, const Mass& mass) {
  float sums[Split<T>::kSteps];
#pragma unroll 2
  for (int i = 0; i < Split<T>::kSteps; ++i) {
    float e[kWidth<T>], sum = 0;
    if (split.has(i)) {
      mass(split.column(i), e);
#pragma unroll
      for (int k = 0; k < kWidth<T>; ++k) sum += e[k];
    }
    place(sums, i, sum);
  }
  float before = 0;
  int step = -1, owner = 0;  // where the draw falls, or else the last with mass
  float left = kInfinity;    // what is left to go in the owner's vector
  bool found = false;
#pragma unroll
  for (int i = 0; i < Split<T>::kSteps; ++i) {
    const float running = running_sum(sums[i]);
    const unsigned positive = __ballot_sync(kAllLanes, sums[i] > 0);
    const unsigned over = __ballot_sync(kAllLanes, sums[i] > 0 && before + running > target);
    if (!found && positive) {
      found = over != 0;
      step = i;
      owner = found ? __ffs(over) - 1 : 31 - __clz(positive);
      if (found) left = static_cast<float>(target - (before + (running - sums[i])));
    }
    before += __shfl_sync(kAllLanes, running, kLanes - 1);
  }
  if (step < 0) return -1;
  int column = 0;
  if (lane() == owner) {
    float e[kWidth<T>];
    mass(split.column(step), e);
    bool past = false;
#pragma unroll
    for (int k = 0; k < kWidth<T>; ++k) {
      if (past || !(e[k] > 0)) continue;
      column = split.column(step) + k;
      left -= e[k];
      past = left < 0;
    }
  }
  return __shfl_sync(kAllLanes, column, owner);
}

}  // namespace ugsd::cuda
