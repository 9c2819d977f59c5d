#include "ugsd/kv_compact.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace ugsd {
namespace {

// More than this is no longer in the caches when it is all moved.
constexpr int64_t kCacheBytes = int64_t{32} << 20;

// What happens to one sequence, in every head of every tensor.
struct Plan {
  std::vector<KvStep> steps;
  int64_t target = 0, direction = 1;
  int64_t replaced = 0;  // dropped slots written over
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
  plan.replaced = static_cast<int64_t>(fetched);
  return plan;
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

void kv_compact(const KvCompactArgs& args, MoveSlots* move_slots) {
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
    const int64_t moves = static_cast<int64_t>(plan.steps.size());
    if (!moves) continue;
    // Where many dropped slots are written over, reading them first is a third of the traffic: stores past the caches
    // need not. Slots that were read as sources are in the caches, and cheaper to write there.
    const bool stream = steps * slot_bytes > kCacheBytes && 4 * plan.replaced > moves;
    const KvTensor* end = tensors.data() + (part + 1) * count / parts;
    for (const KvTensor* kv = tensors.data() + part * count / parts; kv != end;) {
      const KvTensor* next = std::find_if(kv, end, [&](const KvTensor& one) { return one.row_bytes != kv->row_bytes; });
      move_slots(kv, next, b, {plan.steps.data(), moves, plan.target, plan.direction, stream});
      kv = next;
    }
  }
}

}  // namespace ugsd
