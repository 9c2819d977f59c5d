#include "ugsd/kv_compact.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace ugsd {
namespace {

constexpr int64_t kLine = 64;
// Rows are asked for this long before their turn, enough to keep all of a core's outstanding misses busy. The gaps
// between kept slots throw the hardware's own prefetch off.
constexpr int64_t kAheadBytes = 8192, kMaxAheadSteps = 64;

// A slot that moves, and the slot to fetch along with it: a dropped one that will be written over, or itself.
struct Step {
  int64_t source, fetched;
};

// What happens to one sequence, in every head of every tensor: step i writes slot `target + i * direction`. Slots
// move against the direction in which the steps walk, so that none is written over before it has been read.
struct Plan {
  std::vector<Step> steps;
  int64_t target = 0, direction = 1;
};

// Kept slots [begin, end).
struct Run {
  int64_t begin, end;
};

// First slot from `slot` on that is kept, or that is dropped; `slots` if there is none. Tests eight flags at a time.
int64_t find(const bool* keep, int64_t slot, int64_t slots, bool kept) {
  constexpr uint64_t kOnes = 0x0101010101010101, kHighBits = 0x8080808080808080;
  for (; slot + 8 <= slots; slot += 8) {
    uint64_t flags;
    std::memcpy(&flags, keep + slot, sizeof flags);
    if (kept ? flags != 0 : ((flags - kOnes) & ~flags & kHighBits) != 0) break;
  }
  while (slot < slots && keep[slot] != kept) ++slot;
  return slot;
}

std::vector<Run> runs_of(const KvCompactArgs& args, int64_t b) {
  std::vector<Run> runs;
  if (!args.keep) {
    const int64_t length = args.lengths ? args.lengths[b] : 0;  // a mask over no slots has no address
    if (length > 0 && args.slots > 0) runs.push_back({0, std::min(length, args.slots)});
    return runs;
  }
  const bool* keep = args.keep + b * args.keep_stride;
  for (int64_t t = find(keep, 0, args.slots, true); t < args.slots; t = find(keep, runs.back().end, args.slots, true))
    runs.push_back({t, find(keep, t, args.slots, false)});
  return runs;
}

Plan plan_of(const KvCompactArgs& args, int64_t b) {
  std::vector<Run> runs = runs_of(args, b);
  int64_t kept = 0;
  for (const Run& run : runs) kept += run.end - run.begin;
  args.kept[b] = kept;

  Plan plan;
  const bool left = args.align == Align::kLeft;
  const Run targets = left ? Run{0, kept} : Run{args.slots - kept, args.slots};
  plan.direction = left ? 1 : -1;
  if (!left) std::reverse(runs.begin(), runs.end());
  auto run = runs.begin();
  if (run != runs.end() && (left ? run->begin == targets.begin : run->end == targets.end)) {  // already in place
    kept -= run->end - run->begin;
    ++run;
  }
  plan.target = left ? targets.end - kept : targets.begin + kept - 1;
  plan.steps.reserve(static_cast<size_t>(kept));

  std::vector<int64_t> dropped;  // among the targets, up to the step at hand
  size_t fetched = 0;
  int64_t passed = plan.target;
  for (; run != runs.end(); ++run) {
    int64_t source = left ? run->begin : run->end - 1;
    for (; passed != source; passed += plan.direction)
      if (passed >= targets.begin && passed < targets.end) dropped.push_back(passed);
    for (int64_t i = run->begin; i < run->end; ++i, source += plan.direction)
      plan.steps.push_back({source, fetched < dropped.size() ? dropped[fetched++] : source});
    passed = source;
  }
  return plan;
}

UGSD_INLINE void copy_row(char* target, const char* source, int64_t bytes) {
  typedef char Vector __attribute__((vector_size(16)));
  constexpr int64_t kSize = sizeof(Vector);
  int64_t i = 0;
  for (; i + 4 * kSize <= bytes; i += 4 * kSize) {
    Vector v[4];
    std::memcpy(v, source + i, sizeof v);
    std::memcpy(target + i, v, sizeof v);
  }
  for (; i + kSize <= bytes; i += kSize) std::memcpy(target + i, source + i, kSize);
  for (; i < bytes; ++i) target[i] = source[i];
}

// One head of one sequence after another, in all tensors of a range.
struct Heads {
  const KvTensor *tensor, *end;
  int64_t b, head = 0;

  char* base() const { return tensor->data + b * tensor->batch_stride + head * tensor->head_stride; }

  bool next() {
    if (++head < tensor->heads) return true;
    head = 0;
    return ++tensor != end;
  }
};

// Carries out a plan in tensors whose rows have the same length; `kBytes` is that length, or 0 for any.
template <int64_t kBytes>
void move(const KvTensor* tensors, const KvTensor* end, int64_t b, const Plan& plan) {
  const int64_t bytes = kBytes ? kBytes : tensors->row_bytes;
  const Step* steps = plan.steps.data();
  const int64_t count = static_cast<int64_t>(plan.steps.size());

  // The steps to come, across the ends of heads and tensors; the very last one is asked for again and again.
  Heads ahead{tensors, end, b};
  const char* ahead_base = ahead.base();
  int64_t ahead_stride = tensors->slot_stride, ahead_step = 0;
  bool more = true;
  const auto fetch = [&] {
    const char* source = ahead_base + steps[ahead_step].source * ahead_stride;
    const char* fetched = ahead_base + steps[ahead_step].fetched * ahead_stride;
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(source + i, 0, 2);  // into L2: L1 has fewer misses
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(fetched + i, 0, 2);
    if (ahead_step + 1 < count) {
      ++ahead_step;
    } else if (more && (more = ahead.next())) {
      ahead_base = ahead.base();
      ahead_stride = ahead.tensor->slot_stride;
      ahead_step = 0;
    }
  };
  const int64_t lead = std::clamp(kAheadBytes / bytes, int64_t{1}, kMaxAheadSteps);
  for (int64_t i = 0; i < lead; ++i) fetch();

  Heads heads{tensors, end, b};
  do {
    const int64_t stride = heads.tensor->slot_stride;
    char* base = heads.base();
    char* target = base + plan.target * stride;
    for (int64_t i = 0; i < count; ++i, target += plan.direction * stride) {
      fetch();
      copy_row(target, base + steps[i].source * stride, bytes);
    }
  } while (heads.next());
}

// Tensors with something in them; heads that lie side by side in each slot are one long row.
std::vector<KvTensor> simplified(const KvCompactArgs& args) {
  std::vector<KvTensor> tensors;
  tensors.reserve(static_cast<size_t>(args.tensor_count));
  for (int64_t i = 0; i < args.tensor_count; ++i) {
    KvTensor kv = args.tensors[i];
    if (kv.heads == 0 || kv.row_bytes == 0) continue;
    if (kv.head_stride == kv.row_bytes) {
      kv.row_bytes *= kv.heads;
      kv.heads = 1;
    }
    tensors.push_back(kv);
  }
  return tensors;
}

}  // namespace

void kv_compact(const KvCompactArgs& args) {
  const std::vector<KvTensor> tensors = simplified(args);
  int64_t slot_bytes = 0, steps = 0;
  for (const KvTensor& kv : tensors) slot_bytes += kv.heads * kv.row_bytes;
  std::vector<Plan> plans;
  plans.reserve(static_cast<size_t>(args.batch));
  for (int64_t b = 0; b < args.batch; ++b) {
    plans.push_back(plan_of(args, b));
    steps += static_cast<int64_t>(plans.back().steps.size());
  }

  // One thread takes a sequence through all tensors; several share them out in parts.
  const int64_t count = static_cast<int64_t>(tensors.size());
  const int threads = steps * slot_bytes < (1 << 20) ? 1 : args.threads;
  const int64_t parts = threads > 1 ? std::min<int64_t>(count, 4 * threads) : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t i = 0; i < args.batch * parts; ++i) {
    const int64_t b = i / parts, part = i % parts;
    const Plan& plan = plans[static_cast<size_t>(b)];
    if (plan.steps.empty()) continue;
    const KvTensor* end = tensors.data() + (part + 1) * count / parts;
    for (const KvTensor* kv = tensors.data() + part * count / parts; kv != end;) {
      const KvTensor* next = std::find_if(kv, end, [&](const KvTensor& one) { return one.row_bytes != kv->row_bytes; });
      if (kv->row_bytes == 256) {
        move<256>(kv, next, b, plan);
      } else if (kv->row_bytes == 128) {
        move<128>(kv, next, b, plan);
      } else {
        move<0>(kv, next, b, plan);
      }
      kv = next;
    }
  }
}

}  // namespace ugsd
