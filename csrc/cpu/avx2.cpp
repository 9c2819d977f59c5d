#include "ugsd/simd/avx2.h"

#include "ugsd/kernels.h"

namespace ugsd {

extern const Kernels kernels_avx2 = make_kernels<simd::Avx2>("avx2");

}  // namespace ugsd
