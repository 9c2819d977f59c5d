// The table of ops that one instruction set implements, and the choice between them.
#pragma once

#include "ugsd/accept_block.h"
#include "ugsd/filter_logits.h"
#include "ugsd/gate_block.h"
#include "ugsd/lm_head_stats.h"
#include "ugsd/logprob_rank.h"
#include "ugsd/move_slots.h"
#include "ugsd/packed_attention.h"
#include "ugsd/sample.h"
#include "ugsd/token_stats.h"

namespace ugsd {

struct Kernels {
  const char* isa;
  void (*token_stats)(const TokenStatsArgs&);
  void (*logprob_rank)(const LogprobRankArgs&);
  void (*filter_logits)(const FilterLogitsArgs&);
  void (*sample)(const SampleArgs&);
  void (*accept_block)(const AcceptBlockArgs&);
  void (*lm_head_stats)(const LmHeadStatsArgs&);
  MoveSlots* move_slots;  // of kv_compact
  void (*packed_attention)(const PackedAttentionArgs&);
};

template <class S>
constexpr Kernels make_kernels(const char* isa) {
  return {isa,
          token_stats<S>,
          logprob_rank<S>,
          filter_logits<S>,
          sample<S>,
          accept_block<S>,
          lm_head_stats<S>,
          move_slots<S>,
          packed_attention<S>};
}

// Names of the instruction sets that this build has and this machine runs, best first; null ends them.
const char* const* isas();

// The table of a name, null where this build or machine has none.
const Kernels* kernels_of(const char* isa);

// The best table that the machine runs; the environment variable UGSD_CPU_ISA names another.
const Kernels& kernels();

}  // namespace ugsd
