#include "ugsd/simd/avx512.h"

#include "ugsd/kernels.h"

namespace ugsd {

extern const Kernels kernels_avx512 = make_kernels<simd::Avx512>("avx512");

}  // namespace ugsd
