// kv_compact: the kept cache slots of every sequence move together, in all layers' keys and values, in place.
//
// Bytes moved: each slot that changes place is read once and written once. A dropped slot that a kept one replaces is
// fetched as well, since caches take lines whole; nothing else is touched.
#pragma once

#include "ugsd/types.h"

namespace ugsd {

// No two elements share memory, neither in one tensor nor in two of a call.
struct KvTensor {
  char* data;
  int64_t heads;
  int64_t batch_stride, head_stride, slot_stride, row_bytes;  // bytes
};

enum class Align : int { kLeft = 0, kRight = 1 };

struct KvCompactArgs {
  const KvTensor* tensors;
  int64_t tensor_count, batch, slots;
  const bool* keep;  // [batch, slots] with this stride, or null
  int64_t keep_stride;
  const int64_t* lengths;  // [batch]: leading slots that stay, where keep is null
  Align align;
  int64_t* kept;
  int threads;
};

void kv_compact(const KvCompactArgs& args);

}  // namespace ugsd
