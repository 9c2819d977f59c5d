// What `sample` takes from filter_logits.cu.
#pragma once

#include "ugsd/args.h"
#include "ugsd/cuda/launch.h"

namespace ugsd::cuda {

// What stays of a row: columns at or over the threshold; at temperature 0 the argmax alone.
struct Bound {
  float threshold;
  int argmax;
};

// Whether the filters can cut a column of any row.
inline bool may_cut(const Filters& filters, int64_t columns) {
  return filters.top_k.rows || filters.top_p.rows || filters.min_p.rows || RowFilter(filters, 0, columns).any();
}

// Finds the bounds of all rows, or draws from them. The workspace needs a counter a row and the statistics of all
// pieces.
void select_rows(const SampleArgs& args, bool draws, Bound* bounds, const Workspace& space, const Launch& on);

}  // namespace ugsd::cuda
