// The copying of kv_compact, in the widest stores that an instruction set has: a store buffer holds stores, not bytes.
#pragma once

#include <cstring>

#include "ugsd/kv_compact.h"

namespace ugsd {
namespace detail {

// Rows are asked for this long before their turn, enough to keep all of a core's outstanding misses busy. The gaps
// between kept slots throw the hardware's own prefetch off.
constexpr int64_t kAheadBytes = 8192, kMaxAheadSteps = 64, kLineBytes = 64;

template <class B, bool kStream>
UGSD_INLINE void copy_row(char* target, const char* source, int64_t bytes) {
  constexpr int64_t kSize = sizeof(typename B::Vector), kParts = kLineBytes / kSize;
  int64_t i = 0;
  for (; i + kLineBytes <= bytes; i += kLineBytes) {
    typename B::Vector v[kParts];
    std::memcpy(v, source + i, sizeof v);
    if constexpr (kStream) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < kParts; ++k) B::stream(target + i + k * kSize, v[k]);
    } else {
      std::memcpy(target + i, v, sizeof v);
    }
  }
  for (; i + kSize <= bytes; i += kSize) {
    typename B::Vector v;
    std::memcpy(&v, source + i, kSize);
    std::memcpy(target + i, &v, kSize);
  }
  for (; i < bytes; ++i) target[i] = source[i];
}

// One head of one sequence after another, in all tensors of a range.
struct Heads {
  const KvTensor *tensor, *end;
  int64_t b, head;

  UGSD_INLINE char* base() const { return tensor->data + b * tensor->batch_stride + head * tensor->head_stride; }

  UGSD_INLINE bool next() {
    if (++head < tensor->heads) return true;
    head = 0;
    return ++tensor != end;
  }
};

// `kBytes` is the length of a row, or 0 for any.
template <class B, int64_t kBytes>
void move_rows(const KvTensor* tensors, const KvTensor* end, int64_t b, const KvMoves& moves) {
  const int64_t bytes = kBytes ? kBytes : tensors->row_bytes;
  const KvStep* steps = moves.steps;

  // The steps to come, across the ends of heads and tensors; the very last one is asked for again and again.
  Heads ahead{tensors, end, b, 0};
  const char* ahead_base = ahead.base();
  int64_t ahead_stride = tensors->slot_stride, ahead_step = 0;
  bool more = true;
  const auto fetch = [&]() UGSD_ALWAYS_INLINE {
    const char* source = ahead_base + steps[ahead_step].source * ahead_stride;
    const char* fetched = ahead_base + steps[ahead_step].fetched * ahead_stride;
    for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(source + i, 0, 2);  // L2: L1 has fewer misses
    for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(fetched + i, 0, 2);
    if (ahead_step + 1 < moves.count) {
      ++ahead_step;
    } else if (more && (more = ahead.next())) {
      ahead_base = ahead.base();
      ahead_stride = ahead.tensor->slot_stride;
      ahead_step = 0;
    }
  };
  int64_t lead = kAheadBytes / bytes;
  lead = lead < 1 ? 1 : lead > kMaxAheadSteps ? kMaxAheadSteps : lead;
  for (int64_t i = 0; i < lead; ++i) fetch();

  Heads heads{tensors, end, b, 0};
  do {
    const int64_t stride = heads.tensor->slot_stride;
    char* base = heads.base();
    char* target = base + moves.target * stride;
    for (int64_t i = 0; i < moves.count; ++i, target += moves.direction * stride) {
      fetch();
      copy_row<B, false>(target, base + steps[i].source * stride, bytes);
    }
  } while (heads.next());
}

// move_rows with stores past the caches, in four heads at a time: their rows lie in different pages and DRAM banks, and
// a pause in one of them is filled by the others.
template <class B, int64_t kBytes>
void stream_rows(const KvTensor* tensors, const KvTensor* end, int64_t b, const KvMoves& moves) {
  constexpr int64_t kHeads = 4, kAheadSteps = 16;
  const int64_t bytes = kBytes ? kBytes : tensors->row_bytes;
  Heads heads{tensors, end, b, 0};
  for (bool more = true; more;) {
    char* bases[kHeads];
    int64_t strides[kHeads], count = 0;
    do {
      bases[count] = heads.base();
      strides[count++] = heads.tensor->slot_stride;
      more = heads.next();
    } while (more && count < kHeads);
    int64_t slot = moves.target;
    for (int64_t i = 0; i < moves.count; ++i, slot += moves.direction) {
      const int64_t source = moves.steps[i].source, later = i + kAheadSteps;
      const int64_t ahead = moves.steps[later < moves.count ? later : i].source;
      for (int64_t h = 0; h < count; ++h) {
        for (int64_t k = 0; k < bytes; k += kLineBytes) __builtin_prefetch(bases[h] + ahead * strides[h] + k, 0, 2);
        copy_row<B, true>(bases[h] + slot * strides[h], bases[h] + source * strides[h], bytes);
      }
    }
  }
  B::fence();
}

// Whether every row of the tensors lies on whole lines.
static inline bool on_lines(const KvTensor* tensors, const KvTensor* end) {
  uint64_t all = 0;
  for (const KvTensor* kv = tensors; kv != end; ++kv)
    all |= reinterpret_cast<uint64_t>(kv->data) |
           static_cast<uint64_t>(kv->batch_stride | kv->head_stride | kv->slot_stride | kv->row_bytes);
  return all % kLineBytes == 0;
}

template <class B, int64_t kBytes>
void move(const KvTensor* tensors, const KvTensor* end, int64_t b, const KvMoves& moves) {
  if constexpr (B::kStreams)
    if (moves.stream && on_lines(tensors, end)) return stream_rows<B, kBytes>(tensors, end, b, moves);
  move_rows<B, kBytes>(tensors, end, b, moves);
}

}  // namespace detail

template <class S>
void move_slots(const KvTensor* tensors, const KvTensor* end, int64_t b, const KvMoves& moves) {
  using B = typename S::Bytes;
  switch (tensors->row_bytes) {
    case 256:
      return detail::move<B, 256>(tensors, end, b, moves);
    case 128:
      return detail::move<B, 128>(tensors, end, b, moves);
    default:
      return detail::move<B, 0>(tensors, end, b, moves);
  }
}

}  // namespace ugsd
