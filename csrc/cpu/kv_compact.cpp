#include "ugsd/kv_compact.h"

#include <cstring>
#include <utility>
#include <vector>

namespace ugsd {
namespace {

// Slots [source, source + count) that go to [target, target + count).
struct Run {
  int64_t source, target, count;
};

std::vector<Run> moves_of(const KvCompactArgs& args, int64_t b) {
  std::vector<Run> runs;
  int64_t kept = 0;
  if (!args.keep) {
    const int64_t length = args.lengths ? args.lengths[b] : 0;  // a mask over no slots has no address
    kept = length < 0 ? 0 : length > args.slots ? args.slots : length;
    if (kept > 0) runs.push_back({0, 0, kept});
  } else {
    const bool* keep = args.keep + b * args.keep_stride;
    for (int64_t t = 0; t < args.slots; ++t) {
      if (!keep[t]) continue;
      if (runs.empty() || runs.back().source + runs.back().count != t) runs.push_back({t, kept, 0});
      ++runs.back().count;
      ++kept;
    }
  }
  args.kept[b] = kept;
  if (args.align == Align::kRight) {
    for (Run& run : runs) run.target += args.slots - kept;
    // Slots move up, so the last run goes first and overwrites nothing that is still to be read.
    for (size_t i = 0; 2 * i + 1 < runs.size(); ++i) std::swap(runs[i], runs[runs.size() - 1 - i]);
  }
  size_t moving = 0;
  for (const Run& run : runs)
    if (run.source != run.target) runs[moving++] = run;
  runs.resize(moving);
  return runs;
}

void move(const KvTensor& kv, int64_t b, int64_t head, const std::vector<Run>& runs, Align align) {
  char* base = kv.data + b * kv.batch_stride + head * kv.head_stride;
  for (const Run& run : runs) {
    if (kv.slot_stride == kv.row_bytes) {
      std::memmove(base + run.target * kv.slot_stride, base + run.source * kv.slot_stride,
                   static_cast<size_t>(run.count * kv.row_bytes));
      continue;
    }
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t k = align == Align::kLeft ? i : run.count - 1 - i;
      std::memcpy(base + (run.target + k) * kv.slot_stride, base + (run.source + k) * kv.slot_stride,
                  static_cast<size_t>(kv.row_bytes));
    }
  }
}

}  // namespace

void kv_compact(const KvCompactArgs& args) {
  std::vector<std::vector<Run>> runs;
  int64_t bytes = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    runs.push_back(moves_of(args, b));
    for (const Run& run : runs.back())
      for (int64_t i = 0; i < args.tensor_count; ++i)
        bytes += run.count * args.tensors[i].heads * args.tensors[i].row_bytes;
  }
  [[maybe_unused]] const int threads = bytes < (1 << 20) ? 1 : args.threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t i = 0; i < args.tensor_count * args.batch; ++i) {
    const KvTensor& kv = args.tensors[i / args.batch];
    const int64_t b = i % args.batch;
    if (runs[static_cast<size_t>(b)].empty()) continue;
    for (int64_t head = 0; head < kv.heads; ++head) move(kv, b, head, runs[static_cast<size_t>(b)], args.align);
  }
}

}  // namespace ugsd
