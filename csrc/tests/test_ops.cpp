// The ops on every instruction set that this machine runs, against float64 loops written the obvious way. Buffers are
// exactly as large as the data, so that a sanitizer sees any access past them. Prints what failed; exits 1 then.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "ugsd/kernels.h"

using namespace ugsd;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const int64_t kSizes[] = {1, 2, 15, 17, 63, 1000, 4095, 4096, 4097, 9001};

int failures = 0, checks = 0;
std::string context;

void expect(bool ok, const char* what) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: %s\n", context.c_str(), what);
}

bool close(double got, double wanted, double tolerance = 3e-6) {
  if (got == wanted) return true;
  return std::fabs(got - wanted) <= tolerance * std::max(1.0, std::fabs(wanted));
}

std::mt19937 random_bits{12345};

float normal() { return std::normal_distribution<float>(0, 3)(random_bits); }

double unit() { return std::uniform_real_distribution<double>(0, 1)(random_bits); }

template <class T>
T narrow(float x);
template <>
float narrow<float>(float x) {
  return x;
}
template <>
bfloat16 narrow<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}
template <>
float16 narrow<float16>(float x) {  // by truncation, without subnormals: inputs need no more
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest >= 0x7f800000) return {static_cast<uint16_t>(sign | 0x7c00 | (rest > 0x7f800000 ? 1 : 0))};
  if (rest < 0x38800000) return {static_cast<uint16_t>(sign)};
  return {static_cast<uint16_t>(sign | (rest - 0x38000000) >> 13)};
}

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType dtype_of<bfloat16>() {
  return DType::kBFloat16;
}
template <>
constexpr DType dtype_of<float16>() {
  return DType::kFloat16;
}

// Rows in one exact allocation; `kind` chooses what is special about them.
template <class T>
std::vector<T> make_logits(int64_t count, int kind) {
  std::vector<T> z(static_cast<size_t>(count));
  for (auto& x : z) {
    float value = normal();
    if (kind == 1 && unit() < 0.5) value = -kInf;
    if (kind == 2 && unit() < 0.2) value = std::nanf("");
    if (kind == 3) value = std::round(value);
    if (kind == 4) value = -kInf;
    x = narrow<T>(value);
  }
  return z;
}

template <class T>
Rows rows_of(const std::vector<T>& z, int64_t rows, int64_t columns) {
  return {z.data(), dtype_of<T>(), 1, rows, 0, columns, columns};
}

struct Stats {
  std::vector<float> logsumexp, entropy, max_logit, margin;
  std::vector<int64_t> argmax;

  explicit Stats(int64_t rows)
      : logsumexp(rows, NAN), entropy(rows, NAN), max_logit(rows, NAN), margin(rows, NAN), argmax(rows, -7) {}
  StatsOut out() { return {logsumexp.data(), entropy.data(), max_logit.data(), argmax.data(), margin.data()}; }
};

// One row, by definition.
struct Naive {
  double logsumexp = -kInf, entropy = 0, max = -kInf, second = -kInf;
  int64_t argmax = -1;

  template <class Z>
  Naive(const Z& z, int64_t n, double temperature) {
    for (int64_t i = 0; i < n; ++i) {
      const double s = z(i) / temperature;
      if (!(s > -kInf)) continue;
      if (s > max) {
        second = max;
        max = s;
        argmax = i;
      } else {
        second = std::max(second, s);
      }
    }
    if (argmax < 0) return;
    double mass = 0, moment = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double s = z(i) / temperature;
      if (i == argmax || !(s > -kInf)) continue;
      mass += std::exp(s - max);
      moment += (s - max) * std::exp(s - max);
    }
    logsumexp = max + std::log1p(mass);
    entropy = std::log1p(mass) - moment / (1 + mass);
  }
};

void check_stats(const Stats& got, int64_t r, const Naive& wanted, double tolerance) {
  expect(got.argmax[r] == wanted.argmax, "argmax");
  expect(close(got.logsumexp[r], wanted.logsumexp, tolerance), "logsumexp");
  expect(close(got.entropy[r], wanted.entropy, tolerance), "entropy");
  expect(close(got.max_logit[r], wanted.max, tolerance), "max_logit");
  if (wanted.argmax >= 0 && wanted.second > -kInf)
    expect(close(got.margin[r], wanted.max - wanted.second, tolerance), "margin");
}

template <class T>
void test_rows(const Kernels& kernels, int64_t columns, int kind) {
  const int64_t rows = 3;
  const std::vector<T> z = make_logits<T>(rows * columns, kind);
  const Rows logits = rows_of(z, rows, columns);
  const auto value = [&](int64_t r) {
    return [&, r](int64_t i) { return double(detail::logit(z.data() + r * columns, i)); };
  };
  const std::vector<float> temperatures = {1.0f, 0.5f, 0.0f};

  Stats stats(rows);
  kernels.token_stats({logits, {0, temperatures.data()}, stats.out(), 1});
  std::vector<Naive> naive;
  for (int64_t r = 0; r < rows; ++r) {
    naive.emplace_back(value(r), columns, temperatures[r] > 0 ? temperatures[r] : 1.0);
    check_stats(stats, r, naive.back(), 3e-6);
  }

  const std::vector<int64_t> tokens = {columns / 2, columns, -1};
  std::vector<float> logprob(rows, NAN);
  std::vector<int64_t> rank(rows, -7);
  for (const float* logsumexp :
       {static_cast<const float*>(nullptr), static_cast<const float*>(stats.logsumexp.data())}) {
    kernels.logprob_rank({logits, tokens.data(), {0, temperatures.data()}, logsumexp, logprob.data(), rank.data(), 1});
    const double own = value(0)(tokens[0]);
    int64_t wanted = 1;
    for (int64_t i = 0; i < columns; ++i) wanted += value(0)(i) > own;
    expect(rank[0] == wanted, "rank");
    expect(rank[1] == columns + 1 && rank[2] == columns + 1, "rank of an impossible token");
    expect(own > -kInf ? close(logprob[0], own - naive[0].logsumexp) : logprob[0] == -kInf, "logprob");
    expect(logprob[1] == -kInf && logprob[2] == -kInf, "logprob of an impossible token");
  }

  for (const int64_t top_k : {0, 1, 20}) {
    for (const float top_p : {1.0f, 0.7f, 0.0f}) {
      for (const float min_p : {0.0f, 0.05f}) {
        const Filters filters{{top_k, nullptr}, {top_p, nullptr}, {min_p, nullptr}};
        std::vector<float> out(static_cast<size_t>(rows * columns), NAN);
        kernels.filter_logits({logits, {0, temperatures.data()}, filters, out.data(), 1});
        for (int64_t r = 0; r < rows; ++r) {
          // A threshold: what is kept is larger than what is cut, and the maximum is kept.
          double lowest_kept = kInf, highest_cut = -kInf;
          int64_t kept = 0;
          for (int64_t i = 0; i < columns; ++i) {
            const float got = out[r * columns + i];
            if (got > -kInf) {
              ++kept;
              lowest_kept = std::min(lowest_kept, value(r)(i));
            } else if (r < 2) {
              highest_cut = std::max(highest_cut, value(r)(i));
            }
          }
          expect(naive[r].argmax < 0 ? kept == 0 : out[r * columns + naive[r].argmax] > -kInf, "the maximum is kept");
          expect(kept == 0 || lowest_kept > highest_cut, "a threshold");
          if (r == 2) expect(kept <= 1, "temperature 0 keeps one");
        }
        Stats drawn(rows);
        std::vector<int64_t> chosen(rows, -7);
        kernels.sample({logits,
                        {0, temperatures.data()},
                        filters,
                        {99, nullptr},
                        {1, nullptr},
                        chosen.data(),
                        logprob.data(),
                        drawn.out(),
                        1});
        for (int64_t r = 0; r < rows; ++r) {
          check_stats(drawn, r, naive[r], 3e-6);
          expect(chosen[r] < 0 ? naive[r].argmax < 0 : out[r * columns + chosen[r]] > -kInf, "a kept token is drawn");
        }
      }
    }
  }
}

template <class P, class Q>
void test_accept(const Kernels& kernels, const Kernels& scalar, int64_t columns, int64_t block, int kind) {
  const int64_t batch = 4;
  const std::vector<P> target = make_logits<P>(batch * (block + 1) * columns, kind);
  std::vector<Q> draft(static_cast<size_t>(batch * block * columns));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < block * columns; ++i)
      draft[b * block * columns + i] =
          narrow<Q>(simd::to_float(target[b * (block + 1) * columns + i]) + 0.3f * normal());
  std::vector<int64_t> tokens(static_cast<size_t>(batch * block)), lengths(batch);
  for (auto& token : tokens) token = static_cast<int64_t>(unit() * double(columns + 2)) - 1;
  for (auto& length : lengths) length = static_cast<int64_t>(unit() * double(block + 1));
  std::vector<double> uniforms(static_cast<size_t>(batch * (block + 1)));
  for (auto& u : uniforms) u = unit() < 0.3 ? 0 : unit();
  for (int rule = 0; rule < 6; ++rule) {
    for (const bool certain : {false, true}) {
      Rows drafted = rows_of(draft, batch * block, columns);
      if (certain) drafted.data = nullptr;
      std::vector<int64_t> accepted[2], next[2];
      std::vector<float> probability[2];
      for (int k = 0; k < 2; ++k) {
        accepted[k].assign(batch, -7);
        next[k].assign(batch, -7);
        probability[k].assign(static_cast<size_t>(batch * block), NAN);
        (k ? scalar : kernels)
            .accept_block({rows_of(target, batch * (block + 1), columns),
                           drafted,
                           tokens.data(),
                           batch,
                           block,
                           static_cast<Rule>(rule),
                           lengths.data(),
                           {10, nullptr},
                           {0.5, nullptr},
                           nullptr,
                           true,
                           {5, nullptr},
                           {6, nullptr},
                           uniforms.data(),
                           accepted[k].data(),
                           next[k].data(),
                           probability[k].data(),
                           1});
      }
      for (int64_t b = 0; b < batch; ++b) {
        expect(accepted[0][b] == accepted[1][b], "accepted as the scalar kernel");
        expect(accepted[0][b] >= 0 && accepted[0][b] <= lengths[b], "accepted within the block");
        expect(next[0][b] >= -1 && next[0][b] < columns, "a token follows");
        if (rule != int(Rule::kExact) && rule != int(Rule::kBlock))
          expect(next[0][b] == next[1][b], "next as the scalar kernel");
        for (int64_t i = 0; i < block; ++i)
          expect(close(probability[0][b * block + i], probability[1][b * block + i], 1e-4), "acceptance probability");
      }
    }
  }
}

template <class T>
void test_head(const Kernels& kernels, int64_t vocabulary, int64_t width, int64_t rows) {
  const std::vector<T> hidden = make_logits<T>(rows * width, 0), weight = make_logits<T>(vocabulary * width, 0),
                       bias = make_logits<T>(vocabulary, 0);
  Stats stats(rows);
  kernels.lm_head_stats(
      {rows_of(hidden, rows, width), rows_of(weight, vocabulary, width), bias.data(), {1, nullptr}, stats.out(), 1});
  for (int64_t r = 0; r < rows; ++r) {
    const Naive wanted(
        [&](int64_t v) {
          double sum = simd::to_float(bias[v]);
          for (int64_t i = 0; i < width; ++i)
            sum += double(simd::to_float(weight[v * width + i])) * simd::to_float(hidden[r * width + i]);
          return sum;
        },
        vocabulary, 1);
    check_stats(stats, r, wanted, 5e-4);  // logits of a few hundred, summed in float32
  }
}

MoveSlots* moved_by;

void stream_slots(const KvTensor* tensors, const KvTensor* end, int64_t b, const KvMoves& moves) {
  moved_by(tensors, end, b, {moves.steps, moves.count, moves.target, moves.direction, true});
}

void test_kv(const Kernels& kernels, int64_t width, bool mask, Align align, bool stream, int64_t pad) {
  const int64_t batch = 3, heads = 5, slots = 37;
  const size_t size = static_cast<size_t>(batch * heads * slots * (width + pad));
  std::vector<char> memory(size + 64), before;
  char* data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  for (size_t i = 0; i < size; ++i) data[i] = static_cast<char>(random_bits());
  before.assign(data, data + size);
  moved_by = kernels.move_slots;
  const KvTensor kv{data, heads, heads * slots * (width + pad), slots * (width + pad), width + pad, width};
  std::vector<char> keep(static_cast<size_t>(batch * slots));
  std::vector<int64_t> lengths(batch), kept(batch, -7);
  for (auto& k : keep) k = unit() < 0.6;
  for (auto& length : lengths) length = static_cast<int64_t>(unit() * double(slots + 1));
  kv_compact({&kv, 1, batch, slots, mask ? reinterpret_cast<const bool*>(keep.data()) : nullptr, slots, lengths.data(),
              align, kept.data(), 1},
             stream ? stream_slots : kernels.move_slots);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<int64_t> sources;
    for (int64_t t = 0; t < slots; ++t)
      if (mask ? keep[b * slots + t] : t < lengths[b]) sources.push_back(t);
    expect(kept[b] == static_cast<int64_t>(sources.size()), "kept slots");
    const int64_t first = align == Align::kLeft ? 0 : slots - kept[b];
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t i = 0; i < kept[b]; ++i) {
        const int64_t base = b * kv.batch_stride + head * kv.head_stride;
        expect(!std::memcmp(&data[base + (first + i) * kv.slot_stride], &before[base + sources[i] * kv.slot_stride],
                            width),
               "a slot's bytes");
      }
  }
}

void test_philox() {
  const uint32_t counter[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
  const Philox got = philox4x32(counter, 0xa4093822, 0x299f31d0);
  const uint32_t wanted[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
  expect(!std::memcmp(got.words, wanted, sizeof wanted), "philox known answer");
}

// The integers that decide which 16-bit numbers are over a float32, for all of both and what lies between two of them.
template <class T>
void test_stored_ranges() {
  const auto check = [](float value, int x) {
    if (!(value < std::numeric_limits<float>::max())) return;
    const T stored{static_cast<uint16_t>(x)};
    const float z = simd::to_float(stored);
    const detail::StoredRange over = detail::stored_over<T>(value);
    const bool inside = over.first <= stored.bits && stored.bits <= over.last, nan = z != z && stored.bits < 0x8000;
    expect(inside == (z > value || (nan && value < 0)), "the range over a value");
  };
  const int infinity = detail::kStoredInfinity<T>;
  const float limits[] = {65504.0f, 65519.9f, 65520.0f, 65535.9f, 65536.0f, 1e30f, 3.3961e38f, 3e-45f, 1e-40f, 0.0f};
  for (int t = 0; t < 0x10000; ++t) {
    const float value = simd::to_float(T{static_cast<uint16_t>(t)});
    for (const float v : {value, std::nextafter(value, kInf), std::nextafter(value, -kInf)}) {
      for (int x = t - 2; x <= t + 2; ++x) check(v, x);
      for (const int x : {0, 1, infinity - 1, infinity, infinity + 1, 0x7fff}) {
        check(v, x);
        check(v, 0x8000 + x);
      }
    }
    for (const float limit : limits)
      for (const float v : {limit, -limit}) check(v, t);
  }
}

// Every 16-bit number among others: its rank, and maximum and position of rows of them.
template <class T>
void test_stored(const Kernels& kernels) {
  const int infinity = detail::kStoredInfinity<T>;
  const auto rows_at = [](const std::vector<T>& z, int64_t rows, int64_t stride, int64_t columns) {
    return Rows{z.data(), dtype_of<T>(), rows, 1, stride, 0, columns};
  };
  const auto ranks = [&](const Rows& logits, const std::vector<int64_t>& tokens) {
    const int64_t count = logits.count();
    const std::vector<float> logsumexp(static_cast<size_t>(count), 0.0f);
    std::vector<float> logprob(static_cast<size_t>(count), NAN);
    std::vector<int64_t> rank(static_cast<size_t>(count), -7);
    kernels.logprob_rank({logits, tokens.data(), {1, nullptr}, logsumexp.data(), logprob.data(), rank.data(), 1});
    for (int64_t r = 0; r < count; ++r) {
      const T* z = logits.row<T>(r);
      const float own = detail::logit(z, tokens[r]);
      int64_t wanted = 1;
      for (int64_t i = 0; i < logits.columns; ++i) wanted += detail::logit(z, i) > own;
      expect(rank[r] == wanted, "rank of a 16-bit number");
    }
  };

  std::vector<T> all(0x10000), none_over_zero;
  for (int x = 0; x < 0x10000; ++x) {
    all[x] = {static_cast<uint16_t>(x)};
    if (x == 0 || x > infinity) none_over_zero.push_back(all[x]);
  }
  std::vector<T> shuffled = all;
  std::shuffle(shuffled.begin(), shuffled.end(), random_bits);
  std::shuffle(none_over_zero.begin(), none_over_zero.end(), random_bits);

  std::vector<int64_t> tokens(64);
  for (auto& token : tokens) token = static_cast<int64_t>(unit() * 0x10000);
  for (const int x : {0, 1, infinity - 1, infinity, infinity + 1, 0x7fff})
    for (const int sign : {0, 0x8000})
      tokens.push_back(std::find_if(shuffled.begin(), shuffled.end(), [&](T z) { return z.bits == sign + x; }) -
                       shuffled.begin());
  ranks(rows_at(shuffled, static_cast<int64_t>(tokens.size()), 0, 0x10000), tokens);

  // Rows that start a column apart, of an unrolled step, vectors and a rest on any instruction set.
  const int64_t columns = 161;
  for (std::vector<T>* z : {&all, &shuffled, &none_over_zero}) {
    const auto count = static_cast<int64_t>(z->size());
    for (int64_t i = 0; i + 1 < columns; ++i) z->push_back(T{(*z)[i]});
    const Rows logits = rows_at(*z, count, 1, columns);
    ranks(logits, std::vector<int64_t>(static_cast<size_t>(count), columns / 2));
    std::vector<int64_t> accepted(static_cast<size_t>(count), -7), next(static_cast<size_t>(count), -7);
    AcceptBlockArgs args{};
    args.target = logits;
    args.batch = count;
    args.rule = Rule::kGreedy;
    args.bonus = true;
    args.num_accepted = accepted.data();
    args.next_token = next.data();
    args.threads = 1;
    kernels.accept_block(args);
    for (int64_t r = 0; r < count; ++r) {
      int64_t wanted = -1;
      float max = -kInf;
      for (int64_t i = 0; i < columns; ++i) {
        const float value = detail::logit(logits.row<T>(r), i);
        if (!(value > max)) continue;
        max = value;
        wanted = i;
      }
      expect(next[r] == wanted, "argmax of 16-bit numbers");
    }
  }
}

template <class T>
void test_dtype(const Kernels& kernels, const char* dtype) {
  const Kernels& scalar = *kernels_of("scalar");
  for (const int64_t columns : kSizes) {
    for (int kind = 0; kind < 5; ++kind) {
      context =
          std::string(kernels.isa) + " " + dtype + " V=" + std::to_string(columns) + " kind " + std::to_string(kind);
      test_rows<T>(kernels, columns, kind);
    }
    for (const int64_t block : {0, 1, 4}) {
      test_accept<T, float>(kernels, scalar, columns, block, 0);
      test_accept<T, bfloat16>(kernels, scalar, columns, block, 3);
    }
  }
  for (const int64_t width : {1, 31, 64, 100})
    for (const int64_t rows : {1, 3, 7}) {
      context = std::string(kernels.isa) + " " + dtype + " head width " + std::to_string(width);
      test_head<T>(kernels, 4099, width, rows);
    }
}

void test_packed_attention(const Kernels& kernels, int64_t width, int64_t value_width) {
  const int64_t heads = 4, kv_heads = 2;
  struct Shape {
    int64_t capacity, tokens, count;
  };
  const Shape shapes[] = {{3, 1, 1}, {40, 33, 6}, {64, 64, 3}, {20, 20, 20}};
  std::vector<std::vector<float>> keys, values;
  std::vector<PackedRequest> requests;
  int64_t total = 0;
  for (const Shape& shape : shapes) {
    keys.emplace_back(kv_heads * shape.capacity * width);
    values.emplace_back(kv_heads * shape.capacity * value_width);
    for (float& x : keys.back()) x = normal();
    for (float& x : values.back()) x = normal();
    total += shape.count;
  }
  for (size_t b = 0; b < keys.size(); ++b)
    requests.push_back({keys[b].data(), values[b].data(), shapes[b].capacity, shapes[b].tokens, shapes[b].count});
  std::vector<float> query(total * heads * width), new_keys(total * kv_heads * width),
      new_values(total * kv_heads * value_width), out(total * heads * value_width, kInf);
  for (auto* tensor : {&query, &new_keys, &new_values})
    for (float& x : *tensor) x = normal();
  const auto batch = static_cast<int64_t>(requests.size());
  append_slots({requests.data(), batch, kv_heads, width, value_width, new_keys.data(), new_values.data(), width,
                kv_heads * width, value_width, kv_heads * value_width});
  kernels.packed_attention({requests.data(), batch, heads, kv_heads, width, value_width, query.data(), width,
                            heads * width, 0.1f, out.data(), 1});
  int64_t n = 0;
  for (const PackedRequest& request : requests)
    for (int64_t i = 0; i < request.count; ++i, ++n)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t first = h / (heads / kv_heads) * request.capacity,
                      visible = request.tokens - request.count + i + 1;
        std::vector<double> weights(visible);
        double largest = -kInf, mass = 0;
        for (int64_t t = 0; t < visible; ++t) {
          for (int64_t d = 0; d < width; ++d)
            weights[t] += 0.1 * query[(n * heads + h) * width + d] * request.keys[(first + t) * width + d];
          largest = std::max(largest, weights[t]);
        }
        for (double& weight : weights) mass += weight = std::exp(weight - largest);
        for (int64_t d = 0; d < value_width; ++d) {
          double wanted = 0;
          for (int64_t t = 0; t < visible; ++t)
            wanted += weights[t] / mass * request.values[(first + t) * value_width + d];
          expect(close(out[(n * heads + h) * value_width + d], wanted, 1e-4), "packed attention");
        }
      }
}

}  // namespace

int main() {
  test_philox();
  context = "ranges of 16-bit numbers";
  test_stored_ranges<bfloat16>();
  test_stored_ranges<float16>();
  for (const char* const* isa = isas(); *isa; ++isa) {
    const Kernels& kernels = *kernels_of(*isa);
    context = std::string(kernels.isa) + " kv_compact";
    for (const int64_t width : {5, 100, 128, 256})
      for (const bool mask : {false, true})
        for (const Align align : {Align::kLeft, Align::kRight})
          for (const bool stream : {false, true})
            for (const int64_t pad : {0, 3, 64}) test_kv(kernels, width, mask, align, stream, pad);
    test_dtype<float>(kernels, "float32");
    test_dtype<bfloat16>(kernels, "bfloat16");
    test_dtype<float16>(kernels, "float16");
    context = std::string(kernels.isa) + " packed attention";
    for (const int64_t width : {1, 20, 64}) test_packed_attention(kernels, width, width + 5);
    context = std::string(kernels.isa) + " all 16-bit numbers";
    test_stored<bfloat16>(kernels);
    test_stored<float16>(kernels);
    std::printf("%s: %d checks, %d failures\n", *isa, checks, failures);
  }
  return failures ? 1 : 0;
}
