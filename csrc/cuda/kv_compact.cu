// kv_compact in one launch over all layers: a warp a head of a sequence, pointers and layouts passed by value.
//
// A lane reads and writes the same bytes of every slot, and slots move against the direction in which it walks: no slot
// is written over before it has been read, and nobody waits for anybody. Slots that stay where they are are not
// touched.
#include "ugsd/cuda/device.h"
#include "ugsd/cuda/kernels.h"

namespace ugsd::cuda {
namespace {

// Rows of one shape; strides in bytes.
struct Layout {
  int64_t heads, batch_stride, head_stride, slot_stride, row_bytes;

  bool operator==(const Layout& o) const {
    return heads == o.heads && batch_stride == o.batch_stride && head_stride == o.head_stride &&
           slot_stride == o.slot_stride && row_bytes == o.row_bytes;
  }
};

// Kernel arguments have 4 KB: this many tensors go in one launch.
constexpr int kTensors = 384, kLayouts = 8;

struct Compaction {
  char* tensors[kTensors];
  uint8_t layout_of[kTensors];
  Layout layouts[kLayouts];
  int tensor_count, max_heads;
  int64_t batch, slots;
  const bool* keep;
  int64_t keep_stride;
  const int64_t* lengths;
  bool left;
  int64_t* kept;
};
static_assert(sizeof(Compaction) <= 4096);

// The slots of one sequence in the order of the walk: from the left, or from the right.
struct Walk {
  const bool* keep;  // null: the leading `length` slots
  int64_t length, slots;
  bool left;

  __device__ int64_t place(int64_t i) const { return left ? i : slots - 1 - i; }
  __device__ bool keeps(int64_t i) const { return i < slots && (keep ? keep[place(i)] : place(i) < length); }
};

// Moves one column of vectors V and returns the number of kept slots; `active` lanes have a column.
template <class V>
__device__ int64_t compact_column(V* column, int64_t stride, const Walk& walk, bool active) {
  constexpr int kAhead = 8;  // masks, and slots, that are loaded together
  const auto at = [&](int64_t i) -> V& {
    return *reinterpret_cast<V*>(reinterpret_cast<char*>(column) + walk.place(i) * stride);
  };
  int64_t kept = 0;
  for (int64_t base = 0; base < walk.slots; base += kAhead * kLanes) {
    bool flags[kAhead];
#pragma unroll
    for (int w = 0; w < kAhead; ++w) flags[w] = walk.keeps(base + w * kLanes + lane());
#pragma unroll
    for (int w = 0; w < kAhead; ++w) {
      unsigned bits = __ballot_sync(kAllLanes, flags[w]);
      const int64_t first = base + w * kLanes;
      if (kept == first) {  // a run from the start is in place
        const int run = ~bits ? __ffs(~bits) - 1 : kLanes;
        kept += run;
        bits = run < kLanes ? bits >> run << run : 0;
      }
      while (bits) {
        V moved[kAhead];
        int count = 0;
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (!bits) continue;
          const int64_t source = first + __ffs(bits) - 1;
          bits &= bits - 1;
          ++count;
          if (active) moved[k] = at(source);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (active && k < count) at(kept + k) = moved[k];
        kept += count;
      }
    }
  }
  return kept;
}

template <class V>
__device__ int64_t compact_rows(char* rows, const Layout& layout, const Walk& walk) {
  const int64_t vectors = layout.row_bytes / static_cast<int64_t>(sizeof(V));
  int64_t kept = 0, first = 0;
  do {
    const int64_t own = first + lane();
    kept = compact_column(reinterpret_cast<V*>(rows) + own, layout.slot_stride, walk, own < vectors);
    first += kLanes;
  } while (first < vectors);
  return kept;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) kv_compact_kernel(const Compaction c) {
  const int64_t warp = warp_number();
  const int64_t head = warp % c.max_heads, b = warp / c.max_heads % c.batch, t = warp / c.max_heads / c.batch;
  if (t >= c.tensor_count) return;
  const Layout& layout = c.layouts[c.layout_of[t]];
  const bool counts = t == 0 && head == 0;
  if (head >= layout.heads && !counts) return;
  Walk walk{c.keep ? c.keep + b * c.keep_stride : nullptr, 0, c.slots, c.left};
  if (!c.keep) walk.length = c.lengths ? c.lengths[b] : 0;
  char* rows = c.tensors[t] + b * layout.batch_stride + head * layout.head_stride;
  Layout used = layout;
  if (head >= layout.heads) used.row_bytes = 0;
  const int64_t bits = reinterpret_cast<int64_t>(rows) | used.slot_stride | used.row_bytes;
  const int64_t kept = bits % 16 == 0 ? compact_rows<uint4>(rows, used, walk) : compact_rows<uint8_t>(rows, used, walk);
  if (counts && lane() == 0) c.kept[b] = kept;
}

}  // namespace

void kv_compact(const KvCompactArgs& args, const Launch& on) {
  for (int64_t i = 0; i < args.tensor_count && args.batch > 0;) {
    Compaction c{};
    c.batch = args.batch;
    c.slots = args.slots;
    c.keep = args.keep;
    c.keep_stride = args.keep_stride;
    c.lengths = args.lengths;
    c.left = args.align == Align::kLeft;
    c.kept = args.kept;
    c.max_heads = 1;
    int layouts = 0;
    for (; i < args.tensor_count && c.tensor_count < kTensors; ++i) {
      const KvTensor& kv = args.tensors[i];
      const Layout layout{kv.heads, kv.batch_stride, kv.head_stride, kv.slot_stride, kv.row_bytes};
      int k = 0;
      while (k < layouts && !(c.layouts[k] == layout)) ++k;
      if (k == kLayouts) break;
      if (k == layouts) c.layouts[layouts++] = layout;
      c.tensors[c.tensor_count] = kv.data;
      c.layout_of[c.tensor_count++] = static_cast<uint8_t>(k);
      if (kv.heads > c.max_heads) c.max_heads = static_cast<int>(kv.heads);
    }
    launch_warps(kv_compact_kernel, on, args.batch * c.max_heads * c.tensor_count, c);
  }
}

}  // namespace ugsd::cuda
