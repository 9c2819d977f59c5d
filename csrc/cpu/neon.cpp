#include "ugsd/simd/neon.h"

#include "ugsd/kernels.h"

namespace ugsd {

extern const Kernels kernels_neon = make_kernels<simd::Neon>("neon");

}  // namespace ugsd
