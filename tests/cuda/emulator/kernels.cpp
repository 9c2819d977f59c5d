// All kernels, for the emulator.
#include "cuda/accept_block.cu"
#include "cuda/filter_logits.cu"
#include "cuda/gate_block.cu"
#include "cuda/kv_compact.cu"
#include "cuda/logprob_rank.cu"
#include "cuda/sample.cu"
#include "cuda/token_stats.cu"
