// All kernels, for the emulator, and what tests ask of it.
#include "cuda/accept_block.cu"
#include "cuda/filter_logits.cu"
#include "cuda/gate_block.cu"
#include "cuda/kv_compact.cu"
#include "cuda/logprob_rank.cu"
#include "cuda/sample.cu"
#include "cuda/token_stats.cu"

#define UGSD_EXPORT extern "C" __attribute__((visibility("default")))

UGSD_EXPORT int64_t emulator_launches() { return emulator::launches; }

// Ends a capture, or begins one, which forgets the last.
UGSD_EXPORT void emulator_capture(bool on) {
  emulator::capturing = on;
  if (on) emulator::captured.clear();
}

UGSD_EXPORT void emulator_replay() {
  for (const auto& launch : emulator::captured) launch();
}
