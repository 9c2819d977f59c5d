#include "ugsd/simd/scalar.h"

#include "ugsd/kernels.h"

namespace ugsd {

extern const Kernels kernels_scalar = make_kernels<simd::Scalar>("scalar");

}  // namespace ugsd
