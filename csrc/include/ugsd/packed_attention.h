// Attention of several requests that share a forward, each with keys and values of its own.
//
// The new tokens of all requests lie behind each other; a request's queries see its own slots up to their own token.
// Keys are read once for four queries. What is written before: append_slots.
#pragma once

#include <cstring>
#include <type_traits>

#include "ugsd/parallel.h"

namespace ugsd {

// One request's layer: keys [kv_heads, capacity, width] and values [kv_heads, capacity, value_width], `tokens` of them
// there, the last `count` new.
struct PackedRequest {
  float* keys;
  float* values;
  int64_t capacity, tokens, count;
};

struct AppendSlotsArgs {
  const PackedRequest* requests;
  int64_t batch, kv_heads, width, value_width;
  const float* keys;    // [kv_heads, N, width] with these strides
  const float* values;  // [kv_heads, N, value_width]
  int64_t key_head_stride, key_stride, value_head_stride, value_stride;
};

struct PackedAttentionArgs {
  const PackedRequest* requests;
  int64_t batch, heads, kv_heads, width, value_width;
  const float* query;  // [heads, N, width] with these strides
  int64_t head_stride, query_stride;
  float scale;
  float* out;  // [N, heads, value_width], contiguous
  int threads;
};

// Writes the new keys and values into their slots.
inline void append_slots(const AppendSlotsArgs& args) {
  int64_t first = 0;
  for (int64_t b = 0; b < args.batch; first += args.requests[b++].count) {
    const PackedRequest& request = args.requests[b];
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      const int64_t slot = h * request.capacity + request.tokens - request.count;
      for (int64_t i = 0; i < request.count; ++i) {
        std::memcpy(request.keys + (slot + i) * args.width,
                    args.keys + h * args.key_head_stride + (first + i) * args.key_stride,
                    static_cast<size_t>(args.width) * sizeof(float));
        std::memcpy(request.values + (slot + i) * args.value_width,
                    args.values + h * args.value_head_stride + (first + i) * args.value_stride,
                    static_cast<size_t>(args.value_width) * sizeof(float));
      }
    }
  }
}

namespace detail {

constexpr int kQueries = 4;  // that share the reading of keys and values

// Q queries, `query_stride` apart, over keys and values of one head; query q sees `visible + q` slots. Its result is
// at out + q * out_stride.
template <class S, int Q>
void attend(const float* query, int64_t query_stride, const float* keys, const float* values, int64_t visible,
            int64_t width, int64_t value_width, float scale, float* out, int64_t out_stride) {
  constexpr int L = S::kLanes;
  const int64_t slots = visible + Q - 1, row = (slots + L - 1) / L * L;
  float* scores = static_cast<float*>(scratch(0, static_cast<size_t>(Q * row) * sizeof(float)));
  float largest[Q];
  for (int q = 0; q < Q; ++q) largest[q] = -3.4e38f;
  for (int64_t t = 0; t < slots; ++t) {
    typename S::Float sums[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) sums[q] = S::set(0);
    for (int64_t i = 0; i < width; i += L) {
      const int left = static_cast<int>(width - i);
      const auto key = S::load_partial(keys + t * width + i, left, 0);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q)
        sums[q] = S::fma(S::load_partial(query + q * query_stride + i, left, 0), key, sums[q]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const float score = static_cast<float>(S::sum(sums[q])) * scale;
      scores[q * row + t] = score;
      if (t < visible + q && score > largest[q]) largest[q] = score;
    }
  }
  const typename S::Exp exp(1.0f);
  float share[Q];
  for (int q = 0; q < Q; ++q) {
    float* own = scores + q * row;
    for (int64_t t = visible + q; t < row; ++t) own[t] = -3.4e38f;
    auto total = S::set(0);
    for (int64_t t = 0; t < row; t += L) {
      // What is e^-80 of the largest, or masked, counts for nothing.
      const auto d = S::sub(S::load(own + t), S::set(largest[q]));
      const auto e = S::select(S::greater(d, S::set(-80.0f)), exp(S::max(d, S::set(-80.0f))), S::set(0));
      S::store(own + t, e);
      total = S::add(total, e);
    }
    share[q] = static_cast<float>(1 / S::sum(total));
  }
  for (int64_t i = 0; i < value_width; i += L) {
    const int left = static_cast<int>(value_width - i);
    typename S::Float sums[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) sums[q] = S::set(0);
    for (int64_t t = 0; t < slots; ++t) {
      const auto value = S::load_partial(values + t * value_width + i, left, 0);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sums[q] = S::fma(S::set(scores[q * row + t]), value, sums[q]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) S::store_partial(out + q * out_stride + i, S::mul(sums[q], S::set(share[q])), left);
  }
}

template <class S>
void attend_head(const PackedAttentionArgs& args, const PackedRequest& request, int64_t first, int64_t h) {
  const int64_t kv = h / (args.heads / args.kv_heads) * request.capacity;
  const float* keys = request.keys + kv * args.width;
  const float* values = request.values + kv * args.value_width;
  const int64_t out_stride = args.heads * args.value_width;
  for (int64_t i = 0; i < request.count;) {
    const float* query = args.query + h * args.head_stride + (first + i) * args.query_stride;
    float* out = args.out + (first + i) * out_stride + h * args.value_width;
    const int64_t visible = request.tokens - request.count + i + 1;
    const auto some = [&](auto queries) {
      constexpr int Q = decltype(queries)::value;
      attend<S, Q>(query, args.query_stride, keys, values, visible, args.width, args.value_width, args.scale, out,
                   out_stride);
      i += Q;
    };
    if (request.count - i >= kQueries) {
      some(std::integral_constant<int, kQueries>{});
    } else if (request.count - i >= 2) {
      some(std::integral_constant<int, 2>{});
    } else {
      some(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace detail

template <class S>
void packed_attention(const PackedAttentionArgs& args) {
  int64_t work = 0;
  for (int64_t b = 0; b < args.batch; ++b) work += args.requests[b].count * args.requests[b].tokens;
  const auto request = [&](int64_t b) {
    int64_t first = 0;
    for (int64_t before = 0; before < b; ++before) first += args.requests[before].count;
    for (int64_t h = 0; h < args.heads; ++h) detail::attend_head<S>(args, args.requests[b], first, h);
  };
  const int threads = detail::useful_threads(work * args.heads * args.width / 8, args.threads);
  detail::for_each_block(args.batch, threads, request);
}

}  // namespace ugsd
