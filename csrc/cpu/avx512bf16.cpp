#include "ugsd/simd/avx512bf16.h"

namespace ugsd {

// What the bfloat16 dot product changes; the other ops are those of avx512.cpp.
void lm_head_stats_avx512bf16(const LmHeadStatsArgs& args) { lm_head_stats<simd::Avx512Bf16>(args); }

}  // namespace ugsd
