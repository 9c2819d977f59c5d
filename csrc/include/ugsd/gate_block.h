// gate_block: one uncertainty a drafted block, and whether it exceeds the threshold.
#pragma once

#include "ugsd/args.h"

namespace ugsd {

// The block of sequence b.
UGSD_INLINE void gate_block(const GateBlockArgs& args, int64_t b) {
  int64_t length = args.lengths ? args.lengths[b] : args.block;
  length = length < 0 ? 0 : length > args.block ? args.block : length;
  const float* entropy = args.entropy + b * args.batch_stride;
  double value = length > 0 ? entropy[0] : 0;
  if (args.reduce != Reduction::kFirst) {
    for (int64_t i = 1; i < length; ++i) {
      const double x = entropy[i * args.block_stride];
      if (args.reduce == Reduction::kMean)
        value += x;
      else if (!(x <= value))  // a NaN on either side stays or replaces: it must escalate
        value = value == value ? x : value;
    }
    if (args.reduce == Reduction::kMean && length > 0) value /= static_cast<double>(length);
  }
  args.uncertainty[b] = static_cast<float>(value);
  args.escalate[b] = !(value <= args.threshold[b]);
}

static inline void gate_blocks(const GateBlockArgs& args) {
  for (int64_t b = 0; b < args.batch; ++b) gate_block(args, b);
}

}  // namespace ugsd
