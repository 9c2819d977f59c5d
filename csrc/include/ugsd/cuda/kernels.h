// The ops on CUDA tensors, each launched on the stream given and not waited for. Nothing is read back to
// the host: calls can be captured in a graph.
#pragma once

#include "ugsd/args.h"
#include "ugsd/cuda/launch.h"

namespace ugsd::cuda {

void token_stats(const TokenStatsArgs& args, const Launch& on);
void logprob_rank(const LogprobRankArgs& args, const Launch& on);
void filter_logits(const FilterLogitsArgs& args, const Launch& on);
void sample(const SampleArgs& args, const Launch& on);
void gate_block(const GateBlockArgs& args, const Launch& on);
void accept_block(const AcceptBlockArgs& args, const Launch& on);
void kv_compact(const KvCompactArgs& args, const Launch& on);

}  // namespace ugsd::cuda
